# SPDX-License-Identifier: Apache-2.0
"""`amax`: the largest magnitude of the input. F32, `[]` or `[E]`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.statistics.base import Reduction, Site, State, Statistic


class Amax(Statistic):
    """The largest magnitude of the rows that reached a site; 0 where there were none.

    NaN becomes Inf, so that a maximum keeps it and the end of the layer finds it.
    """

    name = "amax"
    reduction: Reduction = "max"

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {self.name: (torch.float32, site.lead)}

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        amax = state[self.name]
        amax_R = torch.linalg.vector_norm(rows, math.inf, dim=-1).float()
        amax_R = amax_R.nan_to_num(nan=math.inf, posinf=math.inf)
        if experts is None:
            torch.maximum(amax, amax_R.max(), out=amax)
            return
        if experts.ndim == 2:
            amax_R = amax_R[:, None].expand(experts.shape)
        is_routed = experts >= 0
        amax.scatter_reduce_(0, experts[is_routed], amax_R[is_routed], "amax")
