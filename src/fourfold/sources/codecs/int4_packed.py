# SPDX-License-Identifier: Apache-2.0
"""INT4 and INT8 as compressed-tensors packs them (`pack-quantized`): Kimi-K2 and many others.

    <linear>.weight_packed      I32             [out, ⌈in·bits/32⌉]  codes, lowest bits first
    <linear>.weight_scale       BF16, F16, F32  [out, in/group], [out, 1] or [1]
    <linear>.weight_shape       I64, I32        [2]
    <linear>.weight_zero_point  I32             [⌈out·bits/32⌉, in/group]  asymmetric, packed
                                I8              [out, in/group]            by older versions
    <linear>.weight_g_idx       I32             [in]  the group of each column

The configuration says how many bits a code has and how wide a group is; shapes say which of its
groups of modules a weight belongs to. Without it, codes have 4 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fourfold.errors import DamagedError, SourceError
from fourfold.layouts.recognition import is_target, targets_of
from fourfold.sources.codecs.base import REMEDY, EncodedWeight, ReadRows, TensorCodec, presented
from fourfold.sources.codecs.integers import (
    CHUNK,
    LOSES_AGAIN,
    SCALE_DTYPES,
    check_finite,
    groups_of,
    unpacked,
)
from fourfold.storage.safetensors_header import TensorInfo

CODES, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
ZERO, INDEX = "weight_zero_point", "weight_g_idx"

_STATIC = ("input_scale", "input_zero_point", "input_global_scale")
_KV_SCALES = ("k_scale", "v_scale", "q_scale")


@dataclass(frozen=True, slots=True)
class Packing:
    """What a configuration says of the weights of some modules."""

    bits: int = 4
    group: int | None = None
    """The columns that share a scale; None for all, or if nothing is stated."""
    is_symmetric: bool = True
    targets: tuple[str, ...] = ()
    is_stated: bool = False

    def columns(self, words: int, scales: int) -> int | None:
        """The columns of a row of so many words and scales; None if it is packed otherwise."""
        columns = words * 32 // self.bits
        if self.group is not None:
            columns = scales * self.group
        elif columns % scales or (self.is_stated and scales != 1):
            return None
        return columns if -(-columns * self.bits // 32) == words else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight(EncodedWeight):
    """One packed weight."""

    width: int
    """The columns of a group."""
    bits: int
    is_scalar: bool
    """True if all rows share one scale."""
    has_packed_zeros: bool


class PackedIntegers(TensorCodec):
    """Reads packed weights of one width."""

    bits: ClassVar[int]

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        packings = list(packings_in(config)) or [Packing()]
        weights: dict[str, EncodedWeight] = {}
        for key, codes in tensors.items():
            stem, _, leaf = key.rpartition(".")
            if leaf != CODES or codes.dtype != "I32":
                continue
            weight = _weight(stem, codes, tensors, packings, config)
            if weight.bits != self.bits:
                continue
            if SHAPE not in weight.parts:
                raise SourceError(f"{stem}.{SHAPE}: missing beside {key}. {REMEDY}")
            weights[f"{stem}.weight"] = weight
        return weights

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        assert isinstance(weight, PackedWeight)
        from fourfold.sources.codecs import int_cpu  # imports numba

        _check_shape(weight, read)
        columns, name = weight.info.shape[1], weight.parts[SCALE]
        groups = torch.empty(0, dtype=torch.int32)
        if INDEX in weight.parts:
            index = read(weight.parts[INDEX], 0, columns)
            groups = groups_of(weight.parts[INDEX], index, weight.width, columns // weight.width)
        step = max(1, CHUNK // columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            scales = _scales(weight, first, last, read)
            check_finite(name, scales)
            int_cpu.decode(
                read(weight.parts[CODES], first, last).view(torch.uint8),
                scales,
                _zeros(weight, first, last, read),
                out[first - start : last - start],
                bits=weight.bits,
                width=weight.width,
                groups=groups.numpy(),
            )

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        return [key for key in tensors if _is_static_scale(key, tensors)]


class INT4Packed(PackedIntegers):
    """Reads packed weights of 4 bits."""

    name = "int4_packed"
    title = "INT4 (compressed-tensors)"
    remark = LOSES_AGAIN
    bits = 4


class INT8Packed(PackedIntegers):
    """Reads packed weights of 8 bits."""

    name = "int8_packed"
    title = "INT8 (compressed-tensors)"
    bits = 8


def _is_static_scale(key: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """True for a scale of a KV cache, or of the inputs of a packed weight."""
    stem, _, leaf = key.rpartition(".")
    return leaf in _KV_SCALES or (leaf in _STATIC and f"{stem}.{CODES}" in tensors)


def packings_in(config: Mapping[str, Any]) -> Iterator[Packing]:
    """Yield what a configuration says of integer weights, in its nested parts, too."""
    for name, value in config.items():
        if name == "config_groups" and isinstance(value, dict):
            yield from (_packing(group) for group in value.values() if _has_integers(group))
        elif isinstance(value, dict):
            yield from packings_in(value)


def _has_integers(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, dict) else None
    return isinstance(weights, dict) and weights.get("type", "int") == "int"


def _packing(group: Mapping[str, Any]) -> Packing:
    weights = group["weights"]
    bits, width = weights.get("num_bits"), weights.get("group_size")
    return Packing(
        bits=bits if isinstance(bits, int) and 0 < bits <= 8 else 4,
        group=width if isinstance(width, int) and width > 0 else None,
        is_symmetric=weights.get("symmetric") is not False,
        targets=tuple(targets_of(group)),
        is_stated=True,
    )


def _is_target(packing: Packing, linear: str) -> bool:
    """True if a module is named, not only its class."""
    return any(is_target(target, linear) for target in packing.targets)


def _weight(
    linear: str,
    codes: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    packings: list[Packing],
    config: Mapping[str, Any],
) -> PackedWeight:
    """Describe a weight, whose parts must fit each other."""
    names = {part: f"{linear}.{part}" for part in (CODES, SCALE, SHAPE, ZERO, INDEX)}
    names = {part: name for part, name in names.items() if name in tensors}
    if SCALE not in names:
        raise SourceError(f"{linear}.{SCALE}: missing beside {codes.key}. {REMEDY}")
    scale = tensors[names[SCALE]]
    rows, words = codes.shape if len(codes.shape) == 2 else (0, 0)
    count = scale.shape[1] if len(scale.shape) == 2 else 1
    fits = rows * words * count and (scale.numel == 1 or scale.rows * count == scale.numel)
    fits = fits and (scale.numel == 1 or scale.rows == rows) and scale.dtype in SCALE_DTYPES
    ordered = sorted(packings, key=lambda packing: not _is_target(packing, linear))
    choices = ((packing, packing.columns(words, count)) for packing in ordered if fits)
    packing, columns = next((x for x in choices if x[1] is not None), (None, None))
    if packing is None or columns is None:
        stated = " or ".join(f"{x.bits} bits in groups of {x.group or 'a row'}" for x in packings)
        raise SourceError(
            f"{scale.key}: {scale.dtype} {list(scale.shape)} does not fit {codes.key} "
            f"{list(codes.shape)} of {stated}. {REMEDY}"
        )
    if packing.is_stated and not packing.is_symmetric and ZERO not in names:
        raise SourceError(
            f"{linear}.{ZERO}: missing, but the configuration says that {codes.key} is not "
            f"symmetric. {REMEDY}"
        )
    _check_parts(tensors, names, rows, columns, count, packing.bits)
    return PackedWeight(
        presented(codes, f"{linear}.weight", (rows, columns), config),
        names,
        width=columns // count,
        bits=packing.bits,
        is_scalar=scale.numel == 1,
        has_packed_zeros=ZERO in names and tensors[names[ZERO]].dtype == "I32",
    )


def _check_parts(
    tensors: Mapping[str, TensorInfo],
    names: Mapping[str, str],
    rows: int,
    columns: int,
    count: int,
    bits: int,
) -> None:
    integers = ("I32", "I64")
    wanted: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        SHAPE: [(dtype, (2,)) for dtype in integers],
        INDEX: [(dtype, (columns,)) for dtype in integers],
        ZERO: [("I32", (-(-rows * bits // 32), count)), ("I8", (rows, count))],
    }
    for part, forms in wanted.items():
        info = tensors[names[part]] if part in names else None
        if info is not None and (info.dtype, info.shape) not in forms:
            raise SourceError(
                f"{info.key}: {info.dtype} {list(info.shape)} does not fit a weight "
                f"[{rows}, {columns}] with {count} scales a row. {REMEDY}"
            )


def _check_shape(weight: PackedWeight, read: ReadRows) -> None:
    """The last word of a row may hold fewer codes than it could, which headers do not show."""
    name = weight.parts[SHAPE]
    shape = tuple(read(name, 0, 2).tolist())
    if shape != weight.info.shape:
        raise DamagedError(
            f"{name}: {list(shape)}, but the codes beside it are those of a weight "
            f"{list(weight.info.shape)}. {REMEDY}"
        )


def _scales(weight: PackedWeight, start: int, stop: int, read: ReadRows) -> torch.Tensor:
    """The scales of some rows: [rows, groups]."""
    name, count = weight.parts[SCALE], weight.info.shape[1] // weight.width
    if weight.is_scalar:
        return read(name, 0, 1).reshape(1, 1).expand(stop - start, 1)
    return read(name, start, stop).reshape(stop - start, count)


def _zeros(weight: PackedWeight, start: int, stop: int, read: ReadRows) -> torch.Tensor:
    """The zeros of some rows, as codes: [rows, groups], or [1, 1] if all are alike."""
    middle = 1 << (weight.bits - 1)
    name = weight.parts.get(ZERO)
    if name is None:
        return torch.full((1, 1), float(middle))
    if weight.has_packed_zeros:
        per_word = 32 // weight.bits
        first, last = start // per_word, -(-stop // per_word)
        zeros = unpacked(read(name, first, last).T, weight.bits).T
        return zeros[start - first * per_word :][: stop - start].float()
    return read(name, start, stop).float() + middle
