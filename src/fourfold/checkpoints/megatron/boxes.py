"""A stored tensor as boxes: which chunk holds which element, and that each element has one.

Chunks of a tensor that many ranks saved are boxes of any size. Their boundaries cut each dimension
into spans; a tree, one level for each dimension, leads from spans to the one chunk of a cell.
Building it proves that chunks neither overlap nor leave a gap.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from fourfold.checkpoints.megatron.chunks import Chunk
from fourfold.checkpoints.megatron.metadata import StoredTensor
from fourfold.errors import SourceError

Box = tuple[tuple[int, int], ...]
"""First element and the one past the last, of each dimension."""


@dataclass(frozen=True, slots=True)
class _Spans:
    """One dimension of a part of a tensor: `bounds[i]:bounds[i + 1]` belongs to `below[i]`."""

    bounds: list[int]
    below: list[_Spans | Chunk]


class Boxes:
    """The chunks of one tensor, found by what they hold."""

    def __init__(self, tensor: StoredTensor) -> None:
        """Raises `SourceError` where chunks overlap, or hold not all of the tensor."""
        self.tensor = tensor
        self._check_volume()
        self._root = self._build(list(tensor.chunks), 0, [])

    def _check_volume(self) -> None:
        """A first look, so that what cannot fit is not built."""
        volume = sum(math.prod(chunk.sizes) for chunk in self.tensor.chunks)
        count = len({chunk.offsets for chunk in self.tensor.chunks})
        if volume > math.prod(self.tensor.shape) or count < len(self.tensor.chunks):
            raise self._broken("chunks of it overlap")

    def _broken(self, what: str) -> SourceError:
        tensor = self.tensor
        return SourceError(
            f"{tensor.key} {list(tensor.shape)}: {what}. A rank's file is missing or belongs to "
            "another save: copy the checkpoint again, or save it again."
        )

    def _build(self, chunks: list[Chunk], dim: int, above: list[str]) -> _Spans | Chunk:
        if dim == len(self.tensor.shape):
            if len(chunks) > 1:
                names = " and ".join(sorted({chunk.file.name for chunk in chunks})[:2])
                raise self._broken(f"chunks overlap at [{', '.join(above)}], in {names}")
            return chunks[0]
        size = self.tensor.shape[dim]
        edges = {x.offsets[dim] for x in chunks} | {x.offsets[dim] + x.sizes[dim] for x in chunks}
        bounds = sorted(edges | {0, size})
        inside: list[list[Chunk]] = [[] for _ in bounds[1:]]
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

    def cells(self, box: Box) -> Iterator[tuple[Box, Chunk]]:
        """The parts of `box` that lie in one chunk each."""
        yield from self._cells(self._root, box, ())

    def _cells(self, node: _Spans | Chunk, box: Box, found: Box) -> Iterator[tuple[Box, Chunk]]:
        if isinstance(node, Chunk):
            yield found, node
            return
        start, stop = box[len(found)]
        number = bisect_right(node.bounds, start) - 1
        while number < len(node.below) and node.bounds[number] < stop:
            span = max(start, node.bounds[number]), min(stop, node.bounds[number + 1])
            if span[0] < span[1]:
                yield from self._cells(node.below[number], box, (*found, span))
            number += 1
