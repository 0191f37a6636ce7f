# SPDX-License-Identifier: Apache-2.0
"""The interface of a statistic, and of the place where it is accumulated.

Shapes: R rows, I input features, E experts, K experts of one row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "max"]

State = dict[str, Tensor]
"""The tensors of a statistic at one site, by name. Each name is the statistic's own, or begins
with it and a dot, so that the states of several statistics can share one dictionary."""


@dataclass(frozen=True)
class Site:
    """One place where a model reads activations that are observed.

    Attributes:
        name: A linear layer's module path, `<experts module>.gate_up`, `<experts module>.down`, or
            `<decoder layer>.kv`.
        width: Number of input features, I.
        experts: Number of experts, E; None for a linear layer. The keys and values of a KV cache
            count as experts 0 and 1.
    """

    name: str
    width: int
    experts: int | None = None

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading shape of every tensor of a state: `()` or `(E,)`."""
        return () if self.experts is None else (self.experts,)


class Statistic(ABC):
    """Something that is accumulated over the rows that reach a site.

    A statistic has no state of its own: one object serves every site of every model.
    """

    name: str
    """The name in `STATISTICS`, and the beginning of the name of every tensor of a state."""

    reduction: Reduction
    """The operation that combines two states of the same site. Every row counts once in a sum: the
    statistic is shown a product that is computed in two parts only once."""

    is_routing: bool = False
    """True for a sum that describes the router: it does not count the tokens that the recipe's
    `all_experts` shows to experts they are not routed to."""

    products: frozenset[str] | None = None
    """The inputs that it observes in an experts module (`gate_up`, `down`) and a KV cache (`kv`);
    None for all of them."""

    @abstractmethod
    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each tensor of a state, by the tensor's name."""

    @abstractmethod
    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        """Accumulate rows into a state, in place. Padding has been removed from the rows.

        Args:
            state: What `new` gave, on the device of `rows`; one that is not among `KEPT` may be on
                the CPU, wherever the rows are.
            rows: `[R, I]`, in the dtype of the model.
            experts: int64 `[R]` or `[R, K]`, the experts that read each row; negative entries
                count for no expert. None at the site of a linear layer, where every row counts.
        """

    def new(self, site: Site, device: torch.device | str = "cpu") -> State:
        """Return the state of a site that no row has reached: all zeros."""
        shapes = self.shapes(site)
        return {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (dtype, shape) in shapes.items()
        }

    def merge(self, first: State, second: State) -> State:
        """Return the state of all the rows that either state has seen, as `reduction` says."""
        operation = torch.maximum if self.reduction == "max" else torch.add
        return {name: operation(tensor, second[name]) for name, tensor in first.items()}

    def finish(self, state: State) -> State:
        """Return what algorithms read of a state that all rows have reached, of all ranks."""
        return state

    def of_expert(self, state: State, expert: int) -> State:
        """Return the part of a finished state that is of one expert."""
        return {name: tensor[expert] for name, tensor in state.items()}

    def nbytes(self, site: Site) -> int:
        """Return the bytes of a state."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.shapes(site).values())
