# SPDX-License-Identifier: Apache-2.0
"""Finds the chunks of a stored tensor that hold a box of it.

The chunks of a tensor that many ranks saved are boxes of any size. Their boundaries divide each
dimension into spans. A tree with one level per dimension leads from the spans to the one chunk that
holds each cell. Building the tree proves that the chunks neither overlap nor leave a gap.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from fourfold.errors import SourceError
from fourfold.storage.source import Bytes

Box = tuple[tuple[int, int], ...]
"""For each dimension, the first element and the element after the last."""

DAMAGED = (
    "A rank's file is missing or belongs to another save: copy the checkpoint again, or save it "
    "again."
)


class Held(Protocol):
    """A box of a tensor, and the chunk that holds it."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def holder(self) -> str:
        """The file or rank that holds it, for messages."""


H = TypeVar("H", bound=Held)


@dataclass(frozen=True, slots=True)
class _Spans(Generic[H]):
    """One dimension of a part of a tensor: `below[i]` holds `bounds[i]:bounds[i + 1]`."""

    bounds: list[int]
    below: list[_Spans[H] | H]


class BoxIndex(Generic[H]):
    """The chunks of one tensor."""

    def __init__(
        self, key: str, shape: tuple[int, ...], chunks: Sequence[H], remedy: str = DAMAGED
    ) -> None:
        """Raise `SourceError` if chunks overlap, or do not hold all of the tensor `key`."""
        self._key, self._shape, self._remedy = key, shape, remedy
        self._root = self._build(list(chunks), 0, [])

    def _error(self, what: str) -> SourceError:
        return SourceError(f"{self._key} {list(self._shape)}: {what}. {self._remedy}")

    def _build(self, chunks: list[H], dim: int, above: list[str]) -> _Spans[H] | H:
        if dim == len(self._shape):
            if len(chunks) > 1:
                holders = " and ".join(sorted({chunk.holder for chunk in chunks})[:2])
                raise self._error(f"chunks overlap at [{', '.join(above)}], in {holders}")
            return chunks[0]
        ends = [(x.offsets[dim], x.offsets[dim] + x.sizes[dim]) for x in chunks]
        bounds = sorted({0, self._shape[dim], *(bound for pair in ends for bound in pair)})
        number_of = {bound: number for number, bound in enumerate(bounds)}
        inside: list[list[H]] = [[] for _ in bounds[1:]]
        for chunk, (start, stop) in zip(chunks, ends, strict=True):
            for span in inside[number_of[start] : number_of[stop]]:
                span.append(chunk)
        below = []
        for number, span in enumerate(inside):
            here = [*above, f"{bounds[number]}:{bounds[number + 1]}"]
            if not span:
                raise self._error(f"no chunk holds [{', '.join(here)}]")
            below.append(self._build(span, dim + 1, here))
        return _Spans(bounds, below)

    def cells(self, box: Box) -> Iterator[tuple[Box, H]]:
        """Yield the parts of `box` that lie in one chunk each, with the chunk."""
        yield from self._cells(self._root, box, ())

    def _cells(self, node: _Spans[H] | H, box: Box, cell: Box) -> Iterator[tuple[Box, H]]:
        if not isinstance(node, _Spans):
            yield cell, node
            return
        start, stop = box[len(cell)]
        number = bisect_right(node.bounds, start) - 1
        while number < len(node.below) and node.bounds[number] < stop:
            span = max(start, node.bounds[number]), min(stop, node.bounds[number + 1])
            if span[0] < span[1]:
                yield from self._cells(node.below[number], box, (*cell, span))
            number += 1

    def targets(self, box: Box, element: int, out: Bytes) -> Iterator[tuple[H, Box, Bytes]]:
        """Divide a buffer among the chunks that hold a box.

        Args:
            box: The elements that are wanted.
            element: Bytes of an element.
            out: A buffer for them, row-major.

        Yields:
            A chunk, the box of it that is wanted, counted from the chunk's own first element, and
            the view of `out` that this box belongs in: its last dimension is an element's bytes.
        """
        whole = out.reshape(*(stop - start for start, stop in box), element)
        for cell, chunk in self.cells(box):
            view = whole[
                tuple(
                    slice(start - first, stop - first)
                    for (start, stop), (first, _) in zip(cell, box, strict=True)
                )
            ]
            spans = zip(cell, chunk.offsets, strict=True)
            yield chunk, tuple((start - at, stop - at) for (start, stop), at in spans), view


@contextmanager
def contiguous(view: Bytes) -> Iterator[Bytes]:
    """Give a contiguous buffer of a view's size, the content of which ends up in the view."""
    if view.flags.c_contiguous:
        yield view.reshape(-1)
        return
    buffer = np.empty(view.size, dtype=np.uint8)
    yield buffer
    view[...] = buffer.reshape(view.shape)
