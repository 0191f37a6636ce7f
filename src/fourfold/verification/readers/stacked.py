# SPDX-License-Identifier: Apache-2.0
"""Experts that lie stacked, taken apart for the rules, which judge one linear for each expert.

    inkling     experts.{w13_weight, w2_weight}, .scale, .scale2 [E], .input_amax [] of a layer;
                rows of w13 alternate: gate, up, gate, up, …
    llama4      experts.{gate_up_proj, down_proj}, _weight_scale: [E, in/2, out], [E, in/16, out];
                _weight_scale_2, _input_scale: one number for the layer
    muse_spark  experts.{gate_up_proj, down_proj}, _weight_scale, _weight_scale_2, _input_scale:
                [E, 2] for gate_up_proj, whose rows are the gate's and then up's; [E] for down_proj
    step3p7     {gate_proj, up_proj, down_proj}.weight, .weight_scale, .weight_scale_2 [E],
                .input_scale [E], beside the router

So the loaders of vLLM and SGLang take them, and for Llama 4 that of TensorRT-LLM. A tensor of
another shape is left whole, which makes its part a missing one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fourfold.storage.safetensors_header import TensorInfo
from fourfold.verification.readers.base import BLOCK_SCALE, PARTS, WEIGHT

_GATE_UP = ("gate_proj", "up_proj")
_DOWN = ("down_proj",)
_MODELOPT = ("_weight_scale", "_weight_scale_2", "_input_scale")
_OF_LINEAR = (".weight_scale", ".weight_scale_2", ".input_scale")
_OF_INKLING = (".scale", ".scale2", ".input_amax")
_AMAX_TO_SCALE = 448 * 6


class _Names(NamedTuple):
    """The names of a stack."""

    codes: str
    others: tuple[str, str, str]
    """What block scales, global scales and input scales have in the place of `codes`' ending."""
    projections: tuple[str, ...]
    experts: str = ""
    """What leads from the module of the tensors to that of the experts."""
    alternate: bool = False
    columns: bool = False
    """True if each projection of an expert has numbers of its own."""
    transposed: bool = False
    """True for [in, out], with numbers for the whole layer."""


_STACKS: Mapping[str, tuple[_Names, ...]] = {
    "inkling": (
        _Names("w13_weight", _OF_INKLING, _GATE_UP, alternate=True),
        _Names("w2_weight", _OF_INKLING, _DOWN),
    ),
    "llama4": (
        _Names("gate_up_proj", _MODELOPT, _GATE_UP, transposed=True),
        _Names("down_proj", _MODELOPT, _DOWN, transposed=True),
    ),
    "muse_spark": (
        _Names("gate_up_proj", _MODELOPT, _GATE_UP, columns=True),
        _Names("down_proj", _MODELOPT, _DOWN),
    ),
    "step3p7": tuple(
        _Names(f"{name}.weight", _OF_LINEAR, (name,), experts=".experts")
        for name in (*_GATE_UP, *_DOWN)
    ),
}
_TYPES = {"inkling_mm_model": "inkling", "step3p5": "step3p7"}


@dataclass
class Unstacked:
    """A checkpoint's tensors with experts one by one, and how to read those."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    strides: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The distance in bytes of rows, and of the bytes of a row, where they are not in order."""
    divisors: dict[str, float] = field(default_factory=dict)
    """What a stored number is of the scale, by its name."""


def unstack(tensors: Mapping[str, TensorInfo], model_types: Collection[object]) -> Unstacked:
    """Take the stacks apart; a checkpoint without any stays as it is."""
    result = Unstacked(dict(tensors))
    for names in _stacks(model_types):
        for key, info in tensors.items():
            module = re.fullmatch(rf"(?P<path>.+)\.{re.escape(names.codes)}", key)
            if module is None or info.dtype != "U8" or len(info.shape) != 3:
                continue
            parts = dict(zip(PARTS, _parts(key, names), strict=True))
            for part, name in parts.items():
                stored = tensors.get(name)
                if stored is not None and _fits(stored, part, info.shape[0], names):
                    del result.tensors[name]
                    linears = f"{module['path']}{names.experts}"
                    for own in _apart(stored, part, info.shape[0], names, linears, result):
                        result.tensors[own.key] = own
    return result


def _stacks(model_types: Collection[object]) -> tuple[_Names, ...]:
    for model_type in model_types:
        name = _TYPES.get(str(model_type), str(model_type)).removesuffix("_text")
        if name in _STACKS:
            return _STACKS[name]
    return ()


def _parts(codes: str, names: _Names) -> tuple[str, ...]:
    stem = codes.removesuffix(".weight") if names.others == _OF_LINEAR else codes
    return (codes, *(f"{stem}{ending}" for ending in names.others))


def _fits(info: TensorInfo, part: str, experts: int, names: _Names) -> bool:
    count = len(names.projections)
    if part in (WEIGHT, BLOCK_SCALE):
        is_stack = len(info.shape) == 3 and info.shape[0] == experts
        if not is_stack or not info.numel or info.nbytes != info.numel:
            return False
        return info.shape[2 if names.transposed else 1] % count == 0
    if names.transposed or info.key.endswith("_amax"):
        return info.numel == 1
    return info.shape == ((experts, count) if names.columns else (experts,))


def _apart(
    info: TensorInfo, part: str, experts: int, names: _Names, linears: str, result: Unstacked
) -> Iterator[TensorInfo]:
    """The tensors of each expert's linears inside one of the stack."""
    for expert in range(experts):
        for index, projection in enumerate(names.projections):
            key = f"{linears}.{expert}.{projection}.{part}"
            if part in (WEIGHT, BLOCK_SCALE):
                start, shape, strides = _matrix(info, expert, index, names)
                if strides != (shape[1], 1):
                    result.strides[key] = strides
                stop = start + shape[0] * shape[1]
                yield replace(info, key=key, shape=shape, start=start, stop=stop)
                continue
            if info.key.endswith("_amax"):
                result.divisors[key] = _AMAX_TO_SCALE
            place = expert * len(names.projections) + index if names.columns else expert
            start = info.start + (0 if info.numel == 1 else info.nbytes // info.numel * place)
            stop = start + info.nbytes // info.numel
            yield replace(info, key=key, shape=(), start=start, stop=stop)


def _matrix(
    info: TensorInfo, expert: int, index: int, names: _Names
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """One projection of an expert, of one byte an element: first byte, shape, strides."""
    count = len(names.projections)
    first = info.start + expert * info.shape[1] * info.shape[2]
    if names.transposed:
        width, outputs = info.shape[1:]
        return first + index * outputs // count, (outputs // count, width), (1, outputs)
    outputs, width = info.shape[1:]
    if names.alternate:
        return first + index * width, (outputs // count, width), (count * width, 1)
    return first + index * outputs // count * width, (outputs // count, width), (width, 1)
