# SPDX-License-Identifier: Apache-2.0
"""What `second_order` computes, for many moments at once, in PyTorch on any device.

A batch has a weight and a group scale for each moment. Weights of a scale group that read the same
inputs, gate and up of an expert, are rows of one weight here. Columns are rounded in sequence, each
step for all rows and candidates of the batch: it is meant for devices on which many experts fill
what one would leave idle. Decisions are those of the kernels where rounding cannot reach them; see
`second_order_reference`.

Shapes: N moments, O outputs, I inputs, B blocks of inputs, C candidates, K columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourfold.formats.nvfp4 import e2m1, e4m3
from fourfold.formats.nvfp4.joint_cpu import BELOW, BLOCK, CANDIDATES, LEAST_GAIN
from fourfold.formats.nvfp4.second_order import LEAST_SCALE_GAIN, TILE


class MomentBatch:
    """Second moments, damped, each in the order in which its blocks are rounded."""

    def __init__(self, moment_NII: Tensor, damping: float) -> None:
        """See `second_order.Moment`."""
        count, width, _ = moment_NII.shape
        mean_N = moment_NII.diagonal(dim1=1, dim2=2).double().mean(dim=1)
        unit_N = (-mean_N.frexp().exponent).clamp(-126, 126).double().exp2()
        eye_II = torch.eye(width, device=moment_NII.device)
        h_NII = moment_NII.float() * unit_N.float()[:, None, None]
        h_NII = torch.where(mean_N[:, None, None] > 0, h_NII, eye_II)
        mean_N = torch.where(mean_N > 0, mean_N * unit_N, 1)
        energy_NB = h_NII.diagonal(dim1=1, dim2=2).reshape(count, -1, BLOCK).sum(dim=2)
        self.order_NB = energy_NB.argsort(dim=1, descending=True, stable=True)
        inside_K = torch.arange(BLOCK, device=moment_NII.device)
        self.order_NI = (self.order_NB[..., None] * BLOCK + inside_K).flatten(1)
        h_NII = h_NII.gather(1, self.order_NI[:, :, None].expand_as(h_NII))
        self.h_NII = h_NII.gather(2, self.order_NI[:, None].expand_as(h_NII))
        self.h_NII.diagonal(dim1=1, dim2=2).add_((damping * mean_N).float()[:, None])
        self.factor_NII = inverse_factors(self.h_NII)
        blocks_NBKK = self.h_NII.view(count, -1, BLOCK, width // BLOCK, BLOCK)
        blocks_NBKK = blocks_NBKK.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        self.block_factors_NBKK = inverse_factors(blocks_NBKK)
        self.block_inverses_NBKK = self.block_factors_NBKK.mT @ self.block_factors_NBKK


def inverse_factors(h: Tensor) -> Tensor:
    """Return U with H⁻¹ = UᵀU for matrices `[..., I, I]`; in float64 where float32 fails."""
    lower, info = torch.linalg.cholesky_ex(h.flip(-1, -2))
    if bool(info.any()) and h.dtype == torch.float32:
        return inverse_factors(h.double()).float()
    eye_II = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    factors: Tensor = torch.linalg.solve_triangular(lower.flip(-1, -2), eye_II, upper=True)
    return factors


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
        order_NOI = self.moments.order_NI[:, None].expand_as(self.target_NOI)
        self.target_NOI = self.target_NOI.gather(2, order_NOI)
        self.codes_NOI = torch.zeros_like(self.target_NOI, dtype=torch.uint8)
        self.scales_NOB = self.codes_NOI[..., ::BLOCK].contiguous()
        self.values_NOI = torch.zeros_like(self.target_NOI)

    def round(self) -> None:
        """Round with compensation, scales and codes jointly."""
        running_NOI, factor_NII = self.target_NOI.clone(), self.moments.factor_NII
        errors_NOI = torch.empty_like(running_NOI)
        width = running_NOI.shape[2]
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            for first in range(start, stop, BLOCK):
                inside, rest = slice(first, first + BLOCK), slice(first + BLOCK, stop)
                trial = self._try(running_NOI[..., inside], factor_NII[:, inside, inside])
                trial.put(self, first // BLOCK)
                errors_NOI[..., inside] = trial.error_NOK
                running_NOI[..., rest] -= trial.error_NOK @ factor_NII[:, inside, rest]
            behind = slice(stop, width)
            tile = slice(start, stop)
            running_NOI[..., behind] -= errors_NOI[..., tile] @ factor_NII[:, tile, behind]

    def improve(self) -> int:
        """Sweep once over all blocks; return how many blocks of rows changed."""
        moments = self.moments
        gradient_NOI = (self.values_NOI - self.target_NOI) @ moments.h_NII
        changed = torch.zeros((), dtype=torch.int64, device=gradient_NOI.device)
        for block in range(self.scales_NOB.shape[2]):
            inside = slice(block * BLOCK, (block + 1) * BLOCK)
            behind = slice(inside.stop, None)
            old_NOK, factor_NKK = self.values_NOI[..., inside], moments.block_factors_NBKK[:, block]
            t_NOK = old_NOK - gradient_NOI[..., inside] @ moments.block_inverses_NBKK[:, block]
            trial = self._try(t_NOK, factor_NKK)
            is_better_NO = trial.loss_NO < _loss(t_NOK, factor_NKK, old_NOK) * float(LEAST_GAIN)
            old_NOK = old_NOK.clone()
            trial.put(self, block, is_better_NO)
            change_NOK = self.values_NOI[..., inside] - old_NOK
            gradient_NOI[..., behind] += change_NOK @ moments.h_NII[:, inside, behind]
            changed += is_better_NO.sum()
        return int(changed)

    def rescale(self) -> None:
        """Take the group scale of the least loss for each moment, as `descend` there does."""
        weighted_NOI = self.values_NOI @ self.moments.h_NII
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
        """Choose scales and codes again, each block given all others, and then the group scales."""
        for _ in range(sweeps):
            changed = self.improve()
            self.rescale()
            if not changed:
                break

    def pack(self) -> tuple[Tensor, Tensor]:
        """Return the row parts, uint8 `[N, O, I/2]` and `[N, O, B]`, in the weights' own order."""
        order_NOI = self.moments.order_NI[:, None].expand_as(self.codes_NOI)
        order_NOB = self.moments.order_NB[:, None].expand_as(self.scales_NOB)
        codes_NOI = torch.empty_like(self.codes_NOI).scatter_(2, order_NOI, self.codes_NOI)
        scales_NOB = torch.empty_like(self.scales_NOB).scatter_(2, order_NOB, self.scales_NOB)
        return e2m1.pack(codes_NOI), scales_NOB

    def _try(self, t_NOK: Tensor, factor_NKK: Tensor) -> _Trial:
        """Round a block under each candidate; keep the one of the least loss."""
        scales = _SCALES.to(t_NOK.device)
        divisor_N1 = 6 * self.group_scale_N[:, None]
        byte_NO = e4m3.encode_clamped(t_NOK.abs().amax(dim=2) / divisor_N1).view(torch.uint8)
        first_NO = (byte_NO.long() - BELOW).clamp(1, 127 - CANDIDATES)
        candidate_C = torch.arange(CANDIDATES, device=t_NOK.device)
        step_NOC = scales[first_NO[..., None] + candidate_C] * self.group_scale_N[:, None, None]
        t_NOCK = t_NOK[:, :, None].expand(*step_NOC.shape, BLOCK).clone()
        code_NOCK = torch.empty_like(t_NOCK, dtype=torch.uint8)
        error_NOCK, loss_NOC = torch.empty_like(t_NOCK), torch.zeros_like(step_NOC)
        for k in range(BLOCK):
            x_NOC = t_NOCK[..., k]
            code_NOC = e2m1.round_magnitude(x_NOC.abs() / step_NOC)
            code_NOCK[..., k] = code_NOC | (x_NOC < 0).to(torch.uint8) << 3
            value_NOC = e2m1.decode(code_NOCK[..., k]) * step_NOC
            error_NOC = (x_NOC - value_NOC) / factor_NKK[:, k, k, None, None]
            error_NOCK[..., k] = error_NOC
            loss_NOC += error_NOC * error_NOC
            t_NOCK[..., k + 1 :] -= error_NOC[..., None] * factor_NKK[:, None, None, k, k + 1 :]
        is_least_NOC = loss_NOC == loss_NOC.amin(dim=2, keepdim=True)
        best_NO1 = torch.where(is_least_NOC, candidate_C, CANDIDATES).amin(dim=2, keepdim=True)
        best_NO1 = best_NO1.clamp(max=CANDIDATES - 1)
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


def _loss(t_NOK: Tensor, factor_NKK: Tensor, value_NOK: Tensor) -> Tensor:
    """Σe² of values that are given."""
    t_NOK, loss_NO = t_NOK.clone(), torch.zeros_like(t_NOK[..., 0])
    for k in range(BLOCK):
        error_NO = (t_NOK[..., k] - value_NOK[..., k]) / factor_NKK[:, k, k, None]
        loss_NO += error_NO * error_NO
        t_NOK[..., k + 1 :] -= error_NO[..., None] * factor_NKK[:, None, k, k + 1 :]
    return loss_NO


_SCALES = torch.cat([torch.zeros(1), e4m3.E4M3_POSITIVE])
"""By byte, 0..126."""
