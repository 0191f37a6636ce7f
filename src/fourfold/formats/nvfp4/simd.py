# SPDX-License-Identifier: Apache-2.0
"""The parts that the CPU kernels share: 64 blocks in SIMD lanes, each step a vector operation.

A block is 16 weights, and most of what is done to it is per block: its scale, its loss, whether a
candidate won. The kernels therefore work on 64 blocks in lockstep, transposed: row k of a scratch
buffer holds element k of each block, and the loops over the 64 lanes are what LLVM vectorizes.

    scratch   float32 [ROWS · LANES], row r at r·LANES; integers lie in it bit for bit
    rows 0-15   Y     |w|, times a power of two
    then        one row for each figure of a block (see the names below)

One flat buffer with constant offsets is deliberate: from them LLVM sees that rows never overlap,
and needs no run-time checks, which cost more than a candidate. For the same reason `get` and `put`
are unchecked and do not wrap negative indices. Weights, codes and scales are passed as addresses:
any alignment, any row stride, and one compilation for all of them.

Nothing in here is `fastmath`: loads, stores and codes are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from fourfold.formats.nvfp4.sweep import BFLOAT16, FLOAT32

BLOCK_SIZE = 16
LANES = 64
TILE, LINE = 64, 16  # rows and columns of what is transposed at a time


# Rows of the scratch buffer, as offsets.
BMAX = 16 * LANES  # largest |w| of the block
ENERGY = 17 * LANES  # Σ |w|²
FIRST = 18 * LANES  # the first candidate (E4M3 byte) that does not clip
LAST = 19 * LANES  # the last candidate that can win
BEST = 20 * LANES  # smallest loss so far
SECOND = 21 * LANES  # second smallest
BYTE = 22 * LANES  # the block scale that gave BEST
SIGN_LOW = 23 * LANES  # sign bits in place (bit 3 of each nibble), elements 0-7
SIGN_HIGH = 24 * LANES  # elements 8-15
SCRATCH_SIZE = 25 * LANES
STAGE_SIZE = 8 * LANES  # uint64: the raw words of 64 blocks of the widest dtype

f32, u32, u64 = np.float32, np.uint32, np.uint64

_TWO_M9, _TWO_M24 = f32(2.0**-9), f32(2.0**-24)
_SIX, _INF, _HALF = f32(6), f32(np.inf), f32(0.5)
_TWICE_E2M1 = u32(0xC8643210)  # nibble c is twice the magnitude of code c
_EXPONENT, _ONE_BITS, _ROUNDER = u32(0x7F800000), u32(0x3F800000), u32(22 << 23 | 0x400000)
_E4M3_NORMAL, _E4M3_ROUNDER = u32(121 << 23), u32(20 << 23 | 0x400000)


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def exact(function: _Function) -> _Function:
    """Compile a part of a kernel: IEEE arithmetic, each operation rounded."""
    return cast(_Function, njit(**_OPTIONS)(function))


def contract(function: _Function) -> _Function:
    """Compile a part of a kernel in which products and sums may fuse, where the CPU can."""
    return cast(_Function, njit(**_OPTIONS, fastmath={"contract"})(function))


def _source_stamp(function: Callable[..., Any]) -> tuple[tuple[str, int, int], ...]:
    folders = {Path(__file__).parent, Path(function.__code__.co_filename).parent}
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files)


def entry_point(function: _Function) -> _Function:
    """Compile a kernel at its first call, and keep the machine code on disk where that is possible
    (beside the package, or in the user's cache folder).

    Numba takes cached code for stale when the kernel's own file has changed; what it calls lies in
    other files, so the stamp is that of all files here and beside the kernel.
    """
    try:
        dispatcher = njit(**_OPTIONS, cache=True)(function)
        dispatcher._cache._cache_file._source_stamp = _source_stamp(function)
    except (RuntimeError, AttributeError, OSError):  # nowhere to write, or another numba
        return exact(function)
    return cast(_Function, dispatcher)


@intrinsic  # type: ignore[untyped-decorator]
def as_bits(typing: Any, x: Any) -> Any:
    """The bits of a float32, as uint32."""
    return types.uint32(types.float32), lambda _c, b, _s, a: b.bitcast(a[0], ir.IntType(32))


@intrinsic  # type: ignore[untyped-decorator]
def as_float(typing: Any, x: Any) -> Any:
    """The float32 of 32 bits."""
    return types.float32(types.uint32), lambda _c, b, _s, a: b.bitcast(a[0], ir.FloatType())


@intrinsic  # type: ignore[untyped-decorator]
def get(typing: Any, buffer: Any, index: Any) -> Any:
    """buffer[index], unchecked."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load(builder.gep(array.data, [args[1]]))

    return buffer.dtype(buffer, types.intp), code


@intrinsic  # type: ignore[untyped-decorator]
def put(typing: Any, buffer: Any, index: Any, value: Any) -> Any:
    """buffer[index] = value, unchecked."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        builder.store(args[2], builder.gep(array.data, [args[1]]))
        return context.get_dummy_value()

    return types.void(buffer, types.intp, buffer.dtype), code


def _loader(numba_type: Any, bits: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def load(typing: Any, address: Any) -> Any:
        def code(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            return builder.load(pointer, align=1)

        return numba_type(types.intp), code

    return load


def _storer(numba_type: Any, bits: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def store(typing: Any, address: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, _s: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(bits).as_pointer())
            builder.store(args[1], pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.intp, numba_type), code

    return store


load_u8, load_u64 = _loader(types.uint8, 8), _loader(types.uint64, 64)
store_u8, store_u64 = _storer(types.uint8, 8), _storer(types.uint64, 64)


@exact
def scale_of(byte: Any) -> Any:
    """The float32 value of an E4M3 byte 1..126 (uint32).

    No subnormal float32 is used on the way: they are slow on some CPUs, and zero in processes in
    which a library has switched them off.
    """
    subnormal = f32(np.int32(byte)) * _TWO_M9
    normal = as_float(u32(u32(byte << u32(20)) + u32(120 << 23)))
    return normal if byte > u32(7) else subnormal


@exact
def e2m1_code(x: Any) -> Any:
    """E2M1 code 0..7 (uint32) of x >= 0: to the nearest, halves to even, clamped to 6.

    In the octave of x (one octave below 2) the codes are an even spacing apart; adding 1.5·2²² of
    them rounds x to that spacing, and the low bits of the sum count it.
    """
    x = x if x < _SIX else _SIX
    exponent = as_bits(x) & _EXPONENT
    exponent = u32(exponent if exponent > _ONE_BITS else _ONE_BITS)
    rounder = u32(exponent + _ROUNDER)
    count = u32(as_bits(x + as_float(rounder)) - rounder)
    return u32(count + u32(u32(exponent - _ONE_BITS) >> u32(22)))


@exact
def e2m1_value(word: Any, k: int) -> Any:
    """The float32 value of E2M1 code k of a word of eight."""
    nibble = u32(word >> u32(4 * k))
    twice = u32(u32(_TWICE_E2M1 >> u32((nibble & u32(7)) << u32(2))) & u32(15))
    q = f32(np.int32(twice)) * _HALF
    return as_float(u32(as_bits(q) | u32((nibble & u32(8)) << u32(28))))


@exact
def bf16_bits(x: Any) -> Any:
    """The bf16 bits (uint32) of a float32, to the nearest even; NaN stays NaN."""
    bits = as_bits(x)
    rounded = u32(u32(bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))
    return u32(rounded if x == x else u32(0x7FC0))


@exact
def load_tile(words: Any, row: int, column: int, rows: int, columns: int, tile: Any) -> None:
    """Fill `tile`, uint32 [LINE, TILE] in one row, with some words of a matrix, transposed.

    A row of the matrix gives one line of a CPU's cache.
    """
    for r in range(rows):
        line = words[row + r, column : column + columns]
        for c in range(columns):
            put(tile, c * TILE + r, u32(get(line, c)))


@exact
def stage(raw: Any, address: Any, blocks: int, words: int) -> None:
    """Transpose `blocks` blocks of `words` uint64 each; the lanes that are left become zero."""
    for lane in range(blocks):
        for j in range(words):
            put(raw, j * LANES + lane, load_u64(address + 8 * (lane * words + j)))
    for lane in range(blocks, LANES):
        for j in range(words):
            put(raw, j * LANES + lane, u64(0))


@exact
def load_lanes(f: Any, raw: Any, address: Any, blocks: int, kind: int, factor: Any) -> None:
    """Fill Y with |w|·factor and SIGN_LOW, SIGN_HIGH, from blocks in memory at `address`."""
    if kind == FLOAT32:
        stage(raw, address, blocks, 8)
        _expand_32(f, raw, factor)
        return
    stage(raw, address, blocks, 4)
    if kind == BFLOAT16:
        _expand_bf16(f, raw, factor)
    else:
        _expand_f16(f, raw, factor)
    _signs_16(f, raw)


@exact
def _bf16_magnitude(bits: Any) -> Any:
    return as_float(u32(bits << u32(16)))


@exact
def f16_magnitude(bits: Any) -> Any:
    """The float32 of the bits (uint32) of an fp16 without its sign; NaN becomes Inf."""
    normal = as_float(u32(u32(bits << u32(13)) + u32(112 << 23)))
    x = normal if bits > u32(0x3FF) else f32(np.int32(bits)) * _TWO_M24
    return x if bits < u32(0x7C00) else _INF  # Inf and NaN must not pass for numbers


def _expander(magnitude: Any) -> Any:
    """A function that fills Y from words of four 16-bit floats."""

    @exact
    def expand(f: Any, raw: Any, factor: Any) -> None:
        for lane in range(LANES):
            for j in range(4):
                v = get(raw, j * LANES + lane)
                for k in range(4):
                    bits = u32((v >> u64(16 * k)) & u64(0x7FFF))
                    put(f, (4 * j + k) * LANES + lane, magnitude(bits) * factor)

    return expand


_expand_bf16, _expand_f16 = _expander(_bf16_magnitude), _expander(f16_magnitude)


@exact
def _signs_16(f: Any, raw: Any) -> None:
    for lane in range(LANES):
        low = _four_signs(get(raw, lane)) | (_four_signs(get(raw, LANES + lane)) << u64(16))
        put(f, SIGN_LOW + lane, as_float(u32(low)))
    for lane in range(LANES):
        a, b = get(raw, 2 * LANES + lane), get(raw, 3 * LANES + lane)
        put(f, SIGN_HIGH + lane, as_float(u32(_four_signs(a) | (_four_signs(b) << u64(16)))))


@exact
def _four_signs(v: Any) -> Any:
    """The sign bits of four 16-bit floats, at bits 3, 7, 11 and 15."""
    low = ((v >> u64(12)) & u64(0x8)) | ((v >> u64(24)) & u64(0x80))
    return low | ((v >> u64(36)) & u64(0x800)) | ((v >> u64(48)) & u64(0x8000))


@exact
def _expand_32(f: Any, raw: Any, factor: Any) -> None:
    mask, top = u64(0x7FFFFFFF), u64(0x80000000)
    for lane in range(LANES):
        low, high = u64(0), u64(0)
        for j in range(8):
            v = get(raw, j * LANES + lane)
            put(f, 2 * j * LANES + lane, as_float(u32(v & mask)) * factor)
            put(f, (2 * j + 1) * LANES + lane, as_float(u32((v >> u64(32)) & mask)) * factor)
            signs = ((v & top) >> u64(28)) | ((v >> u64(56)) & u64(0x80))
            if j < 4:
                low |= signs << u64(8 * j)
            else:
                high |= signs << u64(8 * (j - 4))
        put(f, SIGN_LOW + lane, as_float(u32(low)))
        put(f, SIGN_HIGH + lane, as_float(u32(high)))


@exact
def e4m3_byte(x: Any) -> Any:
    """The E4M3 byte (uint32) of x in [2⁻⁹, 448], to the nearest, halves to even: as `e2m1_code`."""
    exponent = as_bits(x) & _EXPONENT
    exponent = u32(exponent if exponent > _E4M3_NORMAL else _E4M3_NORMAL)
    rounder = u32(exponent + _E4M3_ROUNDER)
    count = u32(as_bits(x + as_float(rounder)) - rounder)
    return u32(count + u32(u32(exponent - _E4M3_NORMAL) >> u32(20)))


@exact
def pack_lanes(f: Any, global_scale: Any) -> None:
    """Replace SIGN_LOW, SIGN_HIGH by the packed codes under the scales in BYTE: fl32(|w|/m),
    correctly rounded, then E2M1."""
    for lane in range(LANES):
        m = scale_of(as_bits(get(f, BYTE + lane))) * global_scale
        low, high = as_bits(get(f, SIGN_LOW + lane)), as_bits(get(f, SIGN_HIGH + lane))
        for k in range(8):
            low |= u32(e2m1_code(get(f, k * LANES + lane) / m) << u32(4 * k))
            high |= u32(e2m1_code(get(f, (k + 8) * LANES + lane) / m) << u32(4 * k))
        put(f, SIGN_LOW + lane, as_float(u32(low)))
        put(f, SIGN_HIGH + lane, as_float(u32(high)))


@exact
def store_lanes(f: Any, codes: Any, scales: Any, blocks: int) -> None:
    """Write the packed codes (8 bytes a block) and the block scales (one byte) of the lanes."""
    for lane in range(blocks):
        low, high = as_bits(get(f, SIGN_LOW + lane)), as_bits(get(f, SIGN_HIGH + lane))
        store_u64(codes + 8 * lane, u64(low) | (u64(high) << u64(32)))
    for lane in range(blocks):
        store_u8(scales + lane, np.uint8(as_bits(get(f, BYTE + lane))))
