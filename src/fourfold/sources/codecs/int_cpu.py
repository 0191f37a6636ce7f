# SPDX-License-Identifier: Apache-2.0
"""Integer codes to bf16 or float32 on the CPU: w = (code − zero) · scale.

Codes, zeros and scales of a row are first spread over its columns as float32, in a CPU's cache, so
that the loop over the columns is a subtraction and a product of vectors whatever the width of a
group. The difference of two codes is exact in float32, and so is its product with a scale of at
most 11 bits; it is therefore rounded once to the dtype of the scales, as the libraries have it.

Import this module at first use: it imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fourfold.formats.nvfp4.simd import (
    LINE,
    TILE,
    as_bits,
    as_float,
    bf16_bits,
    entry_point,
    exact,
    get,
    load_tile,
    put,
)

f32, u8, u16, u32 = np.float32, np.uint8, np.uint16, np.uint32

_NONE, _BF16, _F16 = 0, 1, 2  # what a product is rounded to before it is rounded to `out`
_ROUNDING = {torch.float32: _NONE, torch.bfloat16: _BF16, torch.float16: _F16}
_MIN_NORMAL_F16, _MAX_F16, _INF = f32(2.0**-14), f32(65520), f32(np.inf)
_TWO_24 = f32(2.0**24)
_HALF = f32(0.5)  # float32 numbers from here to 1 lie 2⁻²⁴ apart, as subnormal fp16 numbers do
_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], dtype=np.uint32)

Groups = npt.NDArray[np.int32]
"""The group of each column; empty where groups lie one after the other."""


def decode(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    out: torch.Tensor,
    *,
    bits: int,
    width: int,
    groups: Groups,
    left: int = 0,
) -> None:
    """Fill columns of `out`, which is contiguous, from column `left` on. Releases the GIL.

    Args:
        codes: U8 [rows, columns], or [rows, ⌈columns/2⌉ or more] where `bits` is 4, the low half of
            a byte first.
        scales: [rows, groups], in the dtype that products are rounded to.
        zeros: float32 [rows, groups], or one number [1, 1].
        out: bf16, fp16 or float32 [rows, in].
        bits: 4 or 8, the bits that a code takes in `codes`.
        width: The columns of a group.
        groups: The group of each column of `out`, if it does not follow from `width`.
        left: The column of `out` that the first code belongs to.
    """
    rounding, factors = _ROUNDING[scales.dtype], scales.float().contiguous().numpy()
    arguments = (codes.numpy(), bits, factors, zeros.contiguous().numpy(), width, groups, left)
    if out.dtype == torch.float32:
        _to_float32(*arguments, rounding, out.numpy())
        return
    own = _ROUNDING[out.dtype]  # to which the last step rounds in any case
    rounding = _NONE if rounding == own else rounding
    _to_16_bits(*arguments, rounding, own == _F16, out.view(torch.int16).numpy().view(np.uint16))


def unpack_awq(words: torch.Tensor, out: torch.Tensor) -> None:
    """Spread words [inputs, outputs/8] over U8 codes [outputs, inputs]."""
    _unpack_awq(words.numpy(), out.numpy())


def unpack_gptq(words: torch.Tensor, out: torch.Tensor, *, bits: int) -> None:
    """Spread words [inputs·bits/32, outputs] over U8 codes [outputs, inputs]."""
    _unpack_gptq(words.numpy(), bits, out.numpy())


@exact
def _f16(x: Any) -> Any:
    """The float32 value of x rounded to fp16, to the nearest even."""
    sign, magnitude = u32(as_bits(x) & u32(0x80000000)), as_float(u32(as_bits(x) & u32(0x7FFFFFFF)))
    bits = as_bits(magnitude)
    normal = as_float(u32(u32(bits + u32(0xFFF) + ((bits >> u32(13)) & u32(1))) & u32(0xFFFFE000)))
    subnormal = f32(magnitude + _HALF) - _HALF
    rounded = normal if magnitude >= _MIN_NORMAL_F16 else subnormal
    rounded = rounded if magnitude < _MAX_F16 else _INF
    return as_float(u32(as_bits(rounded) | sign))


@exact
def _f16_bits(x: Any) -> Any:
    """The fp16 bits of a float32, to the nearest even."""
    bits = as_bits(_f16(x))
    sign, magnitude = u32(bits >> u32(16)) & u32(0x8000), as_float(u32(bits & u32(0x7FFFFFFF)))
    normal = u32(u32(as_bits(magnitude) - u32(112 << 23)) >> u32(13))
    subnormal = u32(np.int32(magnitude * _TWO_24))
    code = normal if magnitude >= _MIN_NORMAL_F16 else subnormal
    return u16(u32(code if magnitude < _INF else u32(0x7C00)) | sign)


@exact
def _spread(values: Any, width: int, groups: Any, first: int, out: Any) -> None:
    """Give each column, from column `first` of a row on, the value of its group."""
    columns = out.size
    if groups.size:
        for column in range(columns):
            put(out, column, values[groups[first + column]])
        return
    group, column = first // width, 0
    while column < columns:
        stop, value = min(columns, (group + 1) * width - first), values[group]
        for index in range(stop - column):
            put(out, column + index, value)
        group, column = group + 1, stop


@exact
def _expand(codes: Any, bits: int, out: Any) -> None:
    """Fill `out` with a row's codes."""
    columns = out.size
    if bits == 8:
        for column in range(columns):
            put(out, column, f32(np.int32(get(codes, column))))
        return
    for pair in range(columns // 2):
        byte = np.int32(get(codes, pair))
        put(out, 2 * pair, f32(np.int32(byte & np.int32(15))))
        put(out, 2 * pair + 1, f32(np.int32(byte >> np.int32(4))))
    if columns % 2:
        put(out, columns - 1, f32(np.int32(get(codes, columns // 2)) & np.int32(15)))


@exact
def _multiply(values: Any, zero: Any, scale: Any, rounding: int) -> None:
    """Replace a row's codes by what they mean, rounded."""
    for column in range(values.size):
        value = f32(get(values, column) - get(zero, column)) * get(scale, column)
        put(values, column, value)
    if rounding == _BF16:
        for column in range(values.size):
            bits = u32(bf16_bits(get(values, column)) << u32(16))
            put(values, column, as_float(bits))
    elif rounding == _F16:
        for column in range(values.size):
            put(values, column, _f16(get(values, column)))


@exact
def _decode_row(
    codes: Any, bits: int, scales: Any, zeros: Any, width: int, groups: Any, first: int,
    rounding: int, value: Any, zero: Any, scale: Any, row: int,
) -> None:  # fmt: skip
    """Fill `value` with the columns of one row; `zero` is filled already if all are alike."""
    _spread(scales[row], width, groups, first, scale)
    if zeros.size > 1:
        _spread(zeros[row], width, groups, first, zero)
    _expand(codes[row], bits, value)
    _multiply(value, zero, scale, rounding)


@entry_point
def _to_16_bits(
    codes: Any, bits: int, scales: Any, zeros: Any, width: int, groups: Any, left: int,
    rounding: int, is_f16: bool, out: Any,
) -> None:  # fmt: skip
    columns = min(codes.shape[1] * 8 // bits, out.shape[1] - left)
    value, scale = np.empty(columns, np.float32), np.empty(columns, np.float32)
    zero = np.full(columns, zeros[0, 0])
    for row in range(out.shape[0]):
        _decode_row(
            codes, bits, scales, zeros, width, groups, left, rounding, value, zero, scale, row
        )
        line = out[row, left:]
        if is_f16:
            for column in range(columns):
                put(line, column, _f16_bits(get(value, column)))
        else:
            for column in range(columns):
                put(line, column, u16(bf16_bits(get(value, column))))


@entry_point
def _to_float32(
    codes: Any, bits: int, scales: Any, zeros: Any, width: int, groups: Any, left: int,
    rounding: int, out: Any,
) -> None:  # fmt: skip
    columns = min(codes.shape[1] * 8 // bits, out.shape[1] - left)
    scale, zero = np.empty(columns, np.float32), np.full(columns, zeros[0, 0])
    for row in range(out.shape[0]):
        value = out[row, left : left + columns]
        _decode_row(
            codes, bits, scales, zeros, width, groups, left, rounding, value, zero, scale, row
        )


@entry_point
def _unpack_awq(words: Any, out: Any) -> None:
    inputs, count = words.shape
    tile = np.empty(TILE * LINE, np.uint32)
    for row in range(0, inputs, TILE):
        rows = min(TILE, inputs - row)
        for column in range(0, count, LINE):
            columns = min(LINE, count - column)
            load_tile(words, row, column, rows, columns, tile)
            for c in range(columns):
                for place in range(8):
                    line, shift = out[8 * (column + c) + place, row : row + rows], _SHIFTS[place]
                    for r in range(rows):
                        put(line, r, u8((get(tile, c * TILE + r) >> shift) & u32(15)))


@entry_point
def _unpack_gptq(words: Any, bits: int, out: Any) -> None:
    count, outputs = words.shape
    tile, mask, codes = np.empty(TILE * LINE, np.uint32), u32((1 << bits) - 1), 32 // bits
    for row in range(0, count, TILE):
        rows = min(TILE, count - row)
        for column in range(0, outputs, LINE):
            columns = min(LINE, outputs - column)
            load_tile(words, row, column, rows, columns, tile)
            for c in range(columns):
                line = out[column + c, codes * row : codes * (row + rows)]
                for r in range(rows):
                    word = get(tile, c * TILE + r)
                    for place in range(codes):
                        code = u8((word >> u32(bits * place)) & mask)
                        put(line, codes * r + place, code)
