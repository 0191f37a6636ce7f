# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that quantizes weights to FP8, many of them at a time. Its definition is the
head of the package; how it is compiled and what it asks of a device, that of
`nvfp4.blocks_cuda`."""

import triton
import triton.language as tl

from fourfold.formats.fp8.reference import HIGHEST, LOWEST
from fourfold.formats.nvfp4.blocks_cuda import (
    BFLOAT16,
    FLOAT32,
    as_bits,
    as_float,
    e4m3_byte,
    half,
    scale_of,
)

_LOWEST = tl.constexpr(LOWEST)
_HIGHEST = tl.constexpr(HIGHEST)


@triton.jit
def exponent_of(amax):
    """The smallest e with amax ≤ 448·2^e, held to its range, of the bits of an amax; 0 of 0.

    amax is f·2^k with f in [1, 2), and 448 is 1¾·2⁸.
    """
    e = (amax >> 23) - (127 + 8) + ((amax & 0x7FFFFF) > 0x600000).to(tl.int32)
    e = tl.minimum(tl.maximum(e, _LOWEST), _HIGHEST)
    return tl.where(amax == 0, 0, e)


@triton.jit
def quantize_kernel(
    x,
    scales,
    codes,
    exponents,
    errors,
    energies,
    blocks,
    figures,
    KIND: tl.constexpr,
    MX: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Bits of N weights [N, blocks·WIDTH] -> codes alike, the grid being (tiles of a weight, N).

    MX: WIDTH weights share an exponent, which is stored in `exponents` [N, blocks]. Otherwise
    `scales` has a float32 for each weight. Σ(w − q·s)² and Σw² of each tile go to rows of `figures`
    float64; they are not finite where a weight is not.
    """
    n = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = (n * blocks + block)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    valid = (block < blocks)[:, None]
    raw = tl.load(x + at, mask=valid, other=0).to(tl.int32)
    if KIND == FLOAT32:
        sign, magnitude = (raw >> 24) & 0x80, raw & 0x7FFFFFFF
    elif KIND == BFLOAT16:
        sign, magnitude = (raw >> 8) & 0x80, (raw & 0x7FFF) << 16
    else:
        sign, magnitude = (raw >> 8) & 0x80, as_bits(half(raw & 0x7FFF))
    if MX:
        byte = exponent_of(tl.max(magnitude, axis=1)) + 127
        tl.store(exponents + (n * blocks + block), byte.to(tl.uint8), mask=block < blocks)
        s = as_float(byte << 23)[:, None] + tl.zeros([TILE, WIDTH], tl.float32)
    else:
        s = tl.load(scales + n) + tl.zeros([TILE, WIDTH], tl.float32)
    w = as_float(magnitude)
    code = e4m3_byte(tl.minimum(tl.math.div_rn(w, s), 448.0))
    tl.store(codes + at, (code | sign).to(tl.uint8), mask=valid)
    w64 = w.to(tl.float64)
    difference = w64 - scale_of(code).to(tl.float64) * s.to(tl.float64)
    to = n * figures + tl.program_id(0)
    tl.store(errors + to, tl.sum(tl.sum(difference * difference, axis=1), axis=0))
    tl.store(energies + to, tl.sum(tl.sum(w64 * w64, axis=1), axis=0))
