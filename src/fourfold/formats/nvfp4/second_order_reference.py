# SPDX-License-Identifier: Apache-2.0
"""The definition of what `second_order` computes, in float64 and plain PyTorch: slow, and without
tiles or lanes. The kernels of `joint_cpu` must make its decisions.

They compute in float32, so a decision may fall otherwise where two choices are almost equal, and
whatever follows in that row may differ. So the reference says which rows are **decided**: no
decision in them is within reach of rounding, be it a code, a sign, the first candidate, or the
smallest loss. Decided rows must be equal, code for code. Factors and inverses are not computed
here: they are given, as float32 has them.

**The reach of rounding.** For codes q that are given, the errors solve e·U = t − q by substitution.
What float32 has in their place, ê, solves ê·(U + δ) = t − q + ε exactly, whatever the order of
additions and whether they are fused, with |δ| ≤ n·u·|U| for n columns, u = 2⁻²⁴, and
|ε| ≤ u·(|t| + |q|). Hence |ê − e| ≤ z·|U⁻¹| with z = n·u·|e|·|U| + u·(|t| + |q|), and a running
target t_k is off by no more than U_kk times that of the columns before it, and its own rounding.
Terms in u² are covered by taking 2u for u. The reach of losses and of descent's targets follows
likewise.

Shapes: O outputs, I inputs, B blocks of inputs, C candidates of a block, K columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.formats.nvfp4 import e2m1, e4m3
from fourfold.formats.nvfp4.joint_cpu import BELOW, BLOCK, CANDIDATES, LEAST_GAIN

_U = 2.0**-23
_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
_SCALES = torch.cat([torch.zeros(1), e4m3.E4M3_POSITIVE])
"""By byte, 0..126."""


@dataclass
class Choice:
    """Scales and codes of a weight, with columns in the order in which they are rounded."""

    codes_OI: Tensor
    """uint8, one code in each byte."""
    scales_OB: Tensor
    """uint8, E4M3."""
    values_OI: Tensor
    """float64: what codes and scales stand for."""
    is_decided_O: Tensor
    """False for rows in which float32 may decide otherwise."""


@dataclass
class _Running:
    """A block's targets, and their reach."""

    t: Tensor
    """`[..., K]`."""
    size: Tensor
    """Σ|e_i|·|U_ik| over the columns before k."""
    reach: Tensor
    """Σ z_i·|U⁻¹_ik| over the columns before k."""
    number: int
    """Columns before the block."""

    def expanded(self, count: int) -> _Running:
        """The same for each of some candidates, `[O, C, K]`."""
        t, size, reach = (
            x[:, None].expand(-1, count, -1).clone() for x in (self.t, self.size, self.reach)
        )
        return _Running(t, size, reach, self.number)


@dataclass
class _Trial:
    """A block that was rounded under each of some candidates."""

    codes_OCK: Tensor
    values_OCK: Tensor
    error_OCK: Tensor
    z_OCK: Tensor
    loss_OC: Tensor
    reach_OC: Tensor
    """How far the loss is from that of float32, if no code differs."""
    least_OC: Tensor
    """What the loss in float32 is not below, even if codes differ."""
    is_decided_OC: Tensor


