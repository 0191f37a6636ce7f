# SPDX-License-Identifier: Apache-2.0
"""Block scales with the least loss in the outputs, each block by itself, codes to the nearest.

With Δ = w − q·m the error of a block under a candidate's step m = s·S, its loss is

    by energy   Σ d_k·Δ_k²       d the diagonal of the second moment of the inputs
    by form     Δ·H_bb·Δᵀ        H_bb its block, damped so that it is positive definite

and the candidate with the smallest loss is chosen, the smaller of equal ones. Which of the 126 need
not be tried (b is the block's largest magnitude; `sweep.py` has the proofs for d = 1):

- **Above, by energy.** Where half a scale does not clip, no element has a larger error under it
  than under the whole one: so it is for any d ≥ 0, and the same eight to fifteen candidates remain.
- **Above, by form.** Errors of one block may cancel, so nothing follows from each being smaller.
  But beyond the first m with b ≤ m/4 all codes are 0, and all losses equal.
- **Below.** |Δ_k| is not below c_k = max(0, |w_k| − 6m), so the loss is not below Σ d_k·c_k², or
  λ·Σ c_k² with λ the least eigenvalue of H_bb. Both grow as m falls; once they exceed the least
  loss found, this candidate and all below it are out.

Losses are computed in float32, by form as ‖Δ·C‖² with H_bb = C·Cᵀ, which does not cancel.

Shapes: O outputs, I inputs, B blocks of inputs, K inputs of a block.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fourfold.formats import nvfp4
from fourfold.formats.nvfp4 import block_scales_cpu, e2m1, e4m3

BLOCK = 16
_ROWS_AT_A_TIME = 256
_FLOAT32 = torch.finfo(torch.float32)


def group_scale_and_unit(amax: float, largest: float) -> tuple[float, float]:
    """Return the group scale under which the largest block scale is about `largest`, and a power of
    two near it. Squares of a weight that is divided by that are finite in float32."""
    group_scale = nvfp4.global_scale(min(amax * e4m3.E4M3_MAX / largest, _FLOAT32.max))
    return group_scale, 2.0 ** math.frexp(group_scale)[1]


def by_energy(w_OI: Tensor, energy_I: Tensor, group_scale: float) -> Tensor:
    """Return the scales `[O, B]`, uint8. Energies that are all 0 stand for equal ones."""
    mean = energy_I.double().mean()
    d_I = (energy_I.double() / mean).float() if bool(mean > 0) else torch.ones_like(energy_I)
    d_BK = d_I.view(-1, BLOCK)
    return _choose(w_OI, d_BK.sqrt().diag_embed(), d_BK, group_scale, is_diagonal=True)


def by_form(w_OI: Tensor, h_BKK: Tensor, group_scale: float) -> Tensor:
    """Return the scales `[O, B]`, uint8, for forms that are positive definite."""
    h_BKK = h_BKK.double()
    least_B = torch.linalg.eigvalsh(h_BKK)[:, 0].clamp(min=0) * (1 - 2.0**-16)
    factors_BKK = torch.linalg.cholesky(h_BKK)
    return _choose(w_OI, factors_BKK, least_B[:, None].expand(-1, BLOCK), group_scale)


def damped(h_BKK: Tensor, damping: float) -> Tensor:
    """Return forms with a multiple of their mean diagonal added, times a number that makes that
    diagonal 1; float64. Forms that are all 0 stand for equal inputs."""
    h_BKK, eye_KK = h_BKK.double(), torch.eye(BLOCK, dtype=torch.float64)
    mean = h_BKK.diagonal(dim1=1, dim2=2).mean()
    h_BKK = h_BKK / mean if bool(mean > 0) else eye_KK.expand_as(h_BKK)
    return h_BKK + damping * eye_KK


def four_or_six(w_OI: Tensor, group_scale: float) -> Tensor:
    """Return the better of the scales that bring a block's amax to 6 and to 4, `[O, B]`, uint8."""
    return torch.cat([_four_or_six(w, group_scale) for w in torch.split(w_OI, _ROWS_AT_A_TIME)])


def _four_or_six(w_OI: Tensor, group_scale: float) -> Tensor:
    amax_OB = w_OI.abs().view(len(w_OI), -1, BLOCK).amax(dim=2)
    trials = []
    for largest in (6.0, 4.0):
        scales_OB = e4m3.encode_clamped(amax_OB / (largest * group_scale)).view(torch.uint8)
        step_OI = _steps(scales_OB, group_scale)
        error_OI = w_OI - e2m1.decode(e2m1.encode(w_OI / step_OI)) * step_OI
        trials.append((scales_OB, error_OI.square().view(len(w_OI), -1, BLOCK).sum(dim=2)))
    (six_OB, error_of_six_OB), (four_OB, error_of_four_OB) = trials
    return torch.where(error_of_four_OB < error_of_six_OB, four_OB, six_OB)


def round_into(
    w_OI: Tensor, scales_OB: Tensor, group_scale: float, codes: Tensor, block_scale: Tensor
) -> None:
    """Fill the buffers of the row parts with the nearest codes under scales that are given."""
    for start in range(0, len(w_OI), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        step_OI = _steps(scales_OB[rows], group_scale)
        codes[rows].copy_(e2m1.pack(e2m1.encode(w_OI[rows] / step_OI)))
    block_scale.copy_(scales_OB)


def _steps(scales_OB: Tensor, group_scale: float) -> Tensor:
    step_OB = scales_OB.view(torch.float8_e4m3fn).float() * group_scale
    return step_OB.repeat_interleave(BLOCK, dim=1)


def _choose(
    w_OI: Tensor,
    factors_BKK: Tensor,
    least_BK: Tensor,
    group_scale: float,
    *,
    is_diagonal: bool = False,
) -> Tensor:
    scales_OB = torch.empty(len(w_OI), len(least_BK), dtype=torch.uint8)
    block_scales_cpu.choose_scales(
        w_OI.contiguous().numpy(),
        factors_BKK.float().contiguous().numpy(),
        least_BK.float().contiguous().numpy(),
        is_diagonal,
        np.float32(group_scale),
        scales_OB.numpy(),
    )
    return scales_OB
