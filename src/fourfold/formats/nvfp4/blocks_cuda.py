# SPDX-License-Identifier: Apache-2.0
"""The parts that the Triton kernels share: loading blocks of 16 weights into registers, and taking
the bits of their formats apart.

A thread holds a block, its 16 magnitudes in 16 variables (a tuple, in Triton's words), so that no
value passes between threads, and the search runs as it would in CUDA. Bytes are read as words of
64 bits: four for a block of bf16 or fp16, eight for one of float32; the raw halves of the words
keep the signs until the codes are packed. Nothing but integers, float32 and float64 is asked of the
device: bf16 and E4M3 are taken apart by hand.

**Rounding.** Kernels are compiled without fusing (`enable_fp_fusion=False`): products and sums fuse
where `tl.fma` says so, and nowhere else. Plain Triton division is good to two units in the last
place; `div_rn` is IEEE's. Triton flushes no subnormal numbers.

The functions are compiled by Triton, or run by its interpreter where TRITON_INTERPRET is set.
"""

import triton
import triton.language as tl

from fourfold.formats.nvfp4 import sweep

BFLOAT16 = tl.constexpr(sweep.BFLOAT16)
FLOAT16 = tl.constexpr(sweep.FLOAT16)
FLOAT32 = tl.constexpr(sweep.FLOAT32)

_EXPONENT = tl.constexpr(0x7F800000)
_ONE_BITS = tl.constexpr(127 << 23)
_ROUNDER = tl.constexpr((22 << 23) + (1 << 22))
_E4M3_NORMAL = tl.constexpr(121 << 23)
_E4M3_ROUNDER = tl.constexpr((20 << 23) + (1 << 22))
_E4M3_UNIT = tl.constexpr(2.0**120)
_E2M1_UNIT = tl.constexpr(2.0**126)


@triton.jit
def as_bits(x):
    """The bits of a float32, as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """The float32 of 32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_blocks(words, at, valid, KIND: tl.constexpr):
    """16 magnitudes (float32) of each block, and its raw halves of words (int32).

    words: int64, at: number of each block. Blocks that are not valid are zero.
    """
    WORDS: tl.constexpr = 8 if KIND == FLOAT32 else 4
    magnitudes = ()
    raw = ()
    for j in tl.static_range(WORDS):
        word = tl.load(words + (at * WORDS + j), mask=valid, other=0)
        low = word.to(tl.int32)
        high = (word >> 32).to(tl.int32)
        raw += (low, high)
        magnitudes += _magnitudes(low, KIND)
        magnitudes += _magnitudes(high, KIND)
    return magnitudes, raw


@triton.jit
def _magnitudes(word, KIND: tl.constexpr):
    if KIND == FLOAT32:
        magnitudes = (as_float(word & 0x7FFFFFFF),)
    elif KIND == BFLOAT16:
        magnitudes = (as_float((word << 16) & 0x7FFF0000), as_float(word & 0x7FFF0000))
    else:
        magnitudes = (half(word & 0x7FFF), half((word >> 16) & 0x7FFF))
    return magnitudes


@triton.jit
def half(bits):
    """The float32 of 16 bits of an fp16 (int32)."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def largest(magnitudes):
    """The largest magnitude of each block."""
    bmax = magnitudes[0]
    for k in tl.static_range(1, 16):
        bmax = tl.maximum(bmax, magnitudes[k])
    return bmax


@triton.jit
def scale_of(byte):
    """The float32 value of an E4M3 byte 0..126 (int32).

    Its bits, in the place that float32 has for them, are those of a number 2⁻¹²⁰ as large,
    subnormal ones included.
    """
    return as_float(byte << 20) * _E4M3_UNIT


@triton.jit
def value_of(code):
    """The float32 value of an E2M1 code 0..15 (int32), as `scale_of`."""
    magnitude = as_float((code & 7) << 22) * _E2M1_UNIT
    return as_float(as_bits(magnitude) | ((code & 8) << 28))


@triton.jit
def round_e2m1(x):
    """E2M1 code 0..7 (int32) and its value, of x >= 0: to the nearest, halves to even, at most 6.

    In the octave of x (one octave below 2) the codes are an even spacing apart; adding 1.5·2²² of
    them rounds x to that spacing, and the low bits of the sum count it.
    """
    x = tl.minimum(x, 6.0)
    exponent = tl.maximum(as_bits(x) & _EXPONENT, _ONE_BITS)
    rounder = exponent + _ROUNDER
    rounded = x + as_float(rounder)
    code = (as_bits(rounded) - rounder) + ((exponent - _ONE_BITS) >> 22)
    return code, rounded - as_float(rounder)


@triton.jit
def e4m3_byte(x):
    """The E4M3 byte (int32) of x in [0, 448], to the nearest, halves to even: as `round_e2m1`."""
    exponent = tl.maximum(as_bits(x) & _EXPONENT, _E4M3_NORMAL)
    rounder = exponent + _E4M3_ROUNDER
    count = as_bits(x + as_float(rounder)) - rounder
    return count + ((exponent - _E4M3_NORMAL) >> 20)


@triton.jit
def bf16_bits(x):
    """The bf16 bits (int32) of a float32, to the nearest even; NaN stays NaN."""
    bits = as_bits(x)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(x == x, rounded, 0x7FC0)


@triton.jit
def divide(x, m, inverse, FMA: tl.constexpr):
    """fl(x/m), correctly rounded, where it lies in [2⁻²⁰, 2²⁰] and x, m are in a kernel's units.

    inverse: fl(1/m), correctly rounded. A residual, by fused multiplication, makes the quotient one
    of the two floats beside it; another one, then exact, the nearer of them (Markstein, 1990). IEEE
    division spends more, on a reciprocal of its own and on the ends of the range. Smaller quotients
    may be off by a unit, and have code 0 either way. FMA: whether `tl.fma` does fuse.
    """
    if FMA:
        quotient = x * inverse
        quotient = tl.fma(tl.fma(quotient, -m, x), inverse, quotient)
        quotient = tl.fma(tl.fma(quotient, -m, x), inverse, quotient)
    else:
        quotient = tl.math.div_rn(x, m)
    return quotient


@triton.jit
def pack(magnitudes, raw, m, KIND: tl.constexpr, FMA: tl.constexpr):
    """The packed codes (int64) of each block under the step m; see `divide`."""
    inverse = tl.math.div_rn(1.0, m)
    low = tl.zeros_like(raw[0])
    high = tl.zeros_like(raw[0])
    for k in tl.static_range(16):
        code, _ = round_e2m1(divide(magnitudes[k], m, inverse, FMA))
        if KIND == FLOAT32:
            code |= (raw[k] >> 28) & 8
        elif k % 2 == 0:
            code |= (raw[k // 2] >> 12) & 8
        else:
            code |= (raw[k // 2] >> 28) & 8
        if k < 8:
            low |= code << (4 * k)
        else:
            high |= code << (4 * (k - 8))
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
