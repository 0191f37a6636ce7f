"""The mse search on CPUs: the block scale that the full search over all 126 would pick, from about
ten of them; and max scales in the same style. The definition is the head of `reference.py`.

**Notation.** A block w_1 … w_16 (magnitudes), b its largest. A candidate is an E4M3 byte c, value
s_c, step m_c = fl32(s_c·S); x = w/m_c; q the code's value; D(x) the distance from x to the grid
0 ½ 1 1½ 2 3 4 6. L(c) is the loss by definition. fl is rounding to float32, u = 2⁻²⁴. S ≥ 2⁻¹¹⁷, so
m_c is normal, and where bytes c and h have s_c = 2·s_h, m_c = 2·m_h exactly.

**1. Above: half a scale is better unless it clips.** Let s_c = 2·s_h and fl(b/m_h) < 7. Then
L(h) ≤ L(c), in the definition's own arithmetic; h being the smaller byte, c cannot win.
  Take one element; v = fl(w/m_h) < 7, and fl(w/m_c) = v/2 (halving is exact; where it underflows
  both codes are 0). The code under c has a value q ≤ 3 (4 needs v/2 ≥ 3½), and 2q ≤ 6 is in the
  grid too: (m_c, q) and (m_h, 2q) are the same number. (i) v is no halfway point of the grid. As
  halfway points are float32 numbers and fl is monotone, v lies on the same side of each as w/m_h
  does, so the code under h is the grid value nearest to w/m_h (for 6 < v < 7 it is 6, and 2q = 6
  as well), and its |d| is not above that of 2q. (ii) v is a halfway point ¼ ¾ 1¼ 1¾ 2½ 3½ 5. Half
  to even gives 0 1 1 2 2 4 4 under h; under c, v/2 gives 0 ½ ½ 1 1 2 2: the same number.
  So |d| is, element by element, not larger under h. Float64 rounding of d, of d·d and of the
  sum are monotone and the order is the same, hence L(h) ≤ L(c).
Half of byte c is c − 8 for c ≥ 16, and c/2 for even c < 16; odd bytes below 16 have none. So with
a = FIRST any byte with fl(b/m_a) < 7, every c > max(a, 8) + 7 is out: c − 8 ≥ max(a, 8). What is
left from a upwards is a … LAST = min(max(a, 8) + 7, 126): eight candidates, or up to 15 where
scales are subnormal (a < 8) and halves may be missing. The kernel takes the least a with
b ≤ 6.99·m_a (or the next, below 8); the 0.01 is far more than its rounding.

**2. Below: clipping alone loses.** For c < a, b > 6·m_c, so L(c) ≥ (b − 6·m_c)², which grows as c
falls. Once it exceeds the best loss found (by more than the error bound of 4), neither c nor
anything below it can win. This bound needs no case for subnormal scales, nor for blocks beyond the
top of the range (b > 6.99·448·S: nothing lies above, all candidates are clipped ones).

**3. Nothing to choose.** If b ≤ ¼·m_1, all codes are 0 under every scale, all losses are equal, and
byte 1 wins.

**4. Fast losses, and when they decide.** The search evaluates in float32, with y = w·2^k and
S·2^k in [1, 2) (exact, but for weights 2⁻¹²⁶ below S, which are 0 to every candidate), the inverse
of m, and products that may or may not fuse into sums:
    x̂ = y·fl(1/m)    q̂ by splitting (below)    Λ = m²·Σ(x̂ − q̂)²
|x̂ − x| ≤ 2.01u·x. D is 1-Lipschitz; the definition's code is that of fl(w/m), so its |d|/m is at
most D(x) + 2u·x. Hence | |x̂ − q̂| − |d|/m | ≤ 5.2u·x, rounding of the difference included (D ≤ x).
By Cauchy, with E = Σy²:   |Λ − L| ≤ 10.4u·√(E·Λ) + 27u²·E + 14u·Λ   (the last term: squares, nine
additions, m², product). Let L(c) ≤ L(c*) where c* has the least Λ. Solving the quadratic in √Λ(c):
    √Λ(c) ≤ √Λ(c*)·(1 + 24u) + 22u·√E
`_reach` is the square of the right side, with 32u and 24u to cover its own rounding. If the second
best Λ is above it, c* is the answer. If not (about one block in 5,000), all candidates that 1-3
left are compared by the definition (`_settle`). Fused or not, one vector width or another: Λ stays
within the bound, and the bytes are the same on every machine. Should a weight be so large that
float32 could overflow (y > 2⁴⁰), the sums become infinite and the caller turns to the reference.

**5. Rounding by splitting.** For x ≥ 1 a grid value has two significant bits, and Veltkamp's split
finds it: c = x·(2²² + 1), q = c − (c − x); c − x ≈ 2²²·x is a float32 whose last bit is worth ½, 1
or 2 as x is below 2, 4 or 8. Below 1 the spacing stays ½: c = max(c, 2²² + 1). Halves may go
either way, and do not matter: both ways lose the same. Codes are not taken from here, but from
fl32(w/m) with IEEE division, once for the winner.

**Why so.** A candidate costs 7 vector operations for 16 weights (multiply, multiply, max, three
subtractions, one fused multiply-add), as balanced over the pipes of a Zen 4 or a Golden Cove as it
gets; all lanes walk the same offsets from their own FIRST, so nothing is gathered; the search below
goes on only while a lane of the 64 needs it. Search, codes and packing are one pass: the 64 blocks
lie in the first-level cache.
"""

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
_SPLIT = f32(2.0**22 + 1)  # part 5
_EDGE = f32(1 / 6.99)
_QUARTER = f32(0.25)
_REL, _ABS = f32(1 + 2.0**-19), f32(24 * 2.0**-24)  # part 4
_SLACK = f32(1 + 2.0**-16)  # the rounding of b − 6m, of which at least b/7 is left
_FAR = f32(2.0**40)
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


@contract
def _square_open(x: Any) -> Any:
    """The squared distance of x >= 0 to the unclamped grid (part 5)."""
    c = x * _SPLIT
    c = c if c > _SPLIT else _SPLIT
    q = c - (c - x)
    d = x - q
    return d * d


@contract
def _square_clamped(x: Any) -> Any:
    """The squared distance of x >= 0 to the E2M1 grid."""
    c = x * _SPLIT
    c = c if c > _SPLIT else _SPLIT
    q = c - (c - x)
    q = q if q < _SIX else _SIX
    d = x - q
    return d * d


@contract
def _try_above(f: Any, global_scale: Any, step: Any) -> None:
    """Candidate FIRST + step of each lane (part 1): no element is above 7."""
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
    """Candidate FIRST − step of each lane (part 2): elements may be clipped."""
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
    """Whether any lane may have a winner at FIRST − step or lower (part 2)."""
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
    """How many lanes have a second best within reach."""
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
