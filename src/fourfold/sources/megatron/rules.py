# SPDX-License-Identifier: Apache-2.0
"""Rules from Megatron's parameters to Hugging Face tensors: a pattern, a transform, targets.

A transform moves rows and nothing else, `PLUS_ONE` and `TRANSPOSED` excepted. Each Hugging Face
tensor is therefore a list of row ranges of parameters, in order, and a slab of it is read without
the rest. The same rules serve parameters in files and in memory.

    RENAME       all rows
    PLUS_ONE     all rows; Megatron keeps the weight of a norm as w − 1
    VOCABULARY   the first rows: those beyond the vocabulary pad it for tensor parallelism
    QKV          groups of n queries, a key and a value, a head each ─▶ q, k, v
    GATED_QKV    groups of n queries, their n gates, a key, a value ─▶ q (each head is followed by
                 its gate), k, v
    GATE_UP      the first half is the gate's, the second half up's
    PART         one of several that follow each other in one tensor
    STACK        one expert's, in a tensor of all experts; `part` if each expert has several
    TRANSPOSED   the same, in a tensor of all experts that is presented as [E, in, out]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from fourfold.errors import SourceError
from fourfold.sources.megatron.parameters import Parameter
from fourfold.sources.megatron.sizes import WRONG_CONFIG, Sizes

Rows = tuple[int, int]


class Transform(StrEnum):
    """The division of a parameter's rows among its targets."""

    RENAME = "rename"
    PLUS_ONE = "plus one"
    VOCABULARY = "vocabulary"
    QKV = "qkv"
    GATED_QKV = "gated qkv"
    GATE_UP = "gate_up"
    PART = "part"
    STACK = "stack"
    TRANSPOSED = "transposed stack"


_STACKS = (Transform.STACK, Transform.TRANSPOSED)


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters whose name, after that of their layer, matches `pattern` become `targets`.

    Targets name groups of the pattern in braces. `copies` are further names for the first target's
    rows, one for each MTP layer of the checkpoint.
    """

    pattern: str
    transform: Transform
    targets: tuple[str, ...]
    part: int = 0
    parts: int = 1
    copies: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.pattern} → {self.transform} → {', '.join(self.targets)}"


@dataclass(frozen=True, slots=True)
class Piece:
    """Row ranges of a parameter that make up a part of the Hugging Face tensor `target`."""

    target: str
    slot: tuple[int, ...]
    """The part's position in the tensor: its expert, if there is a stack of them; its number."""
    parameter: Parameter
    rows: tuple[Rows, ...]
    rule: Rule

    @property
    def is_stacked(self) -> bool:
        return self.rule.transform in _STACKS

    @property
    def is_transposed(self) -> bool:
        return self.rule.transform is Transform.TRANSPOSED

    @property
    def plus_one(self) -> bool:
        return self.rule.transform is Transform.PLUS_ONE


Cut = Callable[[Parameter, Sizes, Rule], Iterator[tuple[Rows, ...]]]
"""Yields the row ranges of a parameter for each target of a rule."""


def _all(parameter: Parameter, sizes: Sizes, rule: Rule) -> Iterator[tuple[Rows, ...]]:
    yield ((0, parameter.shape[0] if parameter.shape else 1),)


def _vocabulary(parameter: Parameter, sizes: Sizes, rule: Rule) -> Iterator[tuple[Rows, ...]]:
    if parameter.shape[0] < sizes.vocab:
        raise _misfit(parameter, rule, f"at least {sizes.vocab} rows, the vocabulary's")
    yield ((0, sizes.vocab),)


def _gate_up(parameter: Parameter, sizes: Sizes, rule: Rule) -> Iterator[tuple[Rows, ...]]:
    half, odd = divmod(parameter.shape[0], 2)
    if odd:
        raise _misfit(parameter, rule, "an even number of rows, half of them the gate's")
    yield ((0, half),)
    yield ((half, 2 * half),)


def _qkv(parameter: Parameter, sizes: Sizes, rule: Rule) -> Iterator[tuple[Rows, ...]]:
    n = sizes.heads // sizes.kv_heads
    return _heads(parameter, sizes, rule, n + 2, [(0, n)], [(n, n + 1)], [(n + 1, n + 2)])


