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

from fourfold.formats.nvfp4.simd import as_bits, as_float, entry_point, exact, put

f32, u8, u16, u32 = np.float32, np.uint8, np.uint16, np.uint32

_NONE, _BF16, _F16 = 0, 1, 2  # what a product is rounded to before it is rounded to `out`
_ROUNDING = {torch.float32: _NONE, torch.bfloat16: _BF16, torch.float16: _F16}
_MIN_NORMAL_F16, _MAX_F16, _INF = f32(2.0**-14), f32(65520), f32(np.inf)
_HALF = f32(0.5)  # float32 numbers from here to 1 lie 2⁻²⁴ apart, as subnormal fp16 numbers do
_TILE = 64
_AWQ_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], dtype=np.uint32)

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
    if out.dtype == torch.bfloat16:
        once = _NONE if rounding == _BF16 else rounding
        _to_bf16(*arguments, once, out.view(torch.int16).numpy().view(np.uint16))
    elif out.dtype == torch.float32:
        _to_float32(*arguments, rounding, out.numpy())
    else:
        buffer = torch.empty(out.shape)
        _to_float32(*arguments, rounding, buffer.numpy())
        columns = slice(left, left + codes.shape[1] * 8 // bits)
        out[:, columns] = buffer[:, columns]


def unpack_awq(words: torch.Tensor, out: torch.Tensor) -> None:
    """Spread words [inputs, outputs/8] over U8 codes [outputs, inputs]."""
    _unpack_awq(words.numpy(), out.numpy())


def unpack_gptq(words: torch.Tensor, out: torch.Tensor, *, bits: int) -> None:
    """Spread words [inputs·bits/32, outputs] over U8 codes [outputs, inputs]."""
    _unpack_gptq(words.numpy(), bits, out.numpy())


@exact
def _bf16(x: Any) -> Any:
    """The bf16 bits of a float32, to the nearest even; NaN stays NaN."""
    bits = as_bits(x)
    rounded = u32(u32(bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))
    return u16(rounded if x == x else u32(0x7FC0))


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
def _spread(values: Any, row: int, width: int, groups: Any, left: int, out: Any) -> None:
    """Give each column the value of its group in `row`."""
    columns = out.size
    if groups.size:
        for column in range(columns):
            out[column] = values[row, groups[left + column]]
        return
    column = 0
    while column < columns:
        group = (left + column) // width
        stop, value = min(columns, (group + 1) * width - left), values[row, group]
        for index in range(column, stop):
            put(out, index, value)
        column = stop


@exact
def _products(codes: Any, row: int, bits: int, zeros: Any, scales: Any, out: Any) -> None:
    """Fill `out` with what a row's codes mean."""
    columns = out.size
    if bits == 4:
        for pair in range(columns // 2):
            byte = codes[row, pair]
            out[2 * pair] = f32(np.int32(byte & u8(15)))
            out[2 * pair + 1] = f32(np.int32(byte >> u8(4)))
        if columns % 2:
            out[columns - 1] = f32(np.int32(codes[row, columns // 2] & u8(15)))
    else:
        for column in range(columns):
            out[column] = f32(np.int32(codes[row, column]))
    for column in range(columns):
        out[column] = f32(out[column] - zeros[column]) * scales[column]


@exact
def _round(out: Any, rounding: int) -> None:
    if rounding == _BF16:
        for column in range(out.size):
            out[column] = as_float(u32(u32(_bf16(out[column])) << u32(16)))
    elif rounding == _F16:
        for column in range(out.size):
            out[column] = _f16(out[column])


@entry_point
def _to_bf16(
    codes: Any, bits: int, scales: Any, zeros: Any, width: int, groups: Any, left: int,
    rounding: int, out: Any,
) -> None:  # fmt: skip
    columns = min(codes.shape[1] * 8 // bits, out.shape[1] - left)
    scale, zero = np.empty(columns, np.float32), np.empty(columns, np.float32)
    product = np.empty(columns, np.float32)
    zero[:] = zeros[0, 0]
    for row in range(out.shape[0]):
        _spread(scales, row, width, groups, left, scale)
        if zeros.size > 1:
            _spread(zeros, row, width, groups, left, zero)
        _products(codes, row, bits, zero, scale, product)
        _round(product, rounding)
        for column in range(columns):
            out[row, left + column] = _bf16(product[column])


@entry_point
def _to_float32(
    codes: Any, bits: int, scales: Any, zeros: Any, width: int, groups: Any, left: int,
    rounding: int, out: Any,
) -> None:  # fmt: skip
    columns = min(codes.shape[1] * 8 // bits, out.shape[1] - left)
    scale, zero = np.empty(columns, np.float32), np.empty(columns, np.float32)
    product = np.empty(columns, np.float32)
    zero[:] = zeros[0, 0]
    for row in range(out.shape[0]):
        _spread(scales, row, width, groups, left, scale)
        if zeros.size > 1:
            _spread(zeros, row, width, groups, left, zero)
        _products(codes, row, bits, zero, scale, product)
        _round(product, rounding)
        for column in range(columns):
            out[row, left + column] = product[column]


@entry_point
def _unpack_awq(words: Any, out: Any) -> None:
    inputs, count = words.shape
    tile = np.empty(_TILE, np.uint32)
    for first in range(0, inputs, _TILE):
        size = min(_TILE, inputs - first)
        for word in range(count):
            for index in range(size):
                tile[index] = u32(words[first + index, word])
            for place in range(8):
                shift = _AWQ_SHIFTS[place]
                for index in range(size):
                    out[8 * word + place, first + index] = u8((tile[index] >> shift) & u32(15))


@entry_point
def _unpack_gptq(words: Any, bits: int, out: Any) -> None:
    count, outputs = words.shape
    codes, mask = 32 // bits, u32((1 << bits) - 1)
    for first in range(0, count, _TILE):
        last = min(first + _TILE, count)
        for output in range(outputs):
            for index in range(first, last):
                word = u32(words[index, output])
                for place in range(codes):
                    code = u8((word >> u32(bits * place)) & mask)
                    out[output, codes * index + place] = code
