# SPDX-License-Identifier: Apache-2.0
"""`tokens`: how many tokens were routed to each expert, or rows a linear layer saw. I64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.statistics.base import Reduction, Site, State, Statistic


class Tokens(Statistic):
    """The number of rows that reached a site; of an experts module, the input of gate and up."""

    name = "tokens"
    reduction: Reduction = "sum"
    is_routing = True
    products = frozenset({"gate_up"})

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {self.name: (torch.int64, site.lead)}

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        tokens = state[self.name]
        if experts is None:
            tokens += len(rows)
        else:
            tokens += torch.bincount(experts[experts >= 0], minlength=len(tokens))
