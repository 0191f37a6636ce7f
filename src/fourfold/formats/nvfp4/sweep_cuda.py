# SPDX-License-Identifier: Apache-2.0
"""The mse search on GPUs: the block scale that the full search over all 126 would pick, from about
nine of them; the full search itself; and max scales. `sweep.py` has the proof, and the names used
here.

**Its own way.** r is good to two units in the last place (ρ = 5.1, δ = 8.3), and no root is taken:
2·√(Λ·E) ≤ κ·Λ + E/κ for any κ > 0, and with κ = 8 the square of the right side of part 4 is at most
    REACH = (1 + 384u)·Λ + 5u·E
its own rounding included. Where Λ is a hundredth of E, as it is for weights, that is as good.

**Why so.** A thread has a block, and the threads of a tile walk the same offsets from their own
FIRST: no thread waits for another but at the end of a loop, which a tile leaves together. A
candidate costs six instructions a weight, five of them on the multiply-add pipe:
    c = max(y·(r·SPLIT), SPLIT)    t = c − y·r    q = c − t    d = q − y·r    Λ += d²
since what the split needs of x is only ever multiplied and added in one; and some thirty beside
them. A weight is read once, and codes, scales and sums leave in the same pass.

Words: int64, the weights as `blocks_cuda.load_blocks` reads them. N weights of B blocks each.
"""

import triton
import triton.language as tl

from fourfold.formats.nvfp4 import sweep
from fourfold.formats.nvfp4.blocks_cuda import (
    as_bits,
    as_float,
    e4m3_byte,
    largest,
    load_blocks,
    pack,
    round_e2m1,
    scale_of,
)

MAX = tl.constexpr(sweep.MAX)
MSE_FULL = tl.constexpr(sweep.MSE_FULL)
FIGURES = tl.constexpr(32)

_SPLIT = tl.constexpr(sweep.SPLIT)
_EDGE = tl.constexpr(sweep.EDGE)
_FAR = tl.constexpr(sweep.FAR)
_INF = tl.constexpr(float("inf"))
_REL, _ABS = tl.constexpr(1 + 384 * 2.0**-24), tl.constexpr(5 * 2.0**-24)
_SLACK = tl.constexpr(1 + 2.0**-13)  # the rounding of b − 6m, of which at least b/7 is left
_NOTHING = tl.constexpr(2.0**-11)  # part 3: a quarter of the smallest scale
_SUBNORMALS_END, _TWO_9 = tl.constexpr(2.0**-6), tl.constexpr(2.0**9)
_E4M3_MIN, _E4M3_MAX = tl.constexpr(2.0**-9), tl.constexpr(448.0)


@triton.jit
def _byte_above(x):
    """The least E4M3 byte 1..126 whose value is not below x (at most one more); 127 if none is."""
    normal = tl.minimum((as_bits(x) - (120 << 23) + 0xFFFFF) >> 20, 127)
    subnormal = (tl.minimum(x, _SUBNORMALS_END) * _TWO_9).to(tl.int32) + 1
    return tl.where(subnormal > 8, normal, subnormal)


@triton.jit
def _loss(y, m, CLIPS: tl.constexpr):
    """Λ of each block under the step m. CLIPS: some elements may lie above 7."""
    inverse = -1.0 / m
    split = inverse * -_SPLIT
    even = tl.zeros_like(m)
    odd = tl.zeros_like(m)
    for k in tl.static_range(16):
        c = tl.maximum(y[k] * split, _SPLIT)
        q = c - tl.fma(y[k], inverse, c)
        if CLIPS:
            q = tl.minimum(q, 6.0)
        d = tl.fma(y[k], inverse, q)
        if k % 2 == 0:
            even = tl.fma(d, d, even)
        else:
            odd = tl.fma(d, d, odd)
    return (even + odd) * (m * m)


@triton.jit
def _reach(best, energy):
    """The largest loss with which a candidate could still win."""
    return best * _REL + energy * _ABS


@triton.jit
def _anywhere(condition):
    return tl.max(condition.to(tl.int32), axis=0) != 0


@triton.jit
def _by_definition(y, scale, lowest, last):
    """The smallest byte of the smallest loss, bytes lowest to last."""
    best = tl.full(last.shape, _INF, tl.float64)
    winner = lowest
    for step in range(tl.max(last - lowest, axis=0) + 1):
        byte = lowest + step
        m = scale_of(byte) * scale
        loss = tl.zeros(last.shape, tl.float64)
        for k in tl.static_range(16):
            _, q = round_e2m1(tl.math.div_rn(y[k], m))
            d = y[k].to(tl.float64) - q.to(tl.float64) * m.to(tl.float64)
            loss += d * d
        better = (loss < best) & (byte <= last)
        best = tl.where(better, loss, best)
        winner = tl.where(better, byte, winner)
    return winner


