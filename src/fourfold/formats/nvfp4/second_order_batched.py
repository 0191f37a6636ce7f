# SPDX-License-Identifier: Apache-2.0
"""What `second_order` computes, for many scale groups at once, in PyTorch on any device.

A batch has a moment and a group scale for each scale group, or one moment for all of them. Weights
of a scale group, which read the same inputs, such as gate and up of an expert, are rows of one
weight here. Columns are rounded in sequence, each step for all rows and candidates of the batch: it
is meant for devices on which many experts fill what one would leave idle. Decisions are those of
the kernels where rounding cannot reach them; see `second_order_reference`.

Shapes: N scale groups, M moments (N or 1), O outputs, I inputs, B blocks of inputs, C candidates,
K columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fourfold.formats.nvfp4 import e2m1, e4m3
from fourfold.formats.nvfp4.joint_cpu import BELOW, BLOCK, CANDIDATES, LEAST_GAIN
from fourfold.formats.nvfp4.second_order import LEAST_SCALE_GAIN, TILE


class MomentBatch:
    """Second moments, damped, each in the order in which its blocks are rounded."""

    def __init__(self, moment_MII: Tensor, damping: float) -> None:
        """See `second_order.Moment`."""
        count, width, _ = moment_MII.shape
        mean_M = moment_MII.diagonal(dim1=1, dim2=2).double().mean(dim=1)
        unit_M = (-mean_M.frexp().exponent).clamp(-126, 126).double().exp2()
        eye_II = torch.eye(width, device=moment_MII.device)
        h_MII = moment_MII.float() * unit_M.float()[:, None, None]
        h_MII = torch.where(mean_M[:, None, None] > 0, h_MII, eye_II)
        mean_M = torch.where(mean_M > 0, mean_M * unit_M, 1)
        energy_MB = h_MII.diagonal(dim1=1, dim2=2).reshape(count, -1, BLOCK).sum(dim=2)
        self.order_MB = energy_MB.argsort(dim=1, descending=True, stable=True)
        inside_K = torch.arange(BLOCK, device=moment_MII.device)
        self.order_MI = (self.order_MB[..., None] * BLOCK + inside_K).flatten(1)
        h_MII = h_MII.gather(1, self.order_MI[:, :, None].expand_as(h_MII))
        self.h_MII = h_MII.gather(2, self.order_MI[:, None].expand_as(h_MII))
        self.h_MII.diagonal(dim1=1, dim2=2).add_((damping * mean_M).float()[:, None])
        self.factor_MII, is_positive_M = inverse_factors(self.h_MII)
        self.block_factors_MBKK, are_positive_MB = inverse_factors(self.blocks_MBKK)
        self.block_inverses_MBKK = self.block_factors_MBKK.mT @ self.block_factors_MBKK
        self.is_positive_M = is_positive_M & are_positive_MB.all(dim=1)
        """False for moments that float64 does not find positive definite: theirs are no factors."""

    @property
    def blocks_MBKK(self) -> Tensor:
        """The blocks on the diagonals, float32."""
        count, width, _ = self.h_MII.shape
        blocks_MBKBK = self.h_MII.view(count, width // BLOCK, BLOCK, width // BLOCK, BLOCK)
        return blocks_MBKBK.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    @cached_property
    def block_roots_MBKK(self) -> Tensor:
        """C, lower triangular, float32, with C·Cᵀ the block; found in float64."""
        roots_MBKK: Tensor = torch.linalg.cholesky_ex(self.blocks_MBKK.double()).L
        return roots_MBKK.float()


def inverse_factors(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return U with H⁻¹ = UᵀU for matrices `[..., I, I]`, and for which of them there is one.

    Those of which float32 finds none are tried in float64.
    """
    lower, info = torch.linalg.cholesky_ex(h.flip(-1, -2))
    is_positive = (info == 0) & lower.isfinite().all(dim=-1).all(dim=-1)
    eye_II = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    lower = torch.where(is_positive[..., None, None], lower, eye_II)
    factors: Tensor = torch.linalg.solve_triangular(lower.flip(-1, -2), eye_II, upper=True)
    if h.dtype == torch.float32 and not bool(is_positive.all()):
        again, is_positive_again = inverse_factors(h[~is_positive].double())
        factors[~is_positive] = again.float()
        is_positive[~is_positive] = is_positive_again
    return factors, is_positive


