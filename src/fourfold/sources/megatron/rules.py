"""From Megatron's parameters to Hugging Face tensors: a rule is a pattern and a transform.

A transform moves rows, and nothing else (`PLUS_ONE` excepted): each Hugging Face tensor is a list
of row ranges of parameters, in order. So a slab is read without the rest, and the same rules serve
whatever holds the parameters.

    RENAME       all rows
    PLUS_ONE     all rows; Megatron keeps the weight of a norm as w − 1
    VOCABULARY   the first rows: those beyond the vocabulary pad it for tensor parallelism
    QKV          groups of n queries, a key and a value, a head each ─▶ q, k, v
    GATED_QKV    groups of n queries, their n gates, a key, a value ─▶ q (head by head, its gate
                 after it), k, v
    GATE_UP      the first half is the gate's, the second half up's
    PART         one of several that follow each other in one tensor
    STACK        one expert's, in a tensor of all experts; `part` where it has several
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from fourfold.errors import SourceError
from fourfold.sources.megatron.keys import Parameter
from fourfold.sources.megatron.sizes import OWN, Sizes

Rows = tuple[int, int]


class Transform(StrEnum):
    """What becomes of a parameter's rows."""

    RENAME = "rename"
    PLUS_ONE = "plus one"
    VOCABULARY = "vocabulary"
    QKV = "qkv"
    GATED_QKV = "gated qkv"
    GATE_UP = "gate_up"
    PART = "part"
    STACK = "stack"


@dataclass(frozen=True, slots=True)
class Rule:
    """Parameters whose name `pattern` matches (after the layer's own) become `targets`.

    Targets name the pattern's groups in braces. `copies` are further names for the same rows, of
    each MTP layer that the checkpoint has.
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
    """Row ranges of a parameter that are a part of a Hugging Face tensor: `slot` in its order."""

    target: str
    slot: tuple[int, ...]
    parameter: Parameter
    rows: tuple[Rows, ...]
    rule: Rule
    of: int = 1
    """How many parts the rule says there are: in the tensor, or in each expert's part of it."""
    is_stacked: bool = False
    plus_one: bool = False


Cut = Callable[[Parameter, Sizes, Rule], Iterator[tuple[Rows, ...]]]
"""The row ranges of a parameter for each of a rule's targets."""


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
    heads, size = sizes.heads // sizes.kv_heads, sizes.head_dim
    _check_heads(parameter, sizes, rule, heads + 2)
    starts = [group * (heads + 2) * size for group in range(sizes.kv_heads)]
    yield tuple((at, at + heads * size) for at in starts)
    yield tuple((at + heads * size, at + (heads + 1) * size) for at in starts)
    yield tuple((at + (heads + 1) * size, at + (heads + 2) * size) for at in starts)


def _gated_qkv(parameter: Parameter, sizes: Sizes, rule: Rule) -> Iterator[tuple[Rows, ...]]:
    heads, size = sizes.heads // sizes.kv_heads, sizes.head_dim
    _check_heads(parameter, sizes, rule, 2 * heads + 2)
    starts = [group * (2 * heads + 2) * size for group in range(sizes.kv_heads)]
    yield tuple(
        (at + head * size, at + (head + 1) * size)
        for at in starts
        for query in range(heads)
        for head in (query, heads + query)
    )
    key, value = 2 * heads, 2 * heads + 1
    yield tuple((at + key * size, at + (key + 1) * size) for at in starts)
    yield tuple((at + value * size, at + (value + 1) * size) for at in starts)


def _check_heads(parameter: Parameter, sizes: Sizes, rule: Rule, in_group: int) -> None:
    wanted = sizes.kv_heads * in_group * sizes.head_dim
    if sizes.heads % sizes.kv_heads or parameter.shape[0] != wanted:
        raise _misfit(
            parameter,
            rule,
            f"{wanted} rows: {sizes.kv_heads} groups of {in_group} heads of {sizes.head_dim}",
        )


def _misfit(parameter: Parameter, rule: Rule, wanted: str) -> SourceError:
    return SourceError(
        f"{parameter.stored} {list(parameter.shape)}: the rule [{rule}] wants {wanted}. {OWN}"
    )


_CUTS: Mapping[Transform, Cut] = {
    Transform.RENAME: _all,
    Transform.PLUS_ONE: _all,
    Transform.VOCABULARY: _vocabulary,
    Transform.QKV: _qkv,
    Transform.GATED_QKV: _gated_qkv,
    Transform.GATE_UP: _gate_up,
    Transform.PART: _all,
    Transform.STACK: _all,
}


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the model: names begin with `pattern`, those of its targets with `prefix`."""

    pattern: str
    prefix: str
    rules: tuple[Rule, ...]
    after_layers: bool = False
    """Whether its layers are numbered on from the last decoder layer."""


@dataclass(frozen=True)
class RuleBook:
    """The rules of a family."""

    sections: tuple[Section, ...]
    zero_centered_norms: bool = False
    """Whether Hugging Face's model, too, multiplies with 1 + w in its norms."""
    proof: str = ""
    """How we know."""

    def pieces(self, parameter: Parameter, sizes: Sizes) -> Iterator[Piece]:
        """What a parameter becomes.

        Raises `SourceError` where no rule matches, or more than one, or its shape does not fit.
        """
        found = [
            (section, rule, start, match)
            for section in self.sections
            if (start := re.match(section.pattern, parameter.name)) is not None
            for rule in section.rules
            if (match := re.fullmatch(rule.pattern, parameter.name[start.end() :])) is not None
        ]
        if not found:
            raise SourceError(
                f"{parameter.stored}: no rule for it: its name here is {parameter.name}. "
                "Is it of another family than --hf-config says?"
            )
        if len(found) > 1:
            rules = " and ".join(f"[{rule}]" for _, rule, _, _ in found)
            raise SourceError(f"{parameter.stored}: more than one rule matches it: {rules}.")
        section, rule, start, match = found[0]
        groups = {name: value for name, value in start.groupdict().items() if value is not None}
        if "l" in groups and section.after_layers:
            groups["l"] = str(int(groups["l"]) + sizes.layers)
        groups |= {name: value for name, value in match.groupdict().items() if value is not None}
        cuts = list(_CUTS[rule.transform](parameter, sizes, rule))
        for target, rows in zip(rule.targets, cuts, strict=True):
            yield _piece(section.prefix + target, groups, parameter, rows, rule)
        for number in range(sizes.mtp_layers):
            for target in rule.copies:
                numbered = {**groups, "mtp": str(sizes.layers + number)}
                yield _piece(target, numbered, parameter, cuts[0], rule)


def _piece(
    target: str, groups: Mapping[str, str], parameter: Parameter, rows: tuple[Rows, ...], rule: Rule
) -> Piece:
    is_stacked = rule.transform is Transform.STACK
    slot = (int(groups["e"]), rule.part) if is_stacked else (rule.part,)
    plus_one = rule.transform is Transform.PLUS_ONE
    name = target.format_map(groups)
    return Piece(name, slot, parameter, rows, rule, rule.parts, is_stacked, plus_one)
