# SPDX-License-Identifier: Apache-2.0
"""The mse search on CPUs: the block scale that the full search over all 126 would pick, from about
ten of them; and max scales in the same style. `sweep.py` has the proof, and the names used here.

**Its own way.** r = fl(1/m), so δ = 5.2; REACH is the square of part 4 with 32u and 24u in place of
24u and 22u to cover its own rounding.

**Why so.** A candidate costs 7 vector operations for 16 weights (multiply, multiply, max, three
subtractions, one fused multiply-add), as balanced over the pipes of a Zen 4 or a Golden Cove as it
gets; all lanes walk the same offsets from their own FIRST, so nothing is gathered; the search below
continues only while one of the 64 lanes needs it. Search, codes and packing are one pass: the 64
blocks lie in the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fourfold.formats.nvfp4.simd import (
    BEST,
    BMAX,
    BYTE,
    ENERGY,
    FIRST,
    LANES,
    LAST,
    SCRATCH_SIZE,
    SECOND,
    STAGE_SIZE,
    as_bits,
    as_float,
    contract,
    e2m1_code,
    e4m3_byte,
    entry_point,
    exact,
    get,
    load_lanes,
    pack_lanes,
    put,
    scale_of,
    store_lanes,
)
from fourfold.formats.nvfp4.sweep import EDGE, FAR, FLOAT32, MAX, MSE_FULL, SPLIT

f32, u32 = np.float32, np.uint32

_ZERO, _ONE, _SIX, _INF = f32(0), f32(1), f32(6), f32(np.inf)
_SPLIT, _EDGE = f32(SPLIT), f32(EDGE)
_QUARTER = f32(0.25)
_REL, _ABS = f32(1 + 2.0**-19), f32(24 * 2.0**-24)  # part 4
_SLACK = f32(1 + 2.0**-16)  # the rounding of b − 6m, of which at least b/7 is left
_FAR = f32(FAR)
_SUBNORMALS_END, _TWO_9 = f32(2.0**-6), f32(2.0**9)
_E4M3_MIN, _E4M3_MAX = f32(2.0**-9), f32(448)


@exact
def _byte_above(x: Any) -> Any:
    """The least E4M3 byte 1..126 whose value is not below x (at most one more); 127 if none is."""
    normal = u32(u32(as_bits(x) - u32(120 << 23) + u32(0xFFFFF)) >> u32(20))
    normal = normal if normal < u32(127) else u32(127)
    x = x if x < _SUBNORMALS_END else _SUBNORMALS_END
    subnormal = u32(np.int32(x * _TWO_9)) + u32(1)
    return u32(normal if subnormal > u32(8) else subnormal)


@contract
def _first_candidates(f: Any, global_scale: Any) -> Any:
    """BMAX, ENERGY, FIRST, LAST of each lane; returns the number of steps from FIRST to LAST."""
    edge = _EDGE / global_scale
    nothing = scale_of(u32(1)) * global_scale * _QUARTER
    steps = u32(0)
    for lane in range(LANES):
        bmax, energy = _ZERO, _ZERO
        for k in range(16):
            y = get(f, k * LANES + lane)
            bmax = y if y > bmax else bmax
            energy += y * y
        put(f, BMAX + lane, bmax)
        put(f, ENERGY + lane, energy if bmax < _FAR else _INF)
        first = _byte_above(bmax * edge)
        last = u32((first if first > u32(8) else u32(8)) + u32(7))
        last = last if last < u32(126) else u32(126)
        last = last if bmax > nothing else u32(1)
        first = first if bmax > nothing else u32(1)
        put(f, FIRST + lane, as_float(u32(first)))
        put(f, LAST + lane, as_float(u32(last)))
        put(f, BEST + lane, _INF)
        put(f, SECOND + lane, _INF)
        put(f, BYTE + lane, as_float(u32(1)))
        span = u32(u32(last + u32(1)) - first)
        steps = span if span > steps else steps
    return steps


def _square(clips: bool) -> Any:
    """A function: the squared distance of x >= 0 to the E2M1 grid, unclamped unless `clips`."""

    @contract
    def square(x: Any) -> Any:
        c = x * _SPLIT
        c = c if c > _SPLIT else _SPLIT
        q = c - (c - x)
        if clips:
            q = q if q < _SIX else _SIX
        d = x - q
        return d * d

    return square


def _candidate(above: bool) -> Any:
    """A function that tries candidate FIRST + step of each lane, which clips nothing (part 1), or
    FIRST − step, which does (part 2)."""
    square = _square(clips=not above)

    @contract
    def candidate(f: Any, global_scale: Any, step: Any) -> None:
        for lane in range(LANES):
            first = as_bits(get(f, FIRST + lane))
            byte = u32(first + step) if above else u32(first - step)
            m = scale_of(byte) * global_scale
            inverse = _ONE / m
            even, odd = _ZERO, _ZERO
            for k in range(0, 16, 2):
                even += square(get(f, k * LANES + lane) * inverse)
                odd += square(get(f, (k + 1) * LANES + lane) * inverse)
            loss = (even + odd) * (m * m)
            valid = byte <= as_bits(get(f, LAST + lane)) if above else first > step
            _keep(f, lane, byte, _only_if(valid, loss))

    return candidate


_try_above, _try_below = _candidate(above=True), _candidate(above=False)


@contract
def _only_if(valid: Any, loss: Any) -> Any:
    # A function of its own: inlined late, it stays a select, and the loop above a vector loop.
    return loss if valid else _INF


@contract
def _keep(f: Any, lane: int, byte: Any, loss: Any) -> None:
    """Keep the best and the second best loss."""
    best, second, winner = get(f, BEST + lane), get(f, SECOND + lane), get(f, BYTE + lane)
    worse = loss if loss > best else best
    put(f, SECOND + lane, worse if worse < second else second)
    put(f, BYTE + lane, as_float(u32(byte)) if loss < best else winner)
    put(f, BEST + lane, loss if loss < best else best)


@contract
def _reach(best: Any, energy: Any) -> Any:
    """The largest loss with which a candidate could still win (part 4)."""
    root = np.sqrt(best) * _REL + np.sqrt(energy) * _ABS
    return root * root


@contract
def _below_can_win(f: Any, global_scale: Any, step: Any) -> Any:
    """True if any lane may have a winner at FIRST − step or lower (part 2)."""
    alive = u32(0)
    for lane in range(LANES):
        first = as_bits(get(f, FIRST + lane))
        m = scale_of(u32(first - step)) * global_scale
        clipped = get(f, BMAX + lane) - _SIX * m
        reach = _reach(get(f, BEST + lane), get(f, ENERGY + lane)) * _SLACK
        alive |= u32(1) if (first > step) & (clipped * clipped <= reach) else u32(0)
    return alive


@contract
def _count_close(f: Any) -> Any:
    """Return how many lanes have a second best within reach."""
    close = u32(0)
    for lane in range(LANES):
        reach = _reach(get(f, BEST + lane), get(f, ENERGY + lane))
        close += u32(1) if get(f, SECOND + lane) <= reach else u32(0)
    return close


@exact
def _settle(f: Any, global_scale: Any, below: int) -> None:
    """Decide by the definition where the second best is within reach (part 4)."""
    for lane in range(LANES):
        reach = _reach(get(f, BEST + lane), get(f, ENERGY + lane))
        if get(f, SECOND + lane) <= reach:
            first, last = as_bits(get(f, FIRST + lane)), as_bits(get(f, LAST + lane))
            lowest = max(1, int(first) - below)
            byte = best_by_definition(f, lane, global_scale, lowest, int(last))
            put(f, BYTE + lane, as_float(u32(byte)))


_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)


@exact
def best_by_definition(f: Any, lane: int, global_scale: Any, lowest: int, highest: int) -> int:
    """The smallest byte of the smallest loss, bytes lowest to highest."""
    best, winner = np.inf, lowest
    for byte in range(lowest, highest + 1):
        m = scale_of(u32(byte)) * global_scale
        loss = 0.0
        for k in range(16):
            y = get(f, k * LANES + lane)
            d = np.float64(y) - _VALUES[e2m1_code(y / m)] * np.float64(m)
            loss += d * d
        if loss < best:
            best, winner = loss, byte
    return winner


@exact
def _search(f: Any, global_scale: Any, full: bool) -> Any:
    """BYTE, BEST: the block scale of the smallest loss. Returns how many lanes were settled."""
    steps = _first_candidates(f, global_scale)
    if full:
        steps = _all_candidates(f)
    for step in range(steps):
        _try_above(f, global_scale, u32(step))
    below = u32(1)
    while below < u32(127) and (full or _below_can_win(f, global_scale, below)):
        _try_below(f, global_scale, below)
        below = u32(below + u32(1))
    close = _count_close(f)
    if close:
        _settle(f, global_scale, int(below) - 1)
    return close


@exact
def _all_candidates(f: Any) -> Any:
    """The full search: all 126 candidates are tried as if they clipped."""
    for lane in range(LANES):
        put(f, FIRST + lane, as_float(u32(127)))
        put(f, LAST + lane, as_float(u32(126)))
    return u32(0)


@exact
def _max_scales(f: Any, global_scale: Any, factor: Any) -> None:
    """BYTE, ENERGY by the max algorithm, of weights not yet scaled by `factor`."""
    divisor = _SIX * global_scale
    for lane in range(LANES):
        bmax, energy = _ZERO, _ZERO
        for k in range(16):
            w = get(f, k * LANES + lane)
            bmax = w if w > bmax else bmax
            y = w * factor
            energy += y * y
        quotient = bmax / divisor
        quotient = quotient if quotient > _ZERO else _ONE
        quotient = quotient if quotient > _E4M3_MIN else _E4M3_MIN
        quotient = quotient if quotient < _E4M3_MAX else _E4M3_MAX
        put(f, BYTE + lane, as_float(e4m3_byte(quotient)))
        put(f, ENERGY + lane, energy)


_square_clipped = _square(clips=True)


@contract
def _losses(f: Any, global_scale: Any, factor: Any) -> None:
    """BEST: the loss under the scale in BYTE, of weights not yet scaled by `factor`."""
    for lane in range(LANES):
        m = scale_of(as_bits(get(f, BYTE + lane))) * global_scale
        inverse = _ONE / m
        even, odd = _ZERO, _ZERO
        for k in range(0, 16, 2):
            even += _square_clipped(get(f, k * LANES + lane) * inverse)
            odd += _square_clipped(get(f, (k + 1) * LANES + lane) * inverse)
        m = m * factor
        put(f, BEST + lane, (even + odd) * (m * m))


@exact
def _add_up(f: Any, sums: Any) -> None:
    """Sums of BEST and ENERGY, each lane its own, in float64."""
    for lane in range(LANES):
        put(sums, lane, get(sums, lane) + np.float64(get(f, BEST + lane)))
    for lane in range(LANES):
        put(sums, LANES + lane, get(sums, LANES + lane) + np.float64(get(f, ENERGY + lane)))


@entry_point
def quantize_kernel(
    algorithm: int,
    kind: int,
    rows: int,
    blocks: int,
    weight: int,
    weight_stride: int,
    codes: int,
    codes_stride: int,
    scales: int,
    scales_stride: int,
    global_scale: Any,
    factor: Any,
) -> Any:
    """Quantize rows × blocks from and to addresses (strides of rows in bytes).

    factor: the power of two that brings global_scale into [1, 2).
    Returns Σ loss and Σ w², both times factor², and the number of blocks that were settled by the
    definition. A sum is not finite if a weight is not, or if one lies far beyond 6·448·S; the
    bytes are then not to be used.
    """
    f = np.empty(SCRATCH_SIZE, np.float32)
    raw = np.empty(STAGE_SIZE, np.uint64)
    sums = np.zeros(2 * LANES, np.float64)
    block_bytes = 64 if kind == FLOAT32 else 32
    settled = 0
    unit = _ONE if algorithm == MAX else factor  # max compares the weights as they are
    for row in range(rows):
        for start in range(0, blocks, LANES):
            n = min(LANES, blocks - start)
            source = weight + row * weight_stride + start * block_bytes
            load_lanes(f, raw, source, n, kind, unit)
            if algorithm == MAX:
                _max_scales(f, global_scale, factor)
                _losses(f, global_scale, factor)
            else:
                settled += _search(f, unit * global_scale, algorithm == MSE_FULL)
            pack_lanes(f, unit * global_scale)
            _add_up(f, sums)
            to = row * codes_stride + 8 * start
            store_lanes(f, codes + to, scales + row * scales_stride + start, n)
    return sums[:LANES].sum(), sums[LANES:].sum(), settled
