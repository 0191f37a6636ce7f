# SPDX-License-Identifier: Apache-2.0
"""Four Over Six (arXiv 2512.02010): a block's largest magnitude becomes a 6 or a 4."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fourfold.algorithms.base import Weight
from fourfold.algorithms.block_scales import BlockScales
from fourfold.formats.nvfp4.block_scales import four_or_six


@dataclass(frozen=True)
class FourOverSix(BlockScales):
    """Takes the better of amax/6 and amax/4, by the squared error of the weight; no data is needed.

    Under amax/4 the codes 6 and 5 are not used, and those next to the largest are closer.
    """

    name = "four_over_six"

    def choose(self, w_OI: Tensor, weight: Weight, group_scale: float) -> Tensor:
        return four_or_six(w_OI, group_scale)
