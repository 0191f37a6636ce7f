# SPDX-License-Identifier: Apache-2.0
"""The passes that only read, or only make numbers of codes: amax and dequantize; and activations
rounded to NVFP4 and back. Their definitions: `nvfp4.py`, `reference.py`, `activations.py`."""

import triton
import triton.language as tl

from fourfold.formats.nvfp4.blocks_cuda import (
    BFLOAT16,
    FLOAT32,
    as_bits,
    as_float,
    bf16_bits,
    e4m3_byte,
    half,
    round_e2m1,
    scale_of,
    value_of,
)

_NAN = tl.constexpr(float("nan"))


@triton.jit
def amax_kernel(words, result, count, KIND: tl.constexpr, TILE: tl.constexpr):
    """The largest bits of a magnitude of each of N weights, the grid being (tiles of a weight, N):
    words [N, count] -> int32 [N], zero before. NaN lies above Inf, and that above all numbers."""
    n = tl.program_id(1)
    word = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bits = tl.load(words + (n.to(tl.int64) * count + word), mask=word < count, other=0)
    if KIND == FLOAT32:
        low = bits.to(tl.int32) & 0x7FFFFFFF
        magnitude = tl.maximum(low, (bits >> 32).to(tl.int32) & 0x7FFFFFFF)
    else:
        low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
        magnitude = tl.maximum(low & 0x7FFF, (low >> 16) & 0x7FFF)
        magnitude = tl.maximum(magnitude, tl.maximum(high & 0x7FFF, (high >> 16) & 0x7FFF))
    tl.atomic_max(result + n, tl.max(magnitude, axis=0))


@triton.jit
def dequantize_kernel(
    codes, scales, global_scale, out, count, IS_BF16: tl.constexpr, TILE: tl.constexpr
):
    """codes (int16 [count] for bf16, uint8 [count] for float32), scales uint8 -> out int64 [count].

    A thread makes 64 bits of output: four bf16 or two float32. Any byte is a scale, NaN included.
    """
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = at < count
    word = tl.load(codes + at, mask=valid, other=0).to(tl.int32)
    byte = tl.load(scales + at // (4 if IS_BF16 else 8), mask=valid, other=0).to(tl.int32)
    s = as_float(as_bits(scale_of(byte & 0x7F)) | ((byte & 0x80) << 24))
    m = tl.where((byte & 0x7F) == 0x7F, _NAN, s) * global_scale
    result = tl.zeros_like(at)
    if IS_BF16:
        for k in tl.static_range(4):
            bits = bf16_bits(value_of((word >> (4 * k)) & 15) * m)
            result |= bits.to(tl.int64) << (16 * k)
    else:
        for k in tl.static_range(2):
            bits = as_bits(value_of((word >> (4 * k)) & 15) * m)
            result |= (bits.to(tl.int64) & 0xFFFFFFFF) << (32 * k)
    tl.store(out + at, result, mask=valid)


@triton.jit
def fake_quantize_kernel(x, input_scale, out, blocks, KIND: tl.constexpr, TILE: tl.constexpr):
    """x̂ of activations: bits of 16 or 32 [blocks, 16] -> the same."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    valid = (block < blocks)[:, None]
    raw = tl.load(x + at, mask=valid, other=0).to(tl.int32)
    if KIND == FLOAT32:
        sign, magnitude = raw & (-0x7FFFFFFF - 1), raw & 0x7FFFFFFF
    elif KIND == BFLOAT16:
        sign, magnitude = raw << 16 & (-0x7FFFFFFF - 1), (raw & 0x7FFF) << 16
    else:
        sign, magnitude = raw << 16 & (-0x7FFFFFFF - 1), as_bits(half(raw & 0x7FFF))
    bmax = tl.max(magnitude, axis=1)
    quotient = tl.math.div_rn(as_float(tl.minimum(bmax, 0x7F800000)), 6.0 * input_scale)
    byte = e4m3_byte(tl.minimum(quotient, 448.0))
    m = tl.where(byte == 0, 1.0, scale_of(byte) * input_scale)[:, None]
    _, q = round_e2m1(tl.math.div_rn(as_float(tl.minimum(magnitude, 0x7F800000)), m))
    rounded = tl.where((byte == 0)[:, None], 0.0, q * m)
    rounded = as_float(as_bits(rounded) | sign)
    rounded = tl.where((bmax > 0x7F800000)[:, None], _NAN, rounded)
    if KIND == FLOAT32:
        bits = as_bits(rounded)
    elif KIND == BFLOAT16:
        bits = bf16_bits(rounded).to(tl.int16)
    else:
        bits = rounded.to(tl.float16).to(tl.int16, bitcast=True)
    tl.store(out + at, bits, mask=valid)
