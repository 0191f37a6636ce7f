# SPDX-License-Identifier: Apache-2.0
"""The passes over tensors that only read, or only dequantize, at the speed of memory:
dequantize, and the error of a quantized tensor.

They decode any byte an NVFP4 checkpoint may hold, good or bad: block scales go through a table of
all 256 E4M3 bytes, NaN and negative ones included.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fourfold.formats.nvfp4.simd import (
    LANES,
    SCRATCH_SIZE,
    SIGN_HIGH,
    SIGN_LOW,
    STAGE_SIZE,
    as_bits,
    as_float,
    bf16_bits,
    e2m1_value,
    entry_point,
    exact,
    get,
    load_lanes,
    load_u8,
    load_u64,
    put,
    store_u64,
)
from fourfold.formats.nvfp4.sweep import FLOAT32

f32, u32, u64 = np.float32, np.uint32, np.uint64

_CODES_LOW = SIGN_LOW - 2 * LANES  # rows of the search that these passes use for the packed codes
_CODES_HIGH = SIGN_LOW - LANES
_SCALE = SIGN_LOW - 3 * LANES


@exact
def _load_codes(f: Any, codes: int, scales: int, blocks: int, values: Any, scale: Any) -> None:
    for lane in range(blocks):
        word = load_u64(codes + 8 * lane)
        put(f, _CODES_LOW + lane, as_float(u32(word & u64(0xFFFFFFFF))))
        put(f, _CODES_HIGH + lane, as_float(u32(word >> u64(32))))
    for lane in range(blocks):
        put(f, _SCALE + lane, get(values, np.intp(load_u8(scales + lane))) * scale)
    for lane in range(blocks, LANES):
        put(f, _CODES_LOW + lane, f32(0))
        put(f, _CODES_HIGH + lane, f32(0))
        put(f, _SCALE + lane, f32(1))


@exact
def _dequantize_lanes(f: Any) -> None:
    for lane in range(LANES):
        m = get(f, _SCALE + lane)
        low, high = as_bits(get(f, _CODES_LOW + lane)), as_bits(get(f, _CODES_HIGH + lane))
        for k in range(8):
            put(f, k * LANES + lane, e2m1_value(low, k) * m)
            put(f, (k + 8) * LANES + lane, e2m1_value(high, k) * m)


@exact
def _words_bf16(f: Any, raw: Any) -> None:
    for lane in range(LANES):
        for j in range(4):
            row = 4 * j * LANES + lane
            low = bf16_bits(get(f, row)) | (bf16_bits(get(f, row + LANES)) << u32(16))
            third, fourth = get(f, row + 2 * LANES), get(f, row + 3 * LANES)
            high = bf16_bits(third) | (bf16_bits(fourth) << u32(16))
            put(raw, j * LANES + lane, u64(u32(low)) | (u64(u32(high)) << u64(32)))


@exact
def _words_32(f: Any, raw: Any) -> None:
    for lane in range(LANES):
        for j in range(8):
            low = as_bits(get(f, 2 * j * LANES + lane))
            high = as_bits(get(f, (2 * j + 1) * LANES + lane))
            put(raw, j * LANES + lane, u64(low) | (u64(high) << u64(32)))


@exact
def _unstage(raw: Any, address: int, blocks: int, words: int) -> None:
    for lane in range(blocks):
        for j in range(words):
            store_u64(address + 8 * (lane * words + j), get(raw, j * LANES + lane))


@entry_point
def dequantize_kernel(
    kind: int, blocks: int, codes: int, scales: int, out: int, values: Any, global_scale: Any
) -> None:
    """Contiguous blocks at addresses to float32 or bf16 (`kind`); values: E4M3 by byte."""
    f = np.empty(SCRATCH_SIZE, np.float32)
    raw = np.empty(STAGE_SIZE, np.uint64)
    words = 8 if kind == FLOAT32 else 4
    for start in range(0, blocks, LANES):
        n = min(LANES, blocks - start)
        _load_codes(f, codes + 8 * start, scales + start, n, values, global_scale)
        _dequantize_lanes(f)
        if kind == FLOAT32:
            _words_32(f, raw)
        else:
            _words_bf16(f, raw)
        _unstage(raw, out + 8 * words * start, n, words)


@exact
def _squares(f: Any, sums: Any) -> None:
    """Add Σ (w − q·m)² and Σ w² of each lane to `sums`, in float64."""
    for lane in range(LANES):
        m = np.float64(get(f, _SCALE + lane))
        low = u32(as_bits(get(f, _CODES_LOW + lane)) ^ as_bits(get(f, SIGN_LOW + lane)))
        high = u32(as_bits(get(f, _CODES_HIGH + lane)) ^ as_bits(get(f, SIGN_HIGH + lane)))
        error, energy = 0.0, 0.0
        for k in range(8):  # the xor leaves q negative where its sign is not that of w
            a = np.float64(get(f, k * LANES + lane))
            b = np.float64(get(f, (k + 8) * LANES + lane))
            d, e = a - np.float64(e2m1_value(low, k)) * m, b - np.float64(e2m1_value(high, k)) * m
            error += d * d + e * e
            energy += a * a + b * b
        put(sums, lane, get(sums, lane) + error)
        put(sums, LANES + lane, get(sums, LANES + lane) + energy)


@entry_point
def error_kernel(
    kind: int,
    rows: int,
    blocks: int,
    weight: int,
    weight_stride: int,
    codes: int,
    codes_stride: int,
    scales: int,
    scales_stride: int,
    values: Any,
    global_scale: Any,
) -> Any:
    """Σ (w − q·m)² and Σ w² over rows × blocks at addresses."""
    f = np.empty(SCRATCH_SIZE, np.float32)
    raw = np.empty(STAGE_SIZE, np.uint64)
    sums = np.zeros(2 * LANES, np.float64)
    block_bytes = 64 if kind == FLOAT32 else 32
    for row in range(rows):
        for start in range(0, blocks, LANES):
            n = min(LANES, blocks - start)
            source = weight + row * weight_stride + start * block_bytes
            load_lanes(f, raw, source, n, kind, f32(1))
            to = codes + row * codes_stride + 8 * start
            _load_codes(f, to, scales + row * scales_stride + start, n, values, global_scale)
            _squares(f, sums)
    return sums[:LANES].sum(), sums[LANES:].sum()