def _gated_qkv(parameter: Parameter, sizes: Sizes, rule: Rule) -> Iterator[tuple[Rows, ...]]:
    n = sizes.heads // sizes.kv_heads
    gated = [(head, head + 1) for query in range(n) for head in (query, n + query)]
    key, value = [(2 * n, 2 * n + 1)], [(2 * n + 1, 2 * n + 2)]
    return _heads(parameter, sizes, rule, 2 * n + 2, gated, key, value)


def _heads(
    parameter: Parameter, sizes: Sizes, rule: Rule, count: int, *targets: list[tuple[int, int]]
) -> Iterator[tuple[Rows, ...]]:
    """For each target, the rows of its heads `start:stop` out of each group of `count` heads."""
    groups, size = sizes.kv_heads, sizes.head_dim
    if sizes.heads % groups or parameter.shape[0] != groups * count * size:
        wanted = f"{groups * count * size} rows: {groups} groups of {count} heads of {size}"
        raise _misfit(parameter, rule, wanted)
    for heads in targets:
        yield tuple(
            ((first + start) * size, (first + stop) * size)
            for first in range(0, groups * count, count)
            for start, stop in heads
        )


def _misfit(parameter: Parameter, rule: Rule, wanted: str) -> SourceError:
    return SourceError(
        f"{parameter.stored} {list(parameter.shape)}: the rule [{rule}] needs {wanted}. "
        f"{WRONG_CONFIG}"
    )


_CUTS: Mapping[Transform, Cut] = {
    Transform.VOCABULARY: _vocabulary,
    Transform.QKV: _qkv,
    Transform.GATED_QKV: _gated_qkv,
    Transform.GATE_UP: _gate_up,
}
"""Transforms that do not give all rows to one target."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the model: its parameters begin with `pattern`, their targets with `prefix`."""

    pattern: str
    prefix: str
    rules: tuple[Rule, ...]
    after_layers: bool = False
    """True if the numbers of its layers continue those of the decoder layers."""


@dataclass(frozen=True)
class RuleBook:
    """The rules of a model family."""

    sections: tuple[Section, ...]
    zero_centered_norms: bool = False
    """True if Hugging Face's model, too, multiplies by 1 + w in its norms."""
    vision: str = ""
    """The prefix of the vision tower's tensors, which a checkpoint of the language model alone
    lacks; empty for a family without one."""

    def pieces(self, parameter: Parameter, sizes: Sizes) -> Iterator[Piece]:
        """Yield the parts of Hugging Face tensors that a parameter becomes.

        Raises:
            SourceError: No rule matches, or more than one, or the parameter's shape does not fit.
        """
        matches = [
            (section, rule, start, match)
            for section in self.sections
            if (start := re.match(section.pattern, parameter.name)) is not None
            for rule in section.rules
            if (match := re.fullmatch(rule.pattern, parameter.name[start.end() :])) is not None
        ]
        if not matches:
            raise SourceError(
                f"{parameter.stored}: no rule for it: its name here is {parameter.name}. "
                "Is it of another family than `hf_config` says?"
            )
        if len(matches) > 1:
            rules = " and ".join(f"[{rule}]" for _, rule, _, _ in matches)
            raise SourceError(f"{parameter.stored}: more than one rule matches it: {rules}.")
        section, rule, start, match = matches[0]
        groups = {**start.groupdict(), **match.groupdict()}
        if section.after_layers:
            groups["l"] = str(int(groups["l"]) + sizes.layers)
        slot = (int(groups["e"]), rule.part) if rule.transform in _STACKS else (rule.part,)
        cuts = list(_CUTS.get(rule.transform, _all)(parameter, sizes, rule))
        for target, rows in zip(rule.targets, cuts, strict=True):
            yield Piece((section.prefix + target).format_map(groups), slot, parameter, rows, rule)
        for number in range(sizes.mtp_layers):
            for target in rule.copies:
                name = target.format_map({**groups, "mtp": sizes.layers + number})
                yield Piece(name, slot, parameter, cuts[0], rule)
