# SPDX-License-Identifier: Apache-2.0
"""How a layout stacks the experts of a layer, one tensor for each part. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Numbers(NamedTuple):
    """How scales that are single numbers lie in one tensor: [E], unless it says otherwise."""

    suffix: str
    """What follows the stack's name in that of the tensor."""
    per_projection: bool = False
    """True: [E, projections], otherwise the projections share a number."""
    per_layer: bool = False
    """True: [], one number for all experts; of inputs, the largest."""
    factor: float = 1.0
    """The stored number over the scale."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The tensors that hold one or two projections of all experts of a layer.

    The row parts of a projection [out, …] become [E, projections · out, …], or, transposed,
    [E, …, projections · out].
    """

    name: str
    """The last name of the tensors, without the suffixes."""
    projections: tuple[str, ...]
    row_parts: Mapping[str, str]
    """Codes and block scales: part → what follows the name."""
    numbers: Mapping[str, Numbers]
    """Global scale and input scale, by part."""
    is_interleaved: bool = False
    """True if the rows of the projections alternate; otherwise they follow each other."""
    is_transposed: bool = False
    is_inside: bool = True
    """False if the tensors lie beside the experts module, and not in it."""

    def place(self, experts: str) -> str:
        """Return what the names of the tensors begin with, given the experts module's name."""
        module = experts if self.is_inside else experts.rpartition(".")[0]
        return f"{module}.{self.name}"

    def experts_of(self, key: str, part: str) -> str | None:
        """Return the experts module whose `part` the tensor `key` has by its name, if any."""
        suffix = self.row_parts[part]
        module, _, last = key.removesuffix(suffix).rpartition(".")
        experts = module if self.is_inside else f"{module}.experts"
        is_it = last == self.name and key.endswith(suffix) and experts.endswith("experts")
        return experts if is_it else None
