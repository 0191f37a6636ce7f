# SPDX-License-Identifier: Apache-2.0
"""FP8 on the CPU: the largest magnitudes of blocks, codes, errors, and weights of codes.

The scales of a row of blocks are first spread over a row of columns, so that the loop over the
columns is one operation on vectors, whatever the width of a block. Decoding runs at 5 G weights/s
on one core where 128 rows share their scales, and at 3.5 where 32 weights do.

Sums are kept in lanes, column c in lane c modulo 64, so that LLVM may add them as vectors. Weights
and codes are passed as flat arrays of all that lies between their first and last element, with the
distance of their rows: one compilation serves any stride, and the loop over columns sees one run.

Import this module at first use: it imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fourfold.formats.nvfp4.simd import (
    LANES,
    as_bits,
    as_float,
    bf16_bits,
    e4m3_byte,
    entry_point,
    exact,
    f16_magnitude,
    get,
    put,
)
from fourfold.formats.nvfp4.sweep import BFLOAT16, FLOAT16, FLOAT32, KINDS

f32, f64, u8, u16, u32 = np.float32, np.float64, np.uint8, np.uint16, np.uint32

_TWO_M9, _NAN = f32(2.0**-9), f32(np.nan)
_TOP, _SIGN, _MAGNITUDE = f32(448), u32(1 << 31), u32((1 << 31) - 1)


def block_amaxes(w_OI: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return the largest magnitude of each block, float32 [rows of blocks, columns of blocks]."""
    (rows, columns), (height, width) = w_OI.shape, block
    amaxes = np.zeros((-(-rows // height), -(-columns // width)), np.float32)
    _amaxes(*_matrix(w_OI), rows, columns, height, width, amaxes)
    return torch.from_numpy(amaxes)


def quantize(
    w_OI: torch.Tensor, codes: torch.Tensor, scales_BC: torch.Tensor, block: tuple[int, int]
) -> tuple[float, float]:
    """Fill `codes`, uint8; return Σ(w − q·s)² and Σw², which is not finite if a weight is not."""
    return _sums(True, w_OI, codes, scales_BC, block)


def error(
    w_OI: torch.Tensor, codes: torch.Tensor, scales_BC: torch.Tensor, block: tuple[int, int]
) -> tuple[float, float]:
    """Return Σ(w − q·s)² and Σw²."""
    return _sums(False, w_OI, codes, scales_BC, block)


def _sums(
    encodes: bool,
    w_OI: torch.Tensor,
    codes: torch.Tensor,
    scales_BC: torch.Tensor,
    block: tuple[int, int],
) -> tuple[float, float]:
    (rows, columns), scales = w_OI.shape, scales_BC.contiguous().numpy()
    kind, bits, stride = _matrix(w_OI)
    written = _flat(codes.view(torch.uint8))
    error, energy = _process(encodes, kind, bits, stride, rows, columns, scales, *block, *written)
    return error, energy


def _matrix(w_OI: torch.Tensor) -> tuple[int, Any, int]:
    """A weight's kind, its bits, and the distance of its rows."""
    integers, unsigned = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}[w_OI.itemsize]
    bits, stride = _flat(w_OI.view(integers))
    return KINDS[w_OI.dtype], bits.view(unsigned), stride


def _flat(matrix: torch.Tensor) -> tuple[Any, int]:
    """All elements from the first to the last of a matrix, and the distance of its rows."""
    rows, columns = matrix.shape
    if matrix.stride(1) != 1 and columns > 1:
        raise ValueError(f"rows of stride {matrix.stride()} are not contiguous")
    stride = matrix.stride(0) if rows > 1 else columns
    return matrix.as_strided(((rows - 1) * stride + columns,), (1,)).numpy(), stride


def decode(
    codes_RC: torch.Tensor,
    scales_BC: torch.Tensor,
    out_RC: torch.Tensor,
    *,
    first: int,
    block: tuple[int, int],
) -> None:
    """Fill `out`, bfloat16 or float32, with rows of one matrix. All tensors are contiguous.

    Args:
        codes_RC: E4M3 codes [rows, columns].
        scales_BC: float32 scales [rows of blocks, columns of blocks] from the first row's on.
        out_RC: [rows, columns].
        first: Where the first row lies in its block.
        block: The rows and columns that share a scale.
    """
    codes, scales = codes_RC.view(torch.uint8).numpy(), scales_BC.numpy()
    if out_RC.dtype == torch.bfloat16:
        kernel, out = _to_bf16, out_RC.view(torch.int16).numpy().view(np.uint16)
    else:
        kernel, out = _to_float32, out_RC.numpy()
    kernel(codes, scales, out, first, *block)


@exact
def _value(byte: Any) -> Any:
    """The float32 value of an E4M3 byte; no subnormal float32 is used on the way."""
    code = u32(byte & u32(0x7F))
    subnormal = f32(np.int32(code)) * _TWO_M9
    normal = as_float(u32(u32(code << u32(20)) + u32(120 << 23)))
    magnitude = normal if code > u32(7) else subnormal
    magnitude = magnitude if code != u32(0x7F) else _NAN
    return as_float(u32(as_bits(magnitude) | u32(u32(byte & u32(0x80)) << u32(24))))


@exact
def _spread(scales: Any, width: int, columns: int, row: Any) -> None:
    """Give each of `width` columns the scale of its block in `row`."""
    for block in range(scales.size):
        scale, start = scales[block], block * width
        for column in range(min(width, columns - start)):
            put(row, start + column, scale)


@entry_point
def _to_bf16(codes: Any, scales: Any, out: Any, first: int, height: int, width: int) -> None:
    rows, columns = codes.shape
    scale, last = np.empty(columns, np.float32), -1
    for row in range(rows):
        if (first + row) // height != last:
            last = (first + row) // height
            _spread(scales[last], width, columns, scale)
        for column in range(columns):
            out[row, column] = u16(bf16_bits(_value(u32(codes[row, column])) * scale[column]))


@entry_point
def _to_float32(codes: Any, scales: Any, out: Any, first: int, height: int, width: int) -> None:
    rows, columns = codes.shape
    scale, last = np.empty(columns, np.float32), -1
    for row in range(rows):
        if (first + row) // height != last:
            last = (first + row) // height
            _spread(scales[last], width, columns, scale)
        for column in range(columns):
            out[row, column] = _value(u32(codes[row, column])) * scale[column]


@exact
def _float(kind: int, bits: Any) -> Any:
    """The float32 of a weight's bits (uint32); Inf for NaN of 16 bits."""
    if kind == FLOAT32:
        return as_float(bits)
    if kind == BFLOAT16:
        return as_float(u32(bits << u32(16)))
    magnitude = as_bits(f16_magnitude(u32(bits & u32(0x7FFF))))
    return as_float(u32(magnitude | u32(u32(bits & u32(0x8000)) << u32(16))))


@exact
def _largest(bits: Any, start: Any, stop: Any, mask: Any) -> Any:
    """The largest bits of a magnitude in a run: they order as the magnitudes do."""
    largest = u32(0)
    for at in range(start, stop):
        magnitude = u32(u32(get(bits, at)) & mask)
        largest = magnitude if magnitude > largest else largest
    return largest


@entry_point
def _amaxes(
    kind: int,
    bits: Any,
    stride: int,
    rows: int,
    columns: int,
    height: int,
    width: int,
    amaxes: Any,
) -> None:
    mask = _MAGNITUDE if kind == FLOAT32 else u32(0x7FFF)
    for row in range(rows):
        for block in range(amaxes.shape[1]):
            start, stop = block * width, min(columns, (block + 1) * width)
            largest = _largest(bits, row * stride + start, row * stride + stop, mask)
            amax = _float(kind, largest)
            if amax > amaxes[row // height, block]:
                amaxes[row // height, block] = amax


@exact
def _add(sums: Any, lane: Any, w: Any, byte: Any, scale: Any) -> None:
    """Add one weight's (w − q·s)² and w² to its lane."""
    w64 = f64(w)
    difference = w64 - f64(_value(byte)) * f64(scale)
    put(sums, lane, get(sums, lane) + difference * difference)
    put(sums, LANES + lane, get(sums, LANES + lane) + w64 * w64)


@exact
def _code(w: Any, scale: Any) -> Any:
    """E4M3 of fl32(w/scale), as uint32; a NaN becomes 448."""
    bits = as_bits(w)
    quotient = as_float(u32(bits & _MAGNITUDE)) / scale
    quotient = quotient if quotient < _TOP else _TOP
    return u32(e4m3_byte(quotient) | u32(u32(bits & _SIGN) >> u32(24)))


def _row_function(kind: int, encodes: bool) -> Any:
    """A function that quantizes a row of weights of one kind, or only adds up its errors."""

    @exact
    def process(
        bits: Any, at: Any, columns: int, scale: Any, codes: Any, to: Any, sums: Any
    ) -> None:
        for start in range(0, columns, LANES):
            for lane in range(min(LANES, columns - start)):
                column = start + lane
                w = _float(kind, u32(get(bits, at + column)))
                if encodes:
                    byte = _code(w, get(scale, column))
                    put(codes, to + column, u8(byte))
                else:
                    byte = u32(get(codes, to + column))
                _add(sums, lane, w, byte, get(scale, column))

    return process


_encode_bf16, _encode_f16, _encode_f32, _read_bf16, _read_f16, _read_f32 = (
    _row_function(kind, encodes)
    for encodes in (True, False)
    for kind in (BFLOAT16, FLOAT16, FLOAT32)
)


@entry_point
def _process(
    encodes: bool,
    kind: int,
    bits: Any,
    stride: int,
    rows: int,
    columns: int,
    scales: Any,
    height: int,
    width: int,
    codes: Any,
    codes_stride: int,
) -> Any:
    """Fill the codes, or read them; Σ(w − q·s)² and Σw²."""
    scale, last, sums = np.empty(columns, np.float32), -1, np.zeros(2 * LANES, np.float64)
    for row in range(rows):
        if row // height != last:
            last = row // height
            _spread(scales[last], width, columns, scale)
        at, to = row * stride, row * codes_stride
        if encodes:
            if kind == BFLOAT16:
                _encode_bf16(bits, at, columns, scale, codes, to, sums)
            elif kind == FLOAT16:
                _encode_f16(bits, at, columns, scale, codes, to, sums)
            else:
                _encode_f32(bits, at, columns, scale, codes, to, sums)
        elif kind == BFLOAT16:
            _read_bf16(bits, at, columns, scale, codes, to, sums)
        elif kind == FLOAT16:
            _read_f16(bits, at, columns, scale, codes, to, sums)
        else:
            _read_f32(bits, at, columns, scale, codes, to, sums)
    return sums[:LANES].sum(), sums[LANES:].sum()
