# SPDX-License-Identifier: Apache-2.0
"""The definition of what `block_scales` chooses: all 126 candidates, in float64 and plain PyTorch.

The kernel computes in float32. The reference says which choices are **decided**: those for which no
other candidate comes within reach of rounding. Where a quotient lies next to a midpoint of the
grid, float32 may round it the other way; |Δ| is the same then, so that the loss of such a candidate
is not below λ·Σ(|Δ_k| − reach)², with what `least_BK` says.

Shapes: O outputs, I inputs, B blocks, K columns of a block, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.formats.nvfp4 import e2m1, e4m3

BLOCK = 16
_U = 2.0**-23
_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)


def choose(
    w_OI: Tensor, factors_BKK: Tensor, least_BK: Tensor, group_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the scales `[O, B]`, uint8, and which of them are decided.

    Args:
        w_OI: float32.
        factors_BKK: float32, C of each block: its form is C·Cᵀ.
        least_BK: float32; the loss is not below Σ least_k·Δ_k².
        group_scale: The group scale.
    """
    w_OBK, factors_BKK = w_OI.double().view(len(w_OI), -1, BLOCK), factors_BKK.double()
    losses, reaches, leasts = [], [], []
    for step in (e4m3.E4M3_POSITIVE * torch.tensor(group_scale)).double():
        ratio_OBK = w_OBK.abs() / step
        error_OBK = w_OBK.abs() - e2m1.decode(e2m1.round_magnitude(ratio_OBK)).double() * step
        y_OBK = _times(error_OBK * w_OBK.sign(), factors_BKK)
        of_error_OBK = 4 * _U * (w_OBK.abs() + error_OBK.abs())
        of_y_OBK = _times(of_error_OBK + BLOCK * _U * error_OBK.abs(), factors_BKK.abs())
        loss_OB = y_OBK.square().sum(dim=2)
        reach_OB = ((2 * y_OBK.abs() + of_y_OBK) * of_y_OBK).sum(dim=2) + BLOCK * _U * loss_OB
        distance_OBK = (ratio_OBK[..., None] - _MIDPOINTS).abs().amin(dim=-1)
        is_near_OB = (distance_OBK <= 4 * _U * ratio_OBK).any(dim=2)
        sure_OBK = (error_OBK.abs() - 2 * of_error_OBK).clamp(min=0)
        least_OB = (least_BK.double() * sure_OBK.square()).sum(dim=2) * (1 - BLOCK * _U)
        losses.append(loss_OB)
        reaches.append(torch.where(is_near_OB, torch.inf, reach_OB))
        leasts.append(torch.where(is_near_OB, least_OB, loss_OB - reach_OB))
    loss_OBC, reach_OBC, least_OBC = (torch.stack(x, dim=-1) for x in (losses, reaches, leasts))
    is_least_OBC = loss_OBC == loss_OBC.amin(dim=-1, keepdim=True)
    best_OB1 = is_least_OBC.to(torch.uint8).argmax(dim=-1, keepdim=True)
    most_OB1 = (loss_OBC + reach_OBC).gather(-1, best_OB1)
    rivals_OB = (least_OBC <= most_OB1).sum(dim=-1)
    return (best_OB1[..., 0] + 1).to(torch.uint8), rivals_OB == 1


def _times(error_OBK: Tensor, factors_BKK: Tensor) -> Tensor:
    return torch.einsum("obk,bkj->obj", error_OBK, factors_BKK)