def round_weight(
    target_OI: Tensor, factor_II: Tensor, group_scale: float, scales_OB: Tensor | None = None
) -> Choice:
    """Round with compensation; scales are chosen jointly, unless they are given."""
    t_OI, factor_II = target_OI.double(), factor_II.double()
    inverse_II = factor_II.inverse()
    size_OI, reach_OI = torch.zeros_like(t_OI), torch.zeros_like(t_OI)
    choice, every = _empty(t_OI), torch.arange(len(t_OI))
    for block in range(t_OI.shape[1] // BLOCK):
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        behind = slice(inside.stop, None)
        of_block = t_OI[:, inside], size_OI[:, inside], reach_OI[:, inside]
        running = _Running(*of_block, number=inside.start)
        factor_KK, inverse_KK = factor_II[inside, inside], inverse_II[inside, inside]
        if scales_OB is None:
            bytes_OC, is_decided_O = _candidates(running, factor_KK, group_scale)
            choice.is_decided_O &= is_decided_O
        else:
            bytes_OC = scales_OB[:, block, None].long()
        trial = _try(running, factor_KK, inverse_KK, bytes_OC, group_scale)
        best_O, is_decided_O = _best(trial)
        choice.is_decided_O &= is_decided_O
        _take(choice, block, trial, bytes_OC, best_O)
        error_OK, z_OK = (x[every, best_O] for x in (trial.error_OCK, trial.z_OCK))
        t_OI[:, behind] -= error_OK @ factor_II[inside, behind]
        size_OI[:, behind] += error_OK.abs() @ factor_II[inside, behind].abs()
        reach_OI[:, behind] += z_OK @ inverse_II[inside, behind].abs()
    return choice


def sweep(
    start: Choice,
    target_OI: Tensor,
    h_II: Tensor,
    block_inverses_BKK: Tensor,
    block_factors_BKK: Tensor,
    group_scale: float,
) -> Choice:
    """Choose each block again, given all others; keep what has a smaller loss."""
    h_II, target_OI, inverses = h_II.double(), target_OI.double(), block_inverses_BKK.double()
    new = Choice(
        start.codes_OI.clone(),
        start.scales_OB.clone(),
        start.values_OI.double(),
        torch.ones(len(target_OI), dtype=torch.bool),
    )
    moved_OI = (new.values_OI - target_OI).abs()
    every, width = torch.arange(len(target_OI)), h_II.shape[0]
    for block, factor_KK in enumerate(block_factors_BKK.double()):
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        gradient_OK = (new.values_OI - target_OI) @ h_II[:, inside]
        old_OK = new.values_OI[:, inside].clone()
        t_OK = old_OK - gradient_OK @ inverses[block]
        inverse_KK = factor_KK.inverse()
        of_sum_OK = 2 * width * _U * moved_OI @ h_II[:, inside].abs()
        of_sum_OK += BLOCK * _U * gradient_OK.abs()
        of_t_OK = of_sum_OK @ inverses[block].abs() + _U * (old_OK.abs() + t_OK.abs())
        running = _Running(t_OK, torch.zeros_like(t_OK), of_t_OK @ inverse_KK.abs(), 0)
        bytes_OC, is_decided_O = _candidates(running, factor_KK, group_scale)
        trial = _try(running, factor_KK, inverse_KK, bytes_OC, group_scale)
        best_O, is_best_O = _best(trial)
        running = running.expanded(1)
        before = _blank(running.t)
        for k in range(BLOCK):
            _put(before, running, k, factor_KK, inverse_KK, old_OK[:, None, k])
        gain_O = before.loss_OC[:, 0] * float(LEAST_GAIN) - trial.loss_OC[every, best_O]
        unsure_O = before.reach_OC[:, 0] + trial.reach_OC[every, best_O]
        is_same_O = (trial.values_OCK[every, best_O].float() == old_OK.float()).all(dim=1)
        is_same_O &= bytes_OC[every, best_O] == start.scales_OB[:, block]
        new.is_decided_O &= is_decided_O & is_best_O & ((gain_O.abs() > unsure_O) | is_same_O)
        _take(new, block, trial, bytes_OC, best_O, gain_O > 0)
        moved_OI[:, inside] += (new.values_OI[:, inside] - old_OK).abs()
    return new


def _reach(running: _Running, k: int, factor_KK: Tensor) -> Tensor:
    """How far target k may be from that of float32."""
    rounding = (running.number + k + 2) * _U * running.size[..., k] + _U * running.t[..., k].abs()
    return running.reach[..., k] * factor_KK[k, k] + rounding


def _candidates(running: _Running, factor_KK: Tensor, group_scale: float) -> tuple[Tensor, Tensor]:
    """The bytes that are tried, `[O, C]`, and whether they are decided."""
    divisor = 6 * float(group_scale)
    amax_O = running.t.abs().amax(dim=1) / divisor
    reaches = [_reach(running, k, factor_KK) for k in range(BLOCK)]
    reach_O = torch.stack(reaches).amax(dim=0) / divisor + 4 * _U * amax_O
    near = [(amax_O + side * reach_O).clamp(e4m3.E4M3_MIN, e4m3.E4M3_MAX) for side in (-1, 0, 1)]
    low_O, byte_O, high_O = (e4m3.encode_clamped(x.float()).view(torch.uint8).long() for x in near)
    first_O = (byte_O - BELOW).clamp(1, 127 - CANDIDATES)
    return first_O[:, None] + torch.arange(CANDIDATES), low_O == high_O


def _try(
    block: _Running, factor_KK: Tensor, inverse_KK: Tensor, bytes_OC: Tensor, group_scale: float
) -> _Trial:
    """Round a block in sequence under each candidate."""
    step_OC = (_SCALES[bytes_OC] * torch.tensor(group_scale, dtype=torch.float32)).double()
    running = block.expanded(bytes_OC.shape[1])
    trial = _blank(running.t)
    for k in range(BLOCK):
        x_OC, reach_OC = running.t[..., k].clone(), _reach(running, k, factor_KK)
        ratio_OC = x_OC.abs() / step_OC
        distance_OC = (ratio_OC[..., None] - _MIDPOINTS).abs().amin(dim=-1)
        is_decided_OC = distance_OC > reach_OC / step_OC + 4 * _U * ratio_OC
        code_OC = e2m1.round_magnitude(ratio_OC) | ((x_OC < 0).to(torch.uint8) << 3)
        value_OC = e2m1.decode(code_OC).double() * step_OC
        error_OC, error_reach_OC = _put(trial, running, k, factor_KK, inverse_KK, value_OC)
        trial.codes_OCK[..., k] = code_OC
        # At a midpoint both codes lose the same; what follows depends on which it is.
        sure_OC = (error_OC.abs() - 3 * error_reach_OC).clamp(min=0)
        trial.least_OC += torch.where(trial.is_decided_OC, sure_OC**2, 0)
        trial.is_decided_OC &= is_decided_OC & ((x_OC.abs() > reach_OC) | (reach_OC == 0))
    trial.least_OC *= 1 - BLOCK * _U
    return trial


def _blank(t_OCK: Tensor) -> _Trial:
    values_OCK, error_OCK, z_OCK = t_OCK.new_zeros(3, *t_OCK.shape)
    loss_OC, reach_OC, least_OC = t_OCK.new_zeros(3, *t_OCK.shape[:-1])
    codes_OCK = torch.zeros_like(t_OCK, dtype=torch.uint8)
    is_decided_OC = torch.ones_like(loss_OC, dtype=torch.bool)
    return _Trial(
        codes_OCK, values_OCK, error_OCK, z_OCK, loss_OC, reach_OC, least_OC, is_decided_OC
    )


def _put(
    trial: _Trial, running: _Running, k: int, factor_KK: Tensor, inverse_KK: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Give column k a value, let those behind it make up for it; return its error and the reach."""
    reach_OC = _reach(running, k, factor_KK)
    error_OC = (running.t[..., k] - value) / factor_KK[k, k]
    error_reach_OC = (reach_OC + _U * value.abs()) / factor_KK[k, k] + 4 * _U * error_OC.abs()
    size_OC = running.size[..., k] + error_OC.abs() * factor_KK[k, k]
    z_OC = (running.number + k + 4) * _U * size_OC + _U * (running.t[..., k].abs() + value.abs())
    trial.values_OCK[..., k], trial.error_OCK[..., k], trial.z_OCK[..., k] = value, error_OC, z_OC
    trial.loss_OC += error_OC**2
    trial.reach_OC += (2 * error_OC.abs() + error_reach_OC) * error_reach_OC
    trial.reach_OC += BLOCK * _U * error_OC**2
    behind = slice(k + 1, None)
    running.t[..., behind] -= error_OC[..., None] * factor_KK[k, behind]
    running.size[..., behind] += error_OC.abs()[..., None] * factor_KK[k, behind].abs()
    running.reach[..., behind] += z_OC[..., None] * inverse_KK[k, behind].abs()
    return error_OC, error_reach_OC


def _best(trial: _Trial) -> tuple[Tensor, Tensor]:
    """The first candidate of the smallest loss, and whether that is decided."""
    every = torch.arange(len(trial.loss_OC))
    is_least_OC = trial.loss_OC == trial.loss_OC.amin(dim=1, keepdim=True)
    best_O = is_least_OC.to(torch.uint8).argmax(dim=1)
    most_O = (trial.loss_OC + trial.reach_OC)[every, best_O]
    least_OC = torch.where(trial.is_decided_OC, trial.loss_OC - trial.reach_OC, trial.least_OC)
    # The same values under another scale have the same loss in float32, too.
    is_same_OC = (trial.values_OCK == trial.values_OCK[every, best_O][:, None]).all(dim=-1)
    rivals_OC = (least_OC <= most_O[:, None]) & ~(is_same_OC & trial.is_decided_OC)
    return best_O, ~rivals_OC.any(dim=1) & trial.is_decided_OC[every, best_O]


def _empty(t_OI: Tensor) -> Choice:
    rows, width = t_OI.shape
    return Choice(
        torch.zeros(rows, width, dtype=torch.uint8),
        torch.zeros(rows, width // BLOCK, dtype=torch.uint8),
        torch.zeros_like(t_OI),
        torch.ones(rows, dtype=torch.bool),
    )


def _take(
    choice: Choice,
    block: int,
    trial: _Trial,
    bytes_OC: Tensor,
    best_O: Tensor,
    where_O: Tensor | None = None,
) -> None:
    """Put the best candidate's codes and scale into a choice, in some rows."""
    inside = slice(block * BLOCK, (block + 1) * BLOCK)
    rows = torch.arange(len(best_O))
    if where_O is not None:
        rows, best_O = rows[where_O], best_O[where_O]
    choice.codes_OI[rows, inside] = trial.codes_OCK[rows, best_O]
    choice.values_OI[rows, inside] = trial.values_OCK[rows, best_O]
    choice.scales_OB[rows, block] = bytes_OC[rows, best_O].to(torch.uint8)