@dataclass
class RoundedBatch:
    """Weights while their codes are chosen. Columns are in the orders of their moments."""

    target_NOI: Tensor
    """float32."""
    moments: MomentBatch
    group_scale_N: Tensor
    """float32."""
    codes_NOI: Tensor = field(init=False)
    scales_NOB: Tensor = field(init=False)
    values_NOI: Tensor = field(init=False)

    def __post_init__(self) -> None:
        order_NOI = self.moments.order_MI[:, None].expand_as(self.target_NOI)
        self.target_NOI = self.target_NOI.gather(2, order_NOI)
        self.codes_NOI = torch.zeros_like(self.target_NOI, dtype=torch.uint8)
        self.scales_NOB = self.codes_NOI[..., ::BLOCK].contiguous()
        self.values_NOI = torch.zeros_like(self.target_NOI)

    def round(self, scales_NOB: Tensor | None = None) -> None:
        """Round with compensation; scales are chosen jointly, unless they are given, in the order
        of the moments."""
        running_NOI, factor_MII = self.target_NOI.clone(), self.moments.factor_MII
        errors_NOI = torch.empty_like(running_NOI)
        width = running_NOI.shape[2]
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            for first in range(start, stop, BLOCK):
                block = first // BLOCK
                inside, rest = slice(first, first + BLOCK), slice(first + BLOCK, stop)
                given_NO = None if scales_NOB is None else scales_NOB[..., block]
                trial = self._try(running_NOI[..., inside], factor_MII[:, inside, inside], given_NO)
                trial.put(self, block)
                errors_NOI[..., inside] = trial.error_NOK
                running_NOI[..., rest] -= trial.error_NOK @ factor_MII[:, inside, rest]
            behind, tile = slice(stop, width), slice(start, stop)
            running_NOI[..., behind] -= errors_NOI[..., tile] @ factor_MII[:, tile, behind]

    def static_scales(self) -> Tensor:
        """Return the scales of the least loss of each block by itself, uint8 `[N, O, B]`, for
        `round`: the smallest of equal ones."""
        target_NBOK = self.target_NOI.view(*self.scales_NOB.shape, BLOCK).transpose(1, 2)
        roots_MBKK = self.moments.block_roots_MBKK
        least_NBO = torch.full_like(target_NBOK[..., 0], torch.inf)
        byte_NBO = torch.ones_like(least_NBO, dtype=torch.uint8)
        for byte, scale in enumerate(e4m3.E4M3_POSITIVE.tolist(), start=1):
            step_N111 = scale * self.group_scale_N[:, None, None, None]
            value_NBOK = e2m1.decode(e2m1.encode(target_NBOK * (1 / step_N111))) * step_N111
            loss_NBO = ((target_NBOK - value_NBOK) @ roots_MBKK).square().sum(dim=3)
            byte_NBO[loss_NBO < least_NBO] = byte
            least_NBO = torch.minimum(least_NBO, loss_NBO)
        return byte_NBO.transpose(1, 2)

    def improve(self) -> Tensor:
        """Sweep once over all blocks; return how many blocks of rows changed, `[N]`."""
        moments = self.moments
        gradient_NOI = (self.values_NOI - self.target_NOI) @ moments.h_MII
        changed_N = torch.zeros_like(self.group_scale_N, dtype=torch.int64)
        for block in range(self.scales_NOB.shape[2]):
            inside = slice(block * BLOCK, (block + 1) * BLOCK)
            behind = slice(inside.stop, None)
            old_NOK = self.values_NOI[..., inside].clone()
            factor_MKK = moments.block_factors_MBKK[:, block]
            t_NOK = old_NOK - gradient_NOI[..., inside] @ moments.block_inverses_MBKK[:, block]
            trial = self._try(t_NOK, factor_MKK)
            is_better_NO = trial.loss_NO < _loss(t_NOK, factor_MKK, old_NOK) * float(LEAST_GAIN)
            trial.put(self, block, is_better_NO)
            change_NOK = self.values_NOI[..., inside] - old_NOK
            gradient_NOI[..., behind] += change_NOK @ moments.h_MII[:, inside, behind]
            changed_N += is_better_NO.sum(dim=1)
        return changed_N

    def rescale(self) -> None:
        """Take the group scale of the least loss for each moment, as `descend` there does."""
        weighted_NOI = self.values_NOI @ self.moments.h_MII
        num_N = (weighted_NOI * self.target_NOI).sum(dim=(1, 2), dtype=torch.float64)
        den_N = (weighted_NOI * self.values_NOI).sum(dim=(1, 2), dtype=torch.float64)
        ratio_N = num_N / den_N
        moves_N = (num_N > 0) & (den_N > 0) & ((ratio_N - 1).abs() > LEAST_SCALE_GAIN)
        mantissa_N, exponent_N = (self.group_scale_N.double() * ratio_N).frexp()
        better_N = ((mantissa_N * 4096).round() / 4096).ldexp(exponent_N).float()
        self.group_scale_N = torch.where(moves_N, better_N, self.group_scale_N)
        scale_NOB = _SCALES.to(ratio_N.device)[self.scales_NOB.long()]
        step_NOB = scale_NOB * self.group_scale_N[:, None, None]
        self.values_NOI = e2m1.decode(self.codes_NOI) * step_NOB.repeat_interleave(BLOCK, dim=2)

    def descend(self, sweeps: int) -> None:
        """Choose scales and codes again, each block given all others, and then the group scales.

        A group whose loss a sweep does not lower is as it was before that sweep, and so is one that
        had nothing left to change.
        """
        is_active_N = torch.ones_like(self.group_scale_N, dtype=torch.bool)
        least_N, reach_N = self._quick_loss() if sweeps else (self.group_scale_N,) * 2
        for _ in range(sweeps):
            before = self._chosen()
            changed_N = self.improve()
            self.rescale()
            loss_N, reach_of_loss_N = self._quick_loss()
            has_fallen_N = least_N - loss_N > reach_N + reach_of_loss_N
            for number in (is_active_N & ~has_fallen_N).nonzero().flatten().tolist():
                old_OI = before[2][number]
                has_fallen_N[number] = self._loss(number) < self._loss(number, old_OI)
            is_active_N &= has_fallen_N
            self._choose_again(before, ~is_active_N)
            least_N = torch.where(is_active_N, loss_N, least_N)
            reach_N = torch.where(is_active_N, reach_of_loss_N, reach_N)
            is_active_N &= changed_N > 0
            if not bool(is_active_N.any()):
                break

    def _quick_loss(self) -> tuple[Tensor, Tensor]:
        """The loss of each group from products in float32, and a bound that their rounding hardly
        reaches, as `second_order.Rounded.quick_loss` has them; float64 `[N]`."""
        d_NOI, h_MII = self.values_NOI - self.target_NOI, self.moments.h_MII
        loss_N = ((d_NOI @ h_MII) * d_NOI).sum(dim=(1, 2), dtype=torch.float64)
        roots_MI1 = h_MII.diagonal(dim1=1, dim2=2).sqrt()[..., None]
        sizes_NO = (d_NOI.abs() @ roots_MI1)[..., 0]
        return loss_N, 2.0**-22 * sizes_NO.double().square().sum(dim=1)

    def _loss(self, number: int, values_OI: Tensor | None = None) -> float:
        """The loss of one group in float64, also for other values than its own."""
        values_OI = self.values_NOI[number] if values_OI is None else values_OI
        d_OI = values_OI.double() - self.target_NOI[number].double()
        h_MII = self.moments.h_MII
        h_II = h_MII[number if len(h_MII) > 1 else 0].double()
        return float(((d_OI @ h_II) * d_OI).sum())

    def _chosen(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies of codes, scales, values and group scales."""
        chosen = self.codes_NOI, self.scales_NOB, self.values_NOI, self.group_scale_N
        codes, scales, values, group_scales = (tensor.clone() for tensor in chosen)
        return codes, scales, values, group_scales

    def _choose_again(self, chosen: tuple[Tensor, ...], where_N: Tensor) -> None:
        """Take what `_chosen` has returned, in some groups."""
        mine = self.codes_NOI, self.scales_NOB, self.values_NOI, self.group_scale_N
        for tensor, old in zip(mine, chosen, strict=True):
            tensor[where_N] = old[where_N]

    def pack(self) -> tuple[Tensor, Tensor]:
        """Return the row parts, uint8 `[N, O, I/2]` and `[N, O, B]`, in the weights' own order."""
        order_NOI = self.moments.order_MI[:, None].expand_as(self.codes_NOI)
        order_NOB = self.moments.order_MB[:, None].expand_as(self.scales_NOB)
        codes_NOI = torch.empty_like(self.codes_NOI).scatter_(2, order_NOI, self.codes_NOI)
        scales_NOB = torch.empty_like(self.scales_NOB).scatter_(2, order_NOB, self.scales_NOB)
        return e2m1.pack(codes_NOI), scales_NOB

    def _try(self, t_NOK: Tensor, factor_MKK: Tensor, given_NO: Tensor | None = None) -> _Trial:
        """Round a block under each candidate, or under scales that are given; keep the candidate of
        the least loss, the first of equal ones."""
        if given_NO is None:
            divisor_N1 = 6 * self.group_scale_N[:, None]
            byte_NO = e4m3.encode_clamped(t_NOK.abs().amax(dim=2) / divisor_N1).view(torch.uint8)
            first_NO = (byte_NO.long() - BELOW).clamp(1, 127 - CANDIDATES)
        else:
            first_NO = given_NO.long()
        candidate_C = torch.arange(CANDIDATES if given_NO is None else 1, device=t_NOK.device)
        byte_NOC = first_NO[..., None] + candidate_C
        step_NOC = _SCALES.to(t_NOK.device)[byte_NOC] * self.group_scale_N[:, None, None]
        inverse_NOC, inverse_MK = 1 / step_NOC, 1 / factor_MKK.diagonal(dim1=1, dim2=2)
        t_NOCK = t_NOK[:, :, None].expand(*step_NOC.shape, BLOCK).clone()
        code_NOCK = torch.empty_like(t_NOCK, dtype=torch.uint8)
        error_NOCK, loss_NOC = torch.empty_like(t_NOCK), torch.zeros_like(step_NOC)
        for k in range(BLOCK):
            x_NOC = t_NOCK[..., k]
            code_NOC = e2m1.round_magnitude(x_NOC.abs() * inverse_NOC)
            code_NOCK[..., k] = code_NOC | (x_NOC < 0).to(torch.uint8) << 3
            value_NOC = e2m1.decode(code_NOCK[..., k]) * step_NOC
            error_NOC = (x_NOC - value_NOC) * inverse_MK[:, k, None, None]
            error_NOCK[..., k] = error_NOC
            loss_NOC += error_NOC * error_NOC
            t_NOCK[..., k + 1 :] -= error_NOC[..., None] * factor_MKK[:, None, None, k, k + 1 :]
        is_least_NOC = loss_NOC == loss_NOC.amin(dim=2, keepdim=True)
        last = len(candidate_C) - 1
        best_NO1 = torch.where(is_least_NOC, candidate_C, last).amin(dim=2, keepdim=True)
        best_NO1K = best_NO1[..., None].expand(*best_NO1.shape, BLOCK)
        return _Trial(
            code_NOCK.gather(2, best_NO1K)[:, :, 0],
            error_NOCK.gather(2, best_NO1K)[:, :, 0],
            (first_NO + best_NO1[..., 0]).to(torch.uint8),
            step_NOC.gather(2, best_NO1)[..., 0],
            loss_NOC.gather(2, best_NO1)[..., 0],
        )


@dataclass
class _Trial:
    """A block under the best of its candidates."""

    code_NOK: Tensor
    error_NOK: Tensor
    scale_NO: Tensor
    step_NO: Tensor
    loss_NO: Tensor

    def put(self, batch: RoundedBatch, block: int, where_NO: Tensor | None = None) -> None:
        """Put codes and scales into a batch, in some rows."""
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        value_NOK = e2m1.decode(self.code_NOK) * self.step_NO[..., None]
        if where_NO is None:
            where_NO = torch.ones_like(self.scale_NO, dtype=torch.bool)
        for whole, new in ((batch.codes_NOI, self.code_NOK), (batch.values_NOI, value_NOK)):
            whole[..., inside] = torch.where(where_NO[..., None], new, whole[..., inside])
        old_NO = batch.scales_NOB[..., block]
        batch.scales_NOB[..., block] = torch.where(where_NO, self.scale_NO, old_NO)


def _loss(t_NOK: Tensor, factor_MKK: Tensor, value_NOK: Tensor) -> Tensor:
    """Σe² of values that are given."""
    t_NOK, loss_NO = t_NOK.clone(), torch.zeros_like(t_NOK[..., 0])
    inverse_MK = 1 / factor_MKK.diagonal(dim1=1, dim2=2)
    for k in range(BLOCK):
        error_NO = (t_NOK[..., k] - value_NOK[..., k]) * inverse_MK[:, k, None]
        loss_NO += error_NO * error_NO
        t_NOK[..., k + 1 :] -= error_NO[..., None] * factor_MKK[:, None, k, k + 1 :]
    return loss_NO


_SCALES = torch.cat([torch.zeros(1), e4m3.E4M3_POSITIVE])
"""By byte, 0..126."""
