# SPDX-License-Identifier: Apache-2.0
"""GPTQ with scales that are chosen beforehand, and descent after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.algorithms.second_order import SecondOrder
from fourfold.formats.nvfp4.second_order import Rounded, descend
from fourfold.formats.nvfp4.second_order_batched import RoundedBatch


@dataclass(frozen=True)
class GPTQ(SecondOrder):
    """Rounds with compensation under the scales of `local_hessian`."""

    name = "gptq"

    descent: int = 0
    """Sweeps in which codes and scales of each block are chosen again, given all others."""

    def choose(self, weights: Sequence[Rounded], group_scale: float) -> float:
        for weight in weights:
            weight.round(group_scale, weight.static_scales(group_scale))
        return descend(weights, group_scale, self.descent)

    def choose_stack(self, batch: RoundedBatch) -> None:
        batch.round(batch.static_scales())
        batch.descend(self.descent)
