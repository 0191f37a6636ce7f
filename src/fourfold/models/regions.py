# SPDX-License-Identifier: Apache-2.0
"""The place of a matrix inside a raw tensor: slices, strides and transpositions, no copies.

A **region** is one logical matrix `[out, in]` (or one bias vector `[out]`) as a part of a tensor
on disk: a whole 2-D tensor, one expert of a fused 3-D tensor, a half of its rows or columns,
every second of them, possibly transposed.

transformers knows how a family's disk layout relates to the parameters in memory, as conversion
operations. We do not interpret these operations but probe them: they run on small integer tensors
whose entries are their own positions (`number`), and the region is read off the result (`locate`).
An operation that is not a plain slice, stride or transposition shows in the result as well, and is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourfold.errors import ModelError


@dataclass(frozen=True, slots=True)
class Region:
    """A matrix `[out, in]`, or a vector `[out]` where `cols` is None, inside the tensor `key`.

    `expert` indexes the first dimension of a fused tensor; it is None for other tensors.
    `rows` and `cols` are spans of the two last dimensions (of the last one for a vector), before
    the transposition that `transposed` asks for.
    """

    key: str
    expert: int | None
    rows: range
    cols: range | None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        if self.cols is None:
            return (len(self.rows),)
        shape = (len(self.rows), len(self.cols))
        return shape[::-1] if self.transposed else shape

    @property
    def slab(self) -> tuple[int, int]:
        """Start and stop of the range of the raw tensor's first dimension with this region."""
        if self.expert is not None:
            return self.expert, self.expert + 1
        return self.rows.start, self.rows.stop

    @property
    def is_plain(self) -> bool:
        """True if consecutive rows of the matrix are consecutive rows of the raw tensor."""
        return self.expert is None and not self.transposed and self.rows.step == 1

    @property
    def outputs(self) -> range:
        """The indices of the matrix's rows in the dimension of the raw tensor that has outputs."""
        return self.cols if self.transposed and self.cols is not None else self.rows

    def view(self, slab: torch.Tensor) -> torch.Tensor:
        """Return this region as a view of its slab."""
        rows = slab[:: self.rows.step] if self.expert is None else slab[0][as_slice(self.rows)]
        if self.cols is None:
            return rows
        matrix = rows[:, as_slice(self.cols)]
        return matrix.T if self.transposed else matrix


def as_slice(span: range) -> slice:
    """Return the slice that takes these indices."""
    return slice(span.start, span.stop, span.step)


def whole(key: str, shape: Sequence[int]) -> Region:
    """Return the region that covers a whole 2-D tensor."""
    rows, cols = shape
    return Region(key, None, range(rows), range(cols))


def number(shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return tensors of these shapes whose entries count 0, 1, 2, … through all of them."""
    tensors, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        tensors.append(torch.arange(start, start + size).reshape(tuple(shape)))
        start += size
    return tensors


def reduction(*shapes: Sequence[int]) -> int:
    """Return a divisor of every dimension of `shapes` that leaves at least 4 of each.

    Layouts are told apart on small stand-ins with the same proportions. Dimensions of 4 are enough
    to tell the second half (start 2) from every second element (start 1).
    """
    common = math.gcd(*(size for shape in shapes for size in shape))
    return max(common // 4, 1) if common % 4 == 0 else 1


@dataclass(frozen=True, slots=True)
class Located:
    """The place of a matrix: ordinal of the tensor, leading index, and spans."""

    ordinal: int
    lead: int | None
    rows: range
    cols: range | None
    transposed: bool


def locate(numbers: torch.Tensor, shapes: Sequence[Sequence[int]], scale: int) -> Located:
    """Find where `numbers`, cut out of a conversion of `number(shapes)`, came from.

    Args:
        numbers: `[out, in]`, or `[out]` for a bias.
        shapes: shapes of the numbered tensors.
        scale: how much larger the real tensors' dimensions are, except a leading expert dimension.

    Raises:
        ModelError: if it is not a plain strided part of one tensor.
    """
    bounds = torch.tensor([0, *(math.prod(shape) for shape in shapes)]).cumsum(0)
    ordinals = torch.bucketize(numbers.contiguous(), bounds[1:], right=True)
    ordinal = int(ordinals.reshape(-1)[0])
    shape = tuple(shapes[ordinal])
    axes = list(torch.unravel_index(numbers - bounds[ordinal], shape))
    if not bool((ordinals == ordinal).all()):
        raise _irregular()
    lead = None
    if len(axes) > numbers.ndim:
        lead = int(axes[0].reshape(-1)[0])
        if not bool((axes.pop(0) == lead).all()):
            raise _irregular()
        shape = shape[1:]
    if numbers.ndim == 1:
        return Located(ordinal, lead, _span(axes[0], shape[0], scale), None, False)
    transposed = numbers.shape[0] > 1 and bool((axes[0][0] == axes[0][1]).all())
    rows, cols = (axes[0].T, axes[1].T) if transposed else (axes[0], axes[1])
    if not bool((rows == rows[:, :1]).all() and (cols == cols[:1]).all()):
        raise _irregular()
    row_span = _span(rows[:, 0], shape[0], scale)
    return Located(ordinal, lead, row_span, _span(cols[0], shape[1], scale), transposed)


def _span(positions: torch.Tensor, size: int, scale: int) -> range:
    """`positions` in a dimension of `size` as a span, multiplied by `scale`."""
    first, count = int(positions[0]), len(positions)
    step = int(positions[1]) - first if count > 1 else 1
    if step < 1 or not bool((positions == first + step * torch.arange(count)).all()):
        raise _irregular()
    if step == 1:
        return range(first * scale, (first + count) * scale)
    if first >= step or count * step != size:
        raise _irregular()
    return range(first, size * scale, step)


def _irregular() -> ModelError:
    return ModelError("its layout on disk is not a plain slice, stride or transposition")
