"""What a summary document (`quant_summary.json`) holds, typed and ready to be shown.

A document may come from an older fourfold, or from anybody: a key that is missing or of another
kind is absent, never an error. Text is printable, so that a name can neither move a terminal's
cursor nor turn the direction of a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"(?:^|(?<!mtp)\.)(?:layers|blocks|h)\.(\d{1,9})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Linear:
    """One quantized linear weight."""

    name: str
    role: str
    shape: tuple[int, ...]
    format: str
    layer: int | None
    expert: int | None
    global_scale: float | None
    amax: float | None
    input_amax: float | None
    input_scale: float | None
    tokens: int | None
    relative_error: float | None


@dataclass(frozen=True, slots=True)
class Ledger:
    """How many were planned, quantized, written; None where the document does not say."""

    source_tensors: int | None
    linear_weights_planned: int | None
    linear_weights_quantized: int | None
    tensors_written: int | None
    bytes_before: int | None
    bytes_after: int | None


@dataclass(frozen=True, slots=True)
class RoleSizes:
    """The bytes of one role before and after."""

    role: str
    what: str
    tensors: int
    linear_weights: int
    bytes_before: int
    bytes_after: int
    numel: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the activations were observed on."""

    origin: str
    digest: str
    samples: int | None
    seq: int | None
    tokens: int | None
    all_experts: bool
    unreached_experts: int | None


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """How many calibration tokens each expert of one layer saw."""

    module: str
    layer: int | None
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVScale:
    """The calibrated scales of one layer's keys and values."""

    name: str
    layer: int | None
    k_scale: float | None
    v_scale: float | None


@dataclass(frozen=True, slots=True)
class Document:
    """A summary document."""

    producer: str
    model: str
    model_type: str
    architecture: str
    recipe: Mapping[str, Any]
    versions: tuple[tuple[str, str], ...]
    ledger: Ledger
    roles: tuple[RoleSizes, ...]
    calibration: Calibration | None
    experts: tuple[ExpertTokens, ...]
    kv_cache: tuple[KVScale, ...]
    linears: tuple[Linear, ...]
    """By layer, then by name with its numbers as numbers; those outside of layers last."""

    @property
    def recipe_name(self) -> str:
        """The recipe's name, or the word itself."""
        return text(self.recipe.get("name")) or "recipe"


def read_document(summary: Mapping[str, Any]) -> Document:
    """`summary`, typed."""
    recipe = summary.get("recipe")
    return Document(
        producer=text(summary.get("producer")) or "fourfold",
        model=text(summary.get("model")),
        model_type=text(summary.get("model_type")),
        architecture=text(summary.get("architecture")),
        recipe=recipe if isinstance(recipe, dict) else {},
        versions=tuple(_versions(summary.get("versions"))),
        ledger=_ledger(summary.get("ledger")),
        roles=tuple(map(_role, _mappings(summary.get("roles")))),
        calibration=_calibration(summary.get("calibration")),
        experts=tuple(map(_experts, _mappings(summary.get("experts")))),
        kv_cache=tuple(map(_kv_scale, _mappings(summary.get("kv_cache")))),
        linears=tuple(sorted(map(_linear, _mappings(summary.get("linears"))), key=_by_layer)),
    )


def text(value: object) -> str:
    """A string with what cannot be printed escaped; nothing for another kind."""
    if not isinstance(value, str):
        return ""
    if value.isprintable():
        return value
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in value)


def number(value: object) -> float | None:
    """A JSON number as a float; None for another kind, or an integer beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def count(value: object) -> int | None:
    """A count, or None: negative ones and those past 2⁶³ count nothing."""
    fine = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return value if fine else None  # type: ignore[return-value]


def _mappings(value: object) -> Iterator[Mapping[str, Any]]:
    return (
        (each for each in value if isinstance(each, dict)) if isinstance(value, list) else iter(())
    )


def _versions(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        yield from ((text(name), text(version)) for name, version in value.items())


def _ledger(value: object) -> Ledger:
    found = value if isinstance(value, dict) else {}
    return Ledger(*(count(found.get(name)) for name in Ledger.__slots__))


def _role(entry: Mapping[str, Any]) -> RoleSizes:
    names = ("tensors", "linear_weights", "bytes_before", "bytes_after", "numel")
    figures = (count(entry.get(name)) or 0 for name in names)
    return RoleSizes(text(entry.get("role")), text(entry.get("what")), *figures)


def _calibration(value: object) -> Calibration | None:
    if not isinstance(value, dict):
        return None
    return Calibration(
        origin=text(value.get("origin")),
        digest=text(value.get("digest")),
        samples=count(value.get("samples")),
        seq=count(value.get("seq")),
        tokens=count(value.get("tokens")),
        all_experts=value.get("all_experts") is True,
        unreached_experts=count(value.get("unreached_experts")),
    )


def _experts(entry: Mapping[str, Any]) -> ExpertTokens:
    module, tokens = text(entry.get("module")), entry.get("tokens")
    seen = [count(each) or 0 for each in tokens] if isinstance(tokens, list) else []
    return ExpertTokens(module, _layer_of_module(entry, module), tuple(seen))


def _kv_scale(entry: Mapping[str, Any]) -> KVScale:
    name = text(entry.get("name"))
    layer = _layer_of_module(entry, name)
    return KVScale(name, layer, number(entry.get("k_scale")), number(entry.get("v_scale")))


def _layer_of_module(entry: Mapping[str, Any], name: str) -> int | None:
    told = count(entry.get("layer"))
    return _place({}, "layer", _LAYER, f"{name}.") if told is None else told


def _linear(entry: Mapping[str, Any]) -> Linear:
    name, shape = text(entry.get("name")), entry.get("shape")
    sizes = [count(each) or 0 for each in shape] if isinstance(shape, list) else []
    return Linear(
        name=name,
        role=text(entry.get("role")) or "unknown",
        shape=tuple(sizes),
        format=text(entry.get("format")) or "nvfp4",
        layer=_place(entry, "layer", _LAYER, name),
        expert=_place(entry, "expert", _EXPERT, name),
        global_scale=number(entry.get("global_scale")),
        amax=number(entry.get("amax")),
        input_amax=number(entry.get("input_amax")),
        input_scale=number(entry.get("input_scale")),
        tokens=count(entry.get("tokens")),
        relative_error=number(entry.get("relative_error")),
    )


def _place(entry: Mapping[str, Any], key: str, pattern: re.Pattern[str], name: str) -> int | None:
    """What the document says; for one that says nothing, what the name says."""
    if key in entry:
        return count(entry[key])
    found = pattern.search(name)
    return int(found[1]) if found else None


def _by_layer(linear: Linear) -> tuple[bool, int, list[tuple[int, str]]]:
    layer = linear.layer
    return layer is None, layer or 0, natural(linear.name)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `experts.2` before `experts.10`."""
    return [(len(part) if part.isdigit() else 0, part) for part in _DIGITS.split(name)]
