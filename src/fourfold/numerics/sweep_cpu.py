"""(head to be written)"""

from __future__ import annotations

from typing import Any

import numpy as np

from fourfold.numerics.lanes import (
    BEST,
    BMAX,
    BYTE,
    ENERGY,
    FIRST,
    FLOAT32,
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

MAX, MSE, MSE_FULL = 0, 1, 2

f32, u32 = np.float32, np.uint32

_ZERO, _ONE, _SIX, _INF = f32(0), f32(1), f32(6), f32(np.inf)
_SPLIT = f32(2.0**22 + 1)
_EDGE = f32(2.0**-120 / 6.99)
_QUARTER = f32(0.25)
_REL, _ABS = f32(1 + 2.0**-19), f32(24 * 2.0**-24)
_SLACK = f32(1 + 2.0**-16)
_FAR = f32(2.0**40)
_E4M3_MIN, _E4M3_MAX = f32(2.0**-9), f32(448)


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
        first = u32((as_bits(bmax * edge) + u32(0xFFFFF)) >> u32(20))
        first = first if first > u32(1) else u32(1)
        first = first if first < u32(127) else u32(127)
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


@contract
def _square_open(x: Any) -> Any:
    c = x * _SPLIT
    c = c if c > _SPLIT else _SPLIT
    q = c - (c - x)
    d = x - q
    return d * d


@contract
def _square_clamped(x: Any) -> Any:
    c = x * _SPLIT
    c = c if c > _SPLIT else _SPLIT
    q = c - (c - x)
    q = q if q < _SIX else _SIX
    d = x - q
    return d * d


@contract
def _try_above(f: Any, global_scale: Any, step: Any) -> None:
    for lane in range(LANES):
        byte = u32(as_bits(get(f, FIRST + lane)) + step)
        m = scale_of(byte) * global_scale
        inverse = _ONE / m
        even, odd = _ZERO, _ZERO
        for k in range(0, 16, 2):
            even += _square_open(get(f, k * LANES + lane) * inverse)
            odd += _square_open(get(f, (k + 1) * LANES + lane) * inverse)
        loss = (even + odd) * (m * m)
        _keep(f, lane, byte, _only_if(byte <= as_bits(get(f, LAST + lane)), loss))


@contract
def _try_below(f: Any, global_scale: Any, step: Any) -> None:
    for lane in range(LANES):
        first = as_bits(get(f, FIRST + lane))
        byte = u32(first - step)
        m = scale_of(byte) * global_scale
        inverse = _ONE / m
        even, odd = _ZERO, _ZERO
        for k in range(0, 16, 2):
            even += _square_clamped(get(f, k * LANES + lane) * inverse)
            odd += _square_clamped(get(f, (k + 1) * LANES + lane) * inverse)
        loss = (even + odd) * (m * m)
        _keep(f, lane, byte, _only_if(first > step, loss))


@contract
def _only_if(valid: Any, loss: Any) -> Any:
    # A function of its own: inlined late, it stays a select, and the loop above a vector loop.
    return loss if valid else _INF


@contract
def _keep(f: Any, lane: int, byte: Any, loss: Any) -> None:
    best, second, winner = get(f, BEST + lane), get(f, SECOND + lane), get(f, BYTE + lane)
    worse = loss if loss > best else best
    put(f, SECOND + lane, worse if worse < second else second)
    put(f, BYTE + lane, as_float(u32(byte)) if loss < best else winner)
    put(f, BEST + lane, loss if loss < best else best)


@contract
def _reach(best: Any, energy: Any) -> Any:
    root = np.sqrt(best) * _REL + np.sqrt(energy) * _ABS
    return root * root


@contract
def _below_can_win(f: Any, global_scale: Any, step: Any) -> Any:
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
    close = u32(0)
    for lane in range(LANES):
        reach = _reach(get(f, BEST + lane), get(f, ENERGY + lane))
        close += u32(1) if get(f, SECOND + lane) <= reach else u32(0)
    return close


@exact
def _settle(f: Any, global_scale: Any, below: int) -> None:
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


@contract
def _losses(f: Any, global_scale: Any, factor: Any) -> None:
    """BEST: the loss under the scale in BYTE, of weights not yet scaled by `factor`."""
    for lane in range(LANES):
        m = scale_of(as_bits(get(f, BYTE + lane))) * global_scale
        inverse = _ONE / m
        even, odd = _ZERO, _ZERO
        for k in range(0, 16, 2):
            even += _square_clamped(get(f, k * LANES + lane) * inverse)
            odd += _square_clamped(get(f, (k + 1) * LANES + lane) * inverse)
        m = m * factor
        put(f, BEST + lane, (even + odd) * (m * m))


@exact
def _add_up(f: Any, sums: Any) -> None:
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
