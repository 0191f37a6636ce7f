# SPDX-License-Identifier: Apache-2.0
"""Rounding with compensation on CPUs: a block's scale and its codes are chosen together.

`second_order` has the mathematics. Columns are rounded one after the other, so a single row would
wait for each result; 64 of them lie in lanes and are rounded in lockstep: 16 candidates for the
scale of a block in each of 4 rows, or 64 rows whose scales are given.

    f       float32 [51 · LANES], row r at r·LANES
    rows 0-15    running targets of the 16 columns
    then         values of columns (in steps), errors of columns, and a row for each figure

Shapes: O rows, W columns of a tile (whole blocks), B blocks of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from fourfold.formats.nvfp4.simd import (
    as_bits,
    contract,
    e4m3_byte,
    entry_point,
    get,
    put,
    scale_of,
)
from fourfold.formats.nvfp4.sweep import SPLIT

BLOCK = CANDIDATES = 16
BELOW = 3
"""Candidates are the E4M3 bytes from 3 below that of max scales to 12 above it."""

LEAST_GAIN = np.float32(1 - 2.0**-18)
"""A block is changed only if its loss falls below this part of it; rounding reaches less far."""

LANES = 64
ROWS = LANES // CANDIDATES

f32, u8, u32 = np.float32, np.uint8, np.uint32

_VALUE = BLOCK * LANES  # in units of the step, with the sign of the target
_ERROR = 2 * BLOCK * LANES
_STEP = 3 * BLOCK * LANES  # what a code is worth
_INVERSE = _STEP + LANES
_LOSS = _INVERSE + LANES
_SIZE = _LOSS + LANES

_SPLIT, _SIX, _ZERO, _ONE = f32(SPLIT), f32(6), f32(0), f32(1)
_CODES = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=np.uint8)
"""E2M1 code by twice its value."""


@intrinsic  # type: ignore[untyped-decorator]
def subtract_multiple(typing: Any, f: Any, to: Any, source: Any, factor: Any) -> Any:
    """f[to:to + LANES] −= factor·f[source:source + LANES], two rows that do not overlap.

    All is read before anything is written, which no compiler could do that does not know the rows.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), 16)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        splat = ir.Constant(vector, ir.Undefined)
        for lane in range(16):
            splat = builder.insert_element(splat, args[3], ir.IntType(32)(lane))

        def places(start: Any) -> list[Any]:
            starts = [builder.add(start, start.type(16 * part)) for part in range(LANES // 16)]
            rows = [builder.gep(data, [place]) for place in starts]
            return [builder.bitcast(row, vector.as_pointer()) for row in rows]

        targets = places(args[1])
        olds = [builder.load(place, align=4) for place in targets]
        sources = [builder.load(place, align=4) for place in places(args[2])]
        for place, old, x in zip(targets, olds, sources, strict=True):
            change = builder.fmul(x, splat, flags=["contract"])
            builder.store(builder.fsub(old, change, flags=["contract"]), place, align=4)
        return context.get_dummy_value()

    return types.void(f, types.intp, types.intp, types.float32), code


@contract
def grid(x: Any) -> Any:
    """The value of E2M1 nearest to a magnitude; `sweep.py`, part 5."""
    c = x * _SPLIT
    c = c if c > _SPLIT else _SPLIT
    q = c - (c - x)
    return q if q < _SIX else _SIX


@contract
def signed(q: Any, x: Any) -> Any:
    return q if x >= _ZERO else -q


@contract
def _first_byte(targets: Any, row: int, start: int, group_scale: Any) -> int:
    """The lowest candidate, if all of them are to lie in 1..126."""
    amax = _ZERO
    for k in range(BLOCK):
        x = abs(targets[row, start + k])
        amax = x if x > amax else amax
    quotient = amax / (_SIX * group_scale)
    quotient = quotient if quotient < f32(448) else f32(448)
    quotient = quotient if quotient > f32(2.0**-9) else f32(2.0**-9)
    lowest = int(e4m3_byte(quotient)) - BELOW
    lowest = lowest if lowest > 1 else 1
    return lowest if lowest < 127 - CANDIDATES else 127 - CANDIDATES


@contract
def _round_lanes(f: Any, factor: Any, at: int) -> None:
    """Round the targets of every lane under its step."""
    for lane in range(LANES):
        put(f, _LOSS + lane, _ZERO)
        put(f, _INVERSE + lane, _ONE / get(f, _STEP + lane))
    for k in range(BLOCK):
        inverse = _ONE / factor[at + k, at + k]
        for lane in range(LANES):
            x = get(f, k * LANES + lane)
            q = signed(grid(abs(x) * get(f, _INVERSE + lane)), x)
            error = (x - q * get(f, _STEP + lane)) * inverse
            put(f, _VALUE + k * LANES + lane, q)
            put(f, _ERROR + k * LANES + lane, error)
            put(f, _LOSS + lane, get(f, _LOSS + lane) + error * error)
        for j in range(k + 1, BLOCK):
            subtract_multiple(f, j * LANES, _ERROR + k * LANES, factor[at + k, at + j])


@contract
def _lose_lanes(f: Any, factor: Any) -> None:
    """The loss of every lane under values that are given, in place of multiples of its step."""
    for lane in range(LANES):
        put(f, _LOSS + lane, _ZERO)
    for k in range(BLOCK):
        inverse = _ONE / factor[k, k]
        for lane in range(LANES):
            error = (get(f, k * LANES + lane) - get(f, _VALUE + k * LANES + lane)) * inverse
            put(f, _ERROR + lane, error)
            put(f, _LOSS + lane, get(f, _LOSS + lane) + error * error)
        for j in range(k + 1, BLOCK):
            subtract_multiple(f, j * LANES, _ERROR, factor[k, j])


@contract
def _load_candidates(f: Any, targets: Any, row: int, start: int, group_scale: Any) -> None:
    """Give 4 rows 16 lanes each, one for each candidate; rows beyond the last repeat it."""
    last = targets.shape[0] - 1
    for r in range(ROWS):
        here = row + r if row + r < last else last
        first = _first_byte(targets, here, start, group_scale)
        for c in range(CANDIDATES):
            put(f, _STEP + CANDIDATES * r + c, scale_of(u32(first + c)) * group_scale)
        for k in range(BLOCK):
            x = targets[here, start + k]
            for c in range(CANDIDATES):
                put(f, k * LANES + CANDIDATES * r + c, x)


@contract
def _load_rows(f: Any, targets: Any, row: int, start: int, at: int) -> None:
    """Give 64 rows a lane each; rows beyond the last repeat it. `at` is where columns begin."""
    last = targets.shape[0] - 1
    for lane in range(LANES):
        here = row + lane if row + lane < last else last
        for k in range(BLOCK):
            put(f, at + k * LANES + lane, targets[here, start + k])


@contract
def _best(f: Any, r: int) -> int:
    """The lane of the least loss among the candidates of a row."""
    best, least = CANDIDATES * r, get(f, _LOSS + CANDIDATES * r)
    for lane in range(CANDIDATES * r + 1, CANDIDATES * (r + 1)):
        loss = get(f, _LOSS + lane)
        if loss < least:
            best, least = lane, loss
    return best


@contract
def _store(f: Any, lane: int, codes: Any, values: Any, row: int, start: int) -> None:
    """Write the codes and values of a lane."""
    for k in range(BLOCK):
        q = get(f, _VALUE + k * LANES + lane)
        code = _CODES[np.int64(abs(q) * f32(2))]
        codes[row, start + k] = u8(u32(code) | (as_bits(q) >> u32(28) & u32(8)))
        values[row, start + k] = q * get(f, _STEP + lane)


@contract
def _compensate(targets: Any, row: int, start: int, factor: Any, errors: Any) -> None:
    """Let the columns of a row behind a block make up for its errors."""
    for k in range(start, start + BLOCK, 4):
        a, b, c, d = errors[row, k], errors[row, k + 1], errors[row, k + 2], errors[row, k + 3]
        for j in range(start + BLOCK, targets.shape[1]):
            x = targets[row, j] - a * factor[k, j] - b * factor[k + 1, j]
            targets[row, j] = x - c * factor[k + 2, j] - d * factor[k + 3, j]


@entry_point
def round_tile(
    targets: Any, factor: Any, group_scale: Any, is_fixed: bool, codes: Any, scales: Any,
    values: Any, errors: Any,
) -> None:  # fmt: skip
    """Round the columns of a tile, from first to last.

    targets: float32 [O, W]; changed.
    factor: float32 [W, W], upper triangular: the part of U that belongs to the tile.
    is_fixed: True if `scales` holds the scales already; otherwise they are chosen.
    codes: uint8 [O, W]; scales: uint8 [O, B]; values: float32 [O, W], what the codes stand for;
    errors: float32 [O, W], e of each column.
    """
    f = np.empty(_SIZE, np.float32)
    rows = targets.shape[0]
    count = LANES if is_fixed else ROWS
    for row in range(0, rows, count):
        for block in range(targets.shape[1] // BLOCK):
            start = block * BLOCK
            if is_fixed:
                _load_rows(f, targets, row, start, 0)
                for lane in range(LANES):
                    byte = scales[min(row + lane, rows - 1), block]
                    put(f, _STEP + lane, scale_of(u32(byte)) * group_scale)
            else:
                _load_candidates(f, targets, row, start, group_scale)
            _round_lanes(f, factor, start)
            for r in range(min(count, rows - row)):
                lane = r
                if not is_fixed:
                    lane = _best(f, r)
                    first = _first_byte(targets, row + r, start, group_scale)
                    scales[row + r, block] = first + lane - CANDIDATES * r
                _store(f, lane, codes, values, row + r, start)
                for k in range(BLOCK):
                    errors[row + r, start + k] = get(f, _ERROR + k * LANES + lane)
                _compensate(targets, row + r, start, factor, errors)


@entry_point
def improve_block(
    targets: Any, factor: Any, group_scale: Any, codes: Any, scales: Any, values: Any, changes: Any
) -> int:
    """Choose scale and codes of one block of every row again, where that lowers the loss.

    targets: float32 [O, 16], the block's best real values given all other blocks.
    factor: float32 [16, 16], U of the block's own moment.
    codes: uint8 [O, 16]; scales: uint8 [O]; values: float32 [O, 16]: what there is; replaced.
    changes: float32 [O, 16], filled with the new values minus the old ones.
    Returns the number of rows that changed.
    """
    f = np.empty(_SIZE, np.float32)
    rows, changed = targets.shape[0], 0
    old_losses = np.empty(rows + LANES, np.float32)
    for row in range(0, rows, LANES):
        _load_rows(f, targets, row, 0, 0)
        _load_rows(f, values, row, 0, _VALUE)
        _lose_lanes(f, factor)
        for lane in range(LANES):
            old_losses[row + lane] = get(f, _LOSS + lane)
    for row in range(rows):
        for k in range(BLOCK):
            changes[row, k] = -values[row, k]
    for row in range(0, rows, ROWS):
        _load_candidates(f, targets, row, 0, group_scale)
        _round_lanes(f, factor, 0)
        for r in range(min(ROWS, rows - row)):
            lane, here = _best(f, r), row + r
            if get(f, _LOSS + lane) < old_losses[here] * LEAST_GAIN:
                first = _first_byte(targets, here, 0, group_scale)
                scales[here] = first + lane - CANDIDATES * r
                _store(f, lane, codes, values, here, 0)
                changed += 1
    for row in range(rows):
        for k in range(BLOCK):
            changes[row, k] += values[row, k]
    return changed