@triton.jit
def _first_and_last(bmax, scale, FULL: tl.constexpr):
    """Parts 1 and 3; for a full search, all 126 candidates lie below, as if they clipped."""
    if FULL:
        first = tl.full(bmax.shape, 127, tl.int32)
        last = tl.full(bmax.shape, 126, tl.int32)
    else:
        first = _byte_above(bmax * (_EDGE / scale))
        last = tl.minimum(tl.maximum(first, 8) + 7, 126)
        differ = bmax > scale * _NOTHING
        first = tl.where(differ, first, 1)
        last = tl.where(differ, last, 1)
    return first, last


@triton.jit
def _search(y, bmax, energy, scale, FULL: tl.constexpr):
    """The byte of the smallest loss, and that loss."""
    first, last = _first_and_last(bmax, scale, FULL)
    best = tl.full(bmax.shape, _INF, tl.float32)
    second = best
    winner = tl.full(bmax.shape, 1, tl.int32)
    for step in range(tl.max(last - first, axis=0) + 1):
        byte = first + step
        loss = tl.where(byte <= last, _loss(y, scale_of(byte) * scale, False), _INF)
        second = tl.minimum(second, tl.maximum(loss, best))
        winner = tl.where(loss < best, byte, winner)
        best = tl.minimum(best, loss)
    byte = first - 1
    goes_on = True
    while goes_on:
        m = scale_of(byte) * scale
        clipped = bmax - 6.0 * m
        if FULL:
            goes_on = _anywhere(byte > 0)
        else:
            can_win = clipped * clipped <= _reach(best, energy) * _SLACK
            goes_on = _anywhere((byte > 0) & can_win)
        if goes_on:
            loss = tl.where(byte > 0, _loss(y, m, True), _INF)
            second = tl.minimum(second, tl.maximum(loss, best))
            winner = tl.where(loss < best, byte, winner)
            best = tl.minimum(best, loss)
            byte -= 1
    is_close = second <= _reach(best, energy)
    if _anywhere(is_close):
        settled = _by_definition(y, scale, tl.maximum(byte + 1, 1), last)
        winner = tl.where(is_close, settled, winner)
    return winner, best


@triton.jit
def _max_byte(bmax, global_scale):
    """The byte by the max algorithm, of weights as they are."""
    quotient = tl.math.div_rn(bmax, 6.0 * global_scale)
    quotient = tl.where(quotient == 0.0, 1.0, quotient)
    return e4m3_byte(tl.minimum(tl.maximum(quotient, _E4M3_MIN), _E4M3_MAX))


@triton.jit
def quantize_kernel(
    words,
    global_scales,
    codes,
    scales,
    losses,
    energies,
    blocks,
    ALGORITHM: tl.constexpr,
    KIND: tl.constexpr,
    PACK: tl.constexpr,
    FMA: tl.constexpr,
    TILE: tl.constexpr,
):
    """Quantize N weights; the grid is (tiles of a weight, N).

    words [N, B, 4 or 8], float32 global_scales [N] -> scales uint8 [N, B], codes int64 [N, B] if
    PACK, and float64 losses and energies [N, ⌈B/32⌉]: Σ loss and Σ w² of 32 blocks each. A sum is
    not finite if a weight is not, or if one lies far beyond 6·448·S; the bytes are then void.
    """
    n = tl.program_id(1)
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = block < blocks
    at = n.to(tl.int64) * blocks + block
    global_scale = tl.load(global_scales + n)
    unit = as_float(as_bits(global_scale) & 0x7F800000)
    factor = as_float((254 << 23) - as_bits(unit))  # 1/unit: brings the global scale into [1, 2)
    scale = global_scale * factor
    w, raw = load_blocks(words, at, valid, KIND)
    y = ()
    energy = tl.zeros((TILE,), tl.float32)
    for k in tl.static_range(16):
        y_k = w[k] * factor
        y += (y_k,)
        energy = tl.fma(y_k, y_k, energy)
    bmax = largest(y)
    energy = tl.where(bmax < _FAR, energy, _INF)
    if ALGORITHM == MAX:
        byte = _max_byte(largest(w), global_scale)
        loss = _loss(y, scale_of(byte) * scale, True)
    else:
        byte, loss = _search(y, bmax, energy, scale, ALGORITHM == MSE_FULL)
    tl.store(scales + at, byte.to(tl.uint8), mask=valid)
    if PACK:
        tl.store(codes + at, pack(y, raw, scale_of(byte) * scale, KIND, FMA), mask=valid)
    square = unit.to(tl.float64) * unit.to(tl.float64)
    _store_sums(losses, tl.where(valid, loss, 0.0), square, blocks, TILE)
    _store_sums(energies, energy, square, blocks, TILE)


@triton.jit
def _store_sums(sums, values, square, blocks, TILE: tl.constexpr):
    parts = tl.cdiv(blocks, FIGURES)
    part = tl.program_id(0) * (TILE // FIGURES) + tl.arange(0, TILE // FIGURES)
    part_sums = tl.sum(tl.reshape(values, (TILE // FIGURES, FIGURES)), axis=1)
    to = sums + (tl.program_id(1).to(tl.int64) * parts + part)
    tl.store(to, part_sums.to(tl.float64) * square, mask=part < parts)
