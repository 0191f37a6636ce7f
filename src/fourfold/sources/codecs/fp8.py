# SPDX-License-Identifier: Apache-2.0
"""What the forms of FP8 have in common: E4M3 codes, and a grid of scales that multiply them.

    w[r, c] = code[r, c] · scale[r // height, c // width]        height × width: a block

A block is the whole matrix, a row, a column, some weights of a row, or 128×128 weights; the last
row and column of blocks may be partial. A fused tensor of experts [experts, rows, columns] has a
grid of scales for each expert, or one scale for all.

    <linear>.weight       <linear>.{weight_scale_inv, weight_scale, scale, qscale_weight}
    <experts>.down_proj   <experts>.down_proj_{scale_inv, weight_scale, scale}

Whatever its name, a scale is a multiplier. The product is taken in float32 and rounded to the dtype
of the weight, as transformers does; where a `weight_scale` is BF16 or FP16, it is rounded to that
dtype first, as compressed-tensors does. Static scales of activations and of KV caches are left out:
they belong to FP8, and whoever quantizes the model again finds their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch

from fourfold.errors import DamagedError, SourceError
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.layouts.recognition import stated_quantizations
from fourfold.sources.codecs.base import (
    REMEDY,
    EncodedWeight,
    InputRounding,
    ReadRows,
    StoredParts,
    TensorCodec,
    positive_scale,
    presented,
)
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.source import FP8Weight

CODES, SCALE = "weight", "weight_scale"

DEFAULT_BLOCK = (128, 128)
"""The block size where a configuration states none: DeepSeek's, and that of every engine."""

MX_BLOCK = 32
"""Weights of a row that share an exponent in MXFP8."""

_EXPONENTS = ("F8_E8M0", "U8")  # a byte b means 2^(b − 127)
_SCALE_DTYPES = ("F32", "BF16", "F16", *_EXPONENTS)
_LINEAR_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_STATIC_SCALES = ("input_scale", "activation_scale", "act_scale", "qscale_act")
_FUSED_SCALES = ("_scale_inv", "_weight_scale", "_scale")
_INPUT_SCALE = re.compile(
    r"[._](input_scale|input_scale_ub|input_global_scale|act(ivation)?_scale|qscale_act)$"
)
_CACHE_SCALE = re.compile(r"\.(q|k|v|qkv)_proj\.output_scale$|\.(q|k|v|kv|prob)_scale$")
_CHUNK = 1 << 22  # codes that are read at a time: few enough to stay in a CPU's cache


class Kind(Enum):
    """What shares a scale."""

    BLOCK = "a block, or a group of a row"
    CHANNEL = "a matrix, half of one, a row or a column"
    MX = "32 weights of a row, a power of two"


