"""Hugging Face tensors as row ranges of Megatron's parameters.

All of a tensor's bytes are **lines**: what a row of a parameter holds. A matrix `[out, in]` has
`out` lines, a stack `[E, out, in]` has E·out. So one rule reads both: find the lines that a slab
needs, and read each range of them out of its parameter.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fourfold.errors import SourceError
from fourfold.sources.megatron.keys import Parameter
from fourfold.sources.megatron.rules import Piece, RuleBook
from fourfold.sources.megatron.sizes import Sizes
from fourfold.storage.safetensors_header import BITS


@dataclass(frozen=True, slots=True)
class Range:
    """Lines of a tensor from `line` on are rows `start:stop` of a parameter."""

    line: int
    parameter: Parameter
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Presented:
    """One Hugging Face tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    lines_each: int
    """Lines of one index of the first dimension."""
    line_bytes: int
    ranges: tuple[Range, ...]
    begins: tuple[int, ...]
    """The first line of each range."""
    plus_one: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def within(self, first: int, last: int) -> Iterator[Range]:
        """Lines `first:last`, as ranges that begin and end there."""
        number = max(0, bisect_right(self.begins, first) - 1)
        for each in self.ranges[number:]:
            if each.line >= last:
                return
            skipped = max(0, first - each.line)
            stop = min(each.stop, each.start + last - each.line)
            if each.start + skipped < stop:
                yield Range(each.line + skipped, each.parameter, each.start + skipped, stop)


def present(parameters: Iterable[Parameter], book: RuleBook, sizes: Sizes) -> Iterator[Presented]:
    """Every Hugging Face tensor that parameters make.

    Raises `SourceError` where a parameter has no rule, a tensor would be made twice, or a part of
    one is missing.
    """
    found: dict[str, dict[tuple[int, ...], Piece]] = defaultdict(dict)
    for parameter in parameters:
        for piece in book.pieces(parameter, sizes):
            other = found[piece.target].setdefault(piece.slot, piece)
            if other is not piece or _differ(found[piece.target], piece):
                raise _twice(piece, other if other is not piece else _first(found[piece.target]))
    for target, pieces in found.items():
        yield _present(target, pieces, sizes)


def _first(pieces: Mapping[tuple[int, ...], Piece]) -> Piece:
    return next(iter(pieces.values()))


def _differ(pieces: Mapping[tuple[int, ...], Piece], piece: Piece) -> bool:
    """Whether another rule sees the tensor otherwise: whole, or in other parts."""
    first = _first(pieces)
    return (first.of, first.is_stacked, first.plus_one) != (
        piece.of, piece.is_stacked, piece.plus_one,
    )  # fmt: skip


def _twice(piece: Piece, other: Piece) -> SourceError:
    return SourceError(
        f"{piece.target}: made twice, of {other.parameter.stored} by [{other.rule}] and of "
        f"{piece.parameter.stored} by [{piece.rule}]. Was the checkpoint saved by one model?"
    )


def _present(target: str, pieces: Mapping[tuple[int, ...], Piece], sizes: Sizes) -> Presented:
    first = _first(pieces)
    experts = (sizes.experts or _most(pieces)) if first.is_stacked else 1
    ordered = list(_in_order(target, pieces, first, experts))
    _check_alike(target, ordered)
    ranges = tuple(_ranges(ordered))
    lines = sum(each.stop - each.start for each in ranges)
    parameter = first.parameter
    row = parameter.shape[1:]
    shape: tuple[int, ...] = (lines, *row) if parameter.shape else ()
    if first.is_stacked:
        if lines % experts:
            raise SourceError(f"{target}: its {experts} experts differ in size.")
        shape = (experts, lines // experts, *row)
    return Presented(
        name=target,
        dtype=parameter.dtype,
        shape=shape,
        lines_each=lines // experts if first.is_stacked else 1,
        line_bytes=math.prod(row) * BITS[parameter.dtype] // 8,
        ranges=ranges,
        begins=tuple(each.line for each in ranges),
        plus_one=first.plus_one,
    )


def _in_order(
    target: str, pieces: Mapping[tuple[int, ...], Piece], first: Piece, experts: int
) -> Iterator[Piece]:
    """The parts of a tensor, one expert after the other where it is a stack of them."""
    for expert in range(experts):
        for part in range(first.of):
            slot = (expert, part) if first.is_stacked else (part,)
            if slot not in pieces:
                what = f"part {part + 1} of {first.of}"
                where = f"expert {expert}, {what}" if first.is_stacked else what
                raise SourceError(
                    f"{target}: {where} is missing; the rule [{first.rule}] needs all of them. "
                    "Is the checkpoint complete, and --hf-config its own?"
                )
            yield pieces[slot]


def _most(pieces: Mapping[tuple[int, ...], Piece]) -> int:
    return max(slot[0] for slot in pieces) + 1


def _check_alike(target: str, pieces: list[Piece]) -> None:
    first = pieces[0].parameter
    for piece in pieces:
        other = piece.parameter
        if (other.dtype, other.shape[1:]) != (first.dtype, first.shape[1:]):
            raise SourceError(
                f"{target}: its parts do not fit: {first.stored} {first.dtype} "
                f"{list(first.shape)}, {other.stored} {other.dtype} {list(other.shape)}. "
                f"The rule [{piece.rule}] joins them; was the checkpoint saved by one model?"
            )


def _ranges(pieces: Iterable[Piece]) -> Iterator[Range]:
    """The rows of pieces one after the other; neighbours are joined."""
    line, last = 0, None
    for piece in pieces:
        for start, stop in piece.rows:
            is_next = last is not None and last.parameter is piece.parameter and last.stop == start
            if is_next and last is not None:
                last = Range(last.line, last.parameter, last.start, stop)
            else:
                if last is not None:
                    yield last
                last = Range(line, piece.parameter, start, stop)
            line += stop - start
    if last is not None:
        yield last
