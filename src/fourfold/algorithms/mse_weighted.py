# SPDX-License-Identifier: Apache-2.0
"""Scales with the smallest squared error, each input weighted by its energy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fourfold.algorithms.base import Weight
from fourfold.algorithms.block_scales import BlockScales
from fourfold.algorithms.second_order import finite, shrunk
from fourfold.formats.nvfp4.block_scales import by_energy
from fourfold.statistics import MomentDiagonal


@dataclass(frozen=True)
class MSEWeighted(BlockScales):
    """Takes, of all scales that a block may have, the one with the smallest Σ E[x²]·(w − ŵ)²."""

    name = "mse_weighted"
    needs = frozenset({MomentDiagonal.name})

    def choose(self, w_OI: Tensor, weight: Weight, group_scale: float) -> Tensor:
        energy_I = finite(shrunk(weight.statistics, MomentDiagonal.name), weight.name)
        return by_energy(w_OI, energy_I, group_scale)
