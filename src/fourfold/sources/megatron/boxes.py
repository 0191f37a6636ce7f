"""A stored tensor as boxes: which chunk holds which element, and that each element has one.

Chunks of a tensor that many ranks saved are boxes of any size. Their boundaries cut each dimension
into spans; a tree, one level for each dimension, leads from spans to the one chunk of a cell.
Building it proves that chunks neither overlap nor leave a gap.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from fourfold.errors import SourceError

Box = tuple[tuple[int, int], ...]
"""First element and the one past the last, of each dimension."""

DAMAGED = (
    "A rank's file is missing or belongs to another save: copy the checkpoint again, or save it "
    "again."
)


class Part(Protocol):
    """A box of a tensor, and what holds it."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def place(self) -> str:
        """What holds it, for messages."""


P = TypeVar("P", bound=Part)


@dataclass(frozen=True, slots=True)
class _Spans(Generic[P]):
    """One dimension of a part of a tensor: `bounds[i]:bounds[i + 1]` belongs to `below[i]`."""

    bounds: list[int]
    below: list[_Spans[P] | P]


class Boxes(Generic[P]):
    """The chunks of one tensor, found by what they hold."""

    def __init__(
        self, key: str, shape: tuple[int, ...], chunks: Sequence[P], remedy: str = DAMAGED
    ) -> None:
        """Raises `SourceError` where chunks overlap, or hold not all of the tensor."""
        self.key, self.shape, self.remedy = key, shape, remedy
        self._check_volume(chunks)
        self._root = self._build(list(chunks), 0, [])

    def _check_volume(self, chunks: Sequence[P]) -> None:
        """A first look, so that what cannot fit is not built."""
        volume = sum(math.prod(chunk.sizes) for chunk in chunks)
        count = len({chunk.offsets for chunk in chunks})
        if volume > math.prod(self.shape) or count < len(chunks):
            raise self._broken("chunks of it overlap")

    def _broken(self, what: str) -> SourceError:
        return SourceError(f"{self.key} {list(self.shape)}: {what}. {self.remedy}")

    def _build(self, chunks: list[P], dim: int, above: list[str]) -> _Spans[P] | P:
        if dim == len(self.shape):
            if len(chunks) > 1:
                names = " and ".join(sorted({chunk.place for chunk in chunks})[:2])
                raise self._broken(f"chunks overlap at [{', '.join(above)}], in {names}")
            return chunks[0]
        size = self.shape[dim]
        edges = {x.offsets[dim] for x in chunks} | {x.offsets[dim] + x.sizes[dim] for x in chunks}
        bounds = sorted(edges | {0, size})
        inside: list[list[P]] = [[] for _ in bounds[1:]]
        place = {bound: number for number, bound in enumerate(bounds)}
        for chunk in chunks:
            first, last = (place[chunk.offsets[dim] + x] for x in (0, chunk.sizes[dim]))
            for number in range(first, last):
                inside[number].append(chunk)
        below = []
        for number, found in enumerate(inside):
            here = [*above, f"{bounds[number]}:{bounds[number + 1]}"]
            if not found:
                raise self._broken(f"no chunk holds [{', '.join(here)}]")
            below.append(self._build(found, dim + 1, here))
        return _Spans(bounds, below)

    def cells(self, box: Box) -> Iterator[tuple[Box, P]]:
        """The parts of `box` that lie in one chunk each."""
        yield from self._cells(self._root, box, ())

    def _cells(self, node: _Spans[P] | P, box: Box, found: Box) -> Iterator[tuple[Box, P]]:
        if not isinstance(node, _Spans):
            yield found, node
            return
        start, stop = box[len(found)]
        number = bisect_right(node.bounds, start) - 1
        while number < len(node.below) and node.bounds[number] < stop:
            span = max(start, node.bounds[number]), min(stop, node.bounds[number + 1])
            if span[0] < span[1]:
                yield from self._cells(node.below[number], box, (*found, span))
            number += 1
