# SPDX-License-Identifier: Apache-2.0
"""The part that algorithms share which choose the scale of each block by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fourfold.algorithms.base import Algorithm, Figures, Weight
from fourfold.formats.base import WeightFormat
from fourfold.formats.nvfp4.block_scales import group_scale_and_unit, round_into
from fourfold.formats.nvfp4.format import BLOCK_SCALE, CODES, NVFP4


@dataclass(frozen=True)
class BlockScales(Algorithm):
    """An algorithm for NVFP4 that chooses each block's scale by itself, and the nearest codes."""

    range: int = 256
    """The block scale of the largest block: the group scale is amax/(6·range)."""

    def supports(self, fmt: WeightFormat) -> bool:
        return isinstance(fmt, NVFP4)

    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        amaxes = [fmt.amax(weight.matrix_OI, name=weight.name) for weight in weights]
        group_scale, unit = group_scale_and_unit(max(amaxes), self.range)
        figures = []
        for weight, amax in zip(weights, amaxes, strict=True):
            w_OI, in_units = weight.matrix_OI.float() / unit, group_scale / unit
            scales_OB = self.choose(w_OI, weight, in_units)
            round_into(w_OI, scales_OB, in_units, weight.out[CODES], weight.out[BLOCK_SCALE])
            figures.append(Figures(amax, *fmt.error(weight.matrix_OI, weight.out, group_scale)))
        return group_scale, figures

    @abstractmethod
    def choose(self, w_OI: Tensor, weight: Weight, group_scale: float) -> Tensor:
        """Return the scales `[O, B]`, uint8, of a weight, float32, under a group scale."""