@dataclass(frozen=True, slots=True)
class Grid:
    """How the scales lie over a weight."""

    kind: Kind
    block: tuple[int, int]
    """The rows and columns that share a scale."""
    is_shared: bool = False
    """True if all matrices of a fused tensor share the scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedFP8(EncodedWeight):
    """One FP8 weight."""

    grid: Grid
    scale: TensorInfo
    is_rounded_to_scale: bool
    """True if the product is rounded to the scale's dtype before it is rounded to the weight's."""
    inputs: str | None
    """The format that engines round the inputs to; None if they keep 16 bits."""
    static_scale: str | None
    """The stored tensor that scales the inputs; None if engines choose their scales."""


class FP8Codec(TensorCodec):
    """Reads FP8 weights of one kind."""

    kind: ClassVar[Kind]

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        stated = tuple(_stated_block_sizes(config))
        sizes = stated or (DEFAULT_BLOCK,)
        rounds_inputs = _rounds_inputs(config)
        weights: dict[str, EncodedWeight] = {}
        for key, codes in tensors.items():
            if codes.dtype != "F8_E4M3" or len(codes.shape) < 2 or "scale" in _leaf(key):
                continue
            scale = _scale_of(key, tensors)
            grid = _grid(codes, scale, sizes)
            if grid.kind is self.kind:
                weights[key] = EncodedFP8(
                    presented(codes, key, codes.shape, config),
                    {CODES: key, SCALE: scale.key},
                    grid=grid,
                    scale=scale,
                    is_rounded_to_scale=scale.key.endswith("weight_scale"),
                    inputs=_inputs(codes, scale, grid, bool(stated)) if rounds_inputs else None,
                    static_scale=_static_scale_of(key, tensors),
                )
        return weights

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        assert isinstance(weight, EncodedFP8)
        step = max(1, _CHUNK // math.prod(weight.info.shape[1:]))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            _decode_rows(weight, first, last, read, out[first - start : last - start])

    def input_rounding(self, weight: EncodedWeight, read: ReadRows) -> InputRounding | None:
        assert isinstance(weight, EncodedFP8)
        if weight.inputs is None:
            return None
        if weight.static_scale is not None:
            scale = positive_scale(weight.static_scale, read(weight.static_scale, 0, 1))
            return InputRounding("fp8", scale)
        return InputRounding(weight.inputs, None)

    def fp8(self, weight: EncodedWeight, read: ReadRows) -> FP8Weight | None:
        assert isinstance(weight, EncodedFP8)
        if len(weight.info.shape) != 2:
            return None
        (height, width), name = weight.grid.block, weight.parts[SCALE]
        blocks = -(-weight.info.shape[1] // width)

        def scales(start: int, stop: int) -> torch.Tensor:
            stored = read(name, start // height, -(-stop // height))
            return _multipliers(name, stored).reshape(-1, blocks)

        def codes(start: int, stop: int) -> torch.Tensor:
            return read(weight.parts[CODES], start, stop).view(torch.uint8)

        return FP8Weight(weight.grid.block, codes, scales)

    def stored_parts(self, weight: EncodedWeight, read: ReadRows) -> StoredParts | None:
        assert isinstance(weight, EncodedFP8)
        rounding, shape = self.input_rounding(weight, read), weight.info.shape
        if rounding is None or len(shape) != 2:
            return None
        fmt, rows = FORMATS[rounding.format], {"codes": weight.parts[CODES]}
        ((part, (dtype, of_scales)),) = (x for x in fmt.parts(shape).items() if x[0] not in rows)
        stored = weight.scale.dtype.replace("F8_E8M0", "U8")
        if (stored, weight.scale.numel) != (dtype, math.prod(of_scales)):
            return None
        scale = rounding.scale
        numbers = {} if scale is None else dict.fromkeys(fmt.input_parts(), scale)
        if part == fmt.group_part:
            numbers[part] = positive_scale(weight.scale.key, read(weight.scale.key, 0, 1))
        else:
            rows[part] = weight.scale.key
        return StoredParts(Scheme(fmt.name, "max", fmt.name), rows, numbers)

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        return [key for key in tensors if _is_static_scale(key, tensors)]


def _is_static_scale(key: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """True for a scale of a KV cache, or of the inputs of an FP8 weight."""
    if match := _INPUT_SCALE.search(key):
        weights = (tensors.get(key[: match.start()] + ending) for ending in ("", ".weight"))
        return any(info is not None and info.dtype == "F8_E4M3" for info in weights)
    return _CACHE_SCALE.search(key) is not None


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _stated_block_sizes(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield what a configuration says of block sizes: of transformers', or compressed-tensors'."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _stated_block_sizes(value)
        elif name in ("weight_block_size", "block_structure"):
            match value.split("x") if isinstance(value, str) else value:
                case [height, width] if _is_size(height) and _is_size(width):
                    yield max(1, int(height)), max(1, int(width))


def _is_size(value: Any) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", str(value)) is not None


def _rounds_inputs(config: Mapping[str, Any]) -> bool:
    """False if a compressed-tensors configuration keeps the inputs of FP8 weights in 16 bits."""
    stated = (entry.get("config_groups") for entry in stated_quantizations(config))
    groups = [group for some in stated if isinstance(some, dict) for group in some.values()]
    fp8 = [x for x in groups if isinstance(x, dict) and _is_fp8(x.get("weights"))]
    return not fp8 or any(group.get("input_activations") for group in fp8)


def _inputs(codes: TensorInfo, scale: TensorInfo, grid: Grid, states_blocks: bool) -> str | None:
    """The format that engines round inputs to, if the checkpoint stores no scale for them; None if
    no format here has groups of that width."""
    if grid.kind is Kind.MX:
        return "mxfp8"
    is_named_block = scale.key.endswith("_inv") or len(scale.shape) == len(codes.shape) + 2
    is_named_block |= states_blocks and scale.shape == (1, 1)
    is_one_block = is_named_block and codes.shape[-1] <= DEFAULT_BLOCK[1]
    if grid.kind is Kind.CHANNEL and not is_one_block:
        return "fp8_channel"
    return "fp8_block" if grid.block[1] == DEFAULT_BLOCK[1] else None


def _is_fp8(arguments: Any) -> bool:
    of_weights = arguments if isinstance(arguments, dict) else {}
    return (of_weights.get("num_bits"), of_weights.get("type")) == (8, "float")


def _static_scale_of(key: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The one number that scales the inputs of a linear layer's weight, if it is stored."""
    stem = key.removesuffix(".weight")
    names = (f"{stem}.{name}" for name in _STATIC_SCALES)
    return next((x for x in names if x in tensors and tensors[x].numel == 1), None)


