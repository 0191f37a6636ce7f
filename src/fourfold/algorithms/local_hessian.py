# SPDX-License-Identifier: Apache-2.0
"""Scales with the smallest error in the outputs, as far as the inputs of one block tell."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fourfold.algorithms.base import Weight
from fourfold.algorithms.block_scales import BlockScales
from fourfold.algorithms.second_order import finite, shrunk
from fourfold.formats.nvfp4.block_scales import by_form, damped
from fourfold.statistics import MomentBlocks


@dataclass(frozen=True)
class LocalHessian(BlockScales):
    """Takes, of all scales that a block may have, the one with the smallest Δ·H_bb·Δᵀ, where Δ is
    the error of the block and H_bb the second moment of its inputs."""

    name = "local_hessian"
    needs = frozenset({MomentBlocks.name})

    damping: float = 0.01
    """The part of its mean diagonal that is added to a moment."""

    def choose(self, w_OI: Tensor, weight: Weight, group_scale: float) -> Tensor:
        h_BKK = finite(shrunk(weight.statistics, MomentBlocks.name), weight.name)
        return by_form(w_OI, damped(h_BKK, self.damping), group_scale)
