# SPDX-License-Identifier: Apache-2.0
"""Hugging Face tensors as row ranges of Megatron's parameters.

The bytes of a tensor are divided into **lines**: a line is what one row of a parameter holds. A
matrix `[out, in]` has `out` lines, a stack `[E, out, in]` has E · out. To read a slab of either,
find the lines that it consists of, and read each range of them from its parameter.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from fourfold.errors import SourceError
from fourfold.sources.megatron.box_index import Box
from fourfold.sources.megatron.parameters import Parameter
from fourfold.sources.megatron.rules import Piece, RuleBook
from fourfold.sources.megatron.sizes import Sizes
from fourfold.storage.safetensors_header import BITS


@dataclass(frozen=True, slots=True)
class Range:
    """Rows `start:stop` of a parameter, which are a tensor's lines from `line` on."""

    line: int
    parameter: Parameter
    start: int
    stop: int

    @property
    def box(self) -> Box:
        """These rows as a box of the stored tensor."""
        index = tuple((number, number + 1) for number in self.parameter.index)
        if not self.parameter.shape:
            return index
        return *index, (self.start, self.stop), *((0, size) for size in self.parameter.shape[1:])


@dataclass(frozen=True, slots=True)
class AssembledTensor:
    """One Hugging Face tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    row_lines: int
    """Lines of one index of the first dimension."""
    line_bytes: int
    ranges: tuple[Range, ...]
    plus_one: bool
    """True if 1 is added to the values that are read."""
    is_transposed: bool = False
    """True if `shape` is [E, in, out], while an expert's lines are its [out, in]."""

    def within(self, first: int, last: int) -> Iterator[Range]:
        """Yield the ranges of lines `first:last`, cut off at both ends."""
        number = bisect_right(self.ranges, first, key=lambda rows: rows.line) - 1
        for rows in self.ranges[max(0, number) :]:
            if rows.line >= last:
                return
            skipped = max(0, first - rows.line)
            stop = min(rows.stop, rows.start + last - rows.line)
            if rows.start + skipped < stop:
                yield Range(rows.line + skipped, rows.parameter, rows.start + skipped, stop)


def assemble(
    parameters: Iterable[Parameter], book: RuleBook, sizes: Sizes
) -> Iterator[AssembledTensor]:
    """Yield every Hugging Face tensor that parameters make up.

    Raises:
        SourceError: A parameter has no rule, a tensor would be made twice, or a part of it is
            missing or does not fit the others.
    """
    tensors: dict[str, dict[tuple[int, ...], Piece]] = defaultdict(dict)
    for parameter in parameters:
        for piece in book.pieces(parameter, sizes):
            pieces = tensors[piece.target]
            other = pieces.setdefault(piece.slot, piece)
            first = _first(pieces)
            if other is not piece or _kind(first) != _kind(piece):
                other = other if other is not piece else first
                raise SourceError(
                    f"{piece.target}: made twice, of {other.parameter.stored} by [{other.rule}] "
                    f"and of {piece.parameter.stored} by [{piece.rule}]. Was the checkpoint saved "
                    "by one model?"
                )
    for name, pieces in tensors.items():
        yield _assembled(name, pieces, sizes)


def _first(pieces: Mapping[tuple[int, ...], Piece]) -> Piece:
    return next(iter(pieces.values()))


def _kind(piece: Piece) -> tuple[int, bool, bool, bool]:
    """The properties that all pieces of a tensor must have in common."""
    return piece.rule.parts, piece.is_stacked, piece.is_transposed, piece.plus_one


def _assembled(name: str, pieces: Mapping[tuple[int, ...], Piece], sizes: Sizes) -> AssembledTensor:
    first = _first(pieces)
    experts = 1
    if first.is_stacked:
        experts = sizes.experts or max(expert for expert, _ in pieces) + 1
    ordered = list(_in_order(name, pieces, first, experts))
    _check_alike(name, ordered)
    ranges = tuple(_ranges(ordered))
    lines = ranges[-1].line + ranges[-1].stop - ranges[-1].start
    parameter = first.parameter
    row = parameter.shape[1:]
    shape: tuple[int, ...] = (lines, *row) if parameter.shape else ()
    if first.is_stacked:
        if lines % experts:
            raise SourceError(f"{name}: its {experts} experts differ in size.")
        shape = (experts, lines // experts, *row)
        if first.is_transposed:
            shape = (experts, *row, lines // experts)
    return AssembledTensor(
        name=name,
        dtype=parameter.dtype,
        shape=shape,
        row_lines=lines // experts if first.is_stacked else 1,
        line_bytes=math.prod(row) * BITS[parameter.dtype] // 8,
        ranges=ranges,
        plus_one=first.plus_one,
        is_transposed=first.is_transposed,
    )


def _in_order(
    name: str, pieces: Mapping[tuple[int, ...], Piece], first: Piece, experts: int
) -> Iterator[Piece]:
    """The parts of a tensor, expert after expert if it is a stack of them."""
    for expert in range(experts):
        for part in range(first.rule.parts):
            slot = (expert, part) if first.is_stacked else (part,)
            if slot not in pieces:
                where = f"expert {expert}, " if first.is_stacked else ""
                raise SourceError(
                    f"{name}: {where}part {part + 1} of {first.rule.parts} is missing; the rule "
                    f"[{first.rule}] needs all of them. Is the checkpoint complete, and "
                    "`hf_config` its own?"
                )
            yield pieces[slot]


def _check_alike(name: str, pieces: list[Piece]) -> None:
    first = pieces[0].parameter
    for piece in pieces:
        other = piece.parameter
        if (other.dtype, other.shape[1:]) != (first.dtype, first.shape[1:]):
            raise SourceError(
                f"{name}: its parts do not fit: {first.stored} {first.dtype} {list(first.shape)}, "
                f"{other.stored} {other.dtype} {list(other.shape)}. The rule [{piece.rule}] joins "
                "them; was the checkpoint saved by one model?"
            )


def _ranges(pieces: Iterable[Piece]) -> Iterator[Range]:
    """The rows of pieces, one after the other."""
    line = 0
    for piece in pieces:
        for start, stop in piece.rows:
            yield Range(line, piece.parameter, start, stop)
            line += stop - start