def _scale_of(key: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    stem = key.removesuffix(".weight")
    names = [f"{key}{ending}" for ending in _FUSED_SCALES]
    if stem != key:
        names = [f"{stem}.{name}" for name in _LINEAR_SCALES]
    scale = next((tensors[name] for name in names if name in tensors), None)
    if scale is None:
        raise SourceError(f"{key}: FP8 without {_leaf(names[0])} or {_leaf(names[1])}. {REMEDY}")
    return scale


def _grid(codes: TensorInfo, scale: TensorInfo, sizes: tuple[tuple[int, int], ...]) -> Grid:
    """Tell by the shapes how the scales of a weight lie.

    Raises:
        SourceError: In no known way.
    """
    grid = None
    if scale.dtype in _SCALE_DTYPES and codes.numel:
        grid = _fit(codes.shape, _scales_per_matrix(codes, scale), scale.dtype, sizes)
    if grid is None:
        blocks = " or ".join(f"{height}×{width}" for height, width in sizes)
        raise SourceError(
            f"{scale.key}: {scale.dtype} {list(scale.shape)} does not fit {_leaf(codes.key)} "
            f"{list(codes.shape)}, neither per tensor or channel nor in blocks of {blocks}. "
            "If its blocks are of another size, state it as weight_block_size in "
            f"quantization_config of config.json. Else: {REMEDY[0].lower()}{REMEDY[1:]}"
        )
    return Grid(grid.kind, grid.block, scale.numel == 1)


def _scales_per_matrix(codes: TensorInfo, scale: TensorInfo) -> tuple[int, int] | None:
    """The shape of one matrix's grid of scales; None if the scale is not for such a weight."""
    (*lead, rows, columns), shape = codes.shape, scale.shape
    if len(lead) > 1:
        return None
    if scale.numel == 1:
        return 1, 1
    if len(shape) == len(codes.shape) + 2 and shape[-3] == shape[-1] == 1:  # ModelOpt's blocks
        shape = (*shape[:-3], shape[-2])
    if shape[: len(lead)] != tuple(lead):
        return None
    match shape[len(lead) :]:
        case (height, width):
            return height, width
        case () | (1,):
            return 1, 1
        case (channels,) if channels == rows and (rows != columns or not lead):
            return rows, 1
        case (channels,) if channels == columns != rows and lead:  # [in, out] in ModelOpt
            return 1, columns
    return None


def _fit(
    shape: tuple[int, ...],
    scales: tuple[int, int] | None,
    dtype: str,
    sizes: tuple[tuple[int, int], ...],
) -> Grid | None:
    """The grid with so many scales, of a matrix or of a fused tensor of them."""
    rows, columns = shape[-2:]
    is_fused = len(shape) > 2
    if scales is None or 0 in scales:
        return None
    high, wide = scales
    if wide == 1 and high in (1, rows):
        return Grid(Kind.CHANNEL, (rows // high, columns))
    if is_fused and scales == (1, columns):
        return Grid(Kind.CHANNEL, (rows, 1))
    if dtype in _EXPONENTS and high == rows and columns == wide * MX_BLOCK:
        return Grid(Kind.MX, (1, MX_BLOCK))
    for height, width in sizes:
        if scales == (-(-rows // height), -(-columns // width)):
            return Grid(Kind.BLOCK, (height, width))
    if high == rows and columns % wide == 0:
        return Grid(Kind.BLOCK, (1, columns // wide))
    if is_fused and scales == (2, 1) and rows % 2 == 0:  # gate and up
        return Grid(Kind.CHANNEL, (rows // 2, columns))
    return None


def _decode_rows(
    weight: EncodedFP8, start: int, stop: int, read: ReadRows, out: torch.Tensor
) -> None:
    codes, name = read(weight.parts[CODES], start, stop), weight.parts[SCALE]
    height, width = weight.grid.block
    columns = -(-codes.shape[-1] // width)
    if codes.ndim == 2:
        scales = read(name, start // height, -(-stop // height))
        _decode_matrix(weight, codes, scales.reshape(-1, columns), start % height, out)
        return
    scales = read(name, 0, 1) if weight.grid.is_shared else read(name, start, stop)
    grids = scales.reshape(1 if weight.grid.is_shared else len(codes), -1, columns)
    for matrix, grid, target in zip(codes, grids.expand(len(codes), -1, -1), out, strict=True):
        _decode_matrix(weight, matrix, grid, 0, target)


def _decode_matrix(
    weight: EncodedFP8, codes: torch.Tensor, scales: torch.Tensor, first: int, out: torch.Tensor
) -> None:
    from fourfold.formats.fp8 import cpu  # imports numba

    factors = _multipliers(weight.parts[SCALE], scales)
    is_rounded = weight.is_rounded_to_scale and scales.dtype in (torch.bfloat16, torch.float16)
    product = scales.dtype if is_rounded else torch.float32
    if out.dtype != torch.float16 and product in (torch.float32, out.dtype):
        cpu.decode(codes, factors, out, first=first, block=weight.grid.block)
        return
    exact = torch.empty(codes.shape, dtype=torch.float32)
    cpu.decode(codes, factors, exact, first=first, block=weight.grid.block)
    out.copy_(exact.to(product))


def _multipliers(name: str, scales: torch.Tensor) -> torch.Tensor:
    """The scales in float32. A block of zeros may have the scale 0."""
    is_byte = scales.dtype == torch.uint8
    factors = (scales.view(torch.float8_e8m0fnu) if is_byte else scales).float().contiguous()
    usable = factors.isfinite() & (factors >= 0)
    if not usable.all():
        value = float(factors[~usable][0])
        raise DamagedError(f"{name}: {value}; a scale must be finite and not negative. {REMEDY}")
    return factors
