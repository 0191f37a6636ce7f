# SPDX-License-Identifier: Apache-2.0
"""Rounding with compensation on CPUs: a block's scale and its codes are chosen together.

`second_order` has the mathematics. The candidates for the scale of a block lie in the lanes of a
vector: 16 of them are tried at once, each with its own running targets of the block's 16 columns.

    lanes   float32 [16 columns · 16 candidates]: column k of candidate c at 16·k + c
    then    rows of 16 for each figure of a candidate (see the names below)

Shapes: O rows, W columns of a tile (whole blocks), B blocks of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fourfold.formats.nvfp4.simd import contract, e4m3_byte, entry_point, get, put, scale_of
from fourfold.formats.nvfp4.sweep import SPLIT

BLOCK = CANDIDATES = 16
BELOW = 3
"""Candidates are the E4M3 bytes from 3 below that of max scales to 12 above it."""

f32, u8, u32 = np.float32, np.uint8, np.uint32

_STEP = BLOCK * CANDIDATES  # what a code of a candidate is worth
_INVERSE = _STEP + CANDIDATES
_LOSS = _INVERSE + CANDIDATES
_ERROR = _LOSS + CANDIDATES
_SIZE = _ERROR + CANDIDATES

_SPLIT, _SIX, _ZERO, _ONE = f32(SPLIT), f32(6), f32(0), f32(1)
_CODES = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=np.uint8)
"""E2M1 code by twice its value."""


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
def _first_byte(targets: Any, row: int, start: int, group_scale: Any) -> Any:
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
def _try_candidates(
    lanes: Any, targets: Any, row: int, start: int, factor: Any, at: int, first: int, scale: Any
) -> int:
    """Round a block under every candidate; return the offset of the one with the least loss."""
    for c in range(CANDIDATES):
        step = scale_of(u32(first + c)) * scale
        put(lanes, _STEP + c, step)
        put(lanes, _INVERSE + c, _ONE / step)
        put(lanes, _LOSS + c, _ZERO)
    for k in range(BLOCK):
        x = targets[row, start + k]
        for c in range(CANDIDATES):
            put(lanes, BLOCK * k + c, x)
    for k in range(BLOCK):
        inverse = _ONE / factor[at + k, at + k]
        for c in range(CANDIDATES):
            x = get(lanes, BLOCK * k + c)
            q = grid(abs(x) * get(lanes, _INVERSE + c)) * get(lanes, _STEP + c)
            error = (x - signed(q, x)) * inverse
            put(lanes, _ERROR + c, error)
            put(lanes, _LOSS + c, get(lanes, _LOSS + c) + error * error)
        for j in range(k + 1, BLOCK):
            u = factor[at + k, at + j]
            for c in range(CANDIDATES):
                x = get(lanes, BLOCK * j + c) - get(lanes, _ERROR + c) * u
                put(lanes, BLOCK * j + c, x)
    best, least = 0, get(lanes, _LOSS)
    for c in range(1, CANDIDATES):
        loss = get(lanes, _LOSS + c)
        if loss < least:
            best, least = c, loss
    return best


@contract
def _round_block(
    targets: Any, row: int, start: int, factor: Any, at: int, step: Any, errors: Any, codes: Any,
    values: Any,
) -> None:  # fmt: skip
    """Round a block under one scale. Its targets are changed as the compensation asks for."""
    inverse_step = _ONE / step
    for k in range(BLOCK):
        x = targets[row, start + k]
        q = grid(abs(x) * inverse_step)
        code = _CODES[np.int64(q * f32(2))]
        codes[row, start + k] = code if x >= _ZERO else u8(code | u8(8))
        value = signed(q * step, x)
        values[row, start + k] = value
        error = (x - value) * (_ONE / factor[at + k, at + k])
        errors[row, start + k] = error
        for j in range(k + 1, BLOCK):
            targets[row, start + j] -= error * factor[at + k, at + j]


@contract
def _compensate(targets: Any, row: int, start: int, factor: Any, errors: Any) -> None:
    """Let the columns behind a block make up for its errors."""
    width = targets.shape[1]
    for k in range(BLOCK):
        error = errors[row, start + k]
        for j in range(start + BLOCK, width):
            targets[row, j] -= error * factor[start + k, j]


@entry_point
def round_tile(
    targets: Any, factor: Any, group_scale: Any, is_fixed: Any, codes: Any, scales: Any,
    values: Any, errors: Any,
) -> None:  # fmt: skip
    """Round a tile, block by block from its first column to its last.

    targets: float32 [O, W]; changed.
    factor: float32 [W, W], upper triangular: the part of U that belongs to the tile.
    is_fixed: True if `scales` holds the scales already; otherwise they are chosen.
    codes: uint8 [O, W]; scales: uint8 [O, B]; values: float32 [O, W], what the codes stand for;
    errors: float32 [O, W], e of each column.
    """
    lanes = np.empty(_SIZE, np.float32)
    for row in range(targets.shape[0]):
        for block in range(targets.shape[1] // BLOCK):
            start = block * BLOCK
            if not is_fixed:
                first = _first_byte(targets, row, start, group_scale)
                best = _try_candidates(
                    lanes, targets, row, start, factor, start, first, group_scale
                )
                scales[row, block] = first + best
            step = scale_of(u32(scales[row, block])) * group_scale
            _round_block(targets, row, start, factor, start, step, errors, codes, values)
            _compensate(targets, row, start, factor, errors)


@entry_point
def improve_block(
    targets: Any, factor: Any, group_scale: Any, codes: Any, scales: Any, values: Any, changes: Any
) -> int:
    """Choose scale and codes of one block of every row again, where that lowers the loss.

    targets: float32 [O, 16], the block's best real values given all other blocks; changed.
    factor: float32 [16, 16], U of the block's own moment.
    codes: uint8 [O, 16]; scales: uint8 [O]; values: float32 [O, 16]: what there is; replaced.
    changes: float32 [O, 16], filled with the new values minus the old ones.
    Returns the number of rows that changed.
    """
    lanes = np.empty(_SIZE, np.float32)
    old = np.empty(BLOCK, np.float32)
    errors = np.empty((1, BLOCK), np.float32)
    new_codes = np.empty((1, BLOCK), np.uint8)
    new_values = np.empty((1, BLOCK), np.float32)
    running = np.empty((1, BLOCK), np.float32)
    changed = 0
    for row in range(targets.shape[0]):
        loss = _ZERO
        for k in range(BLOCK):
            old[k] = targets[row, k]
            running[0, k] = targets[row, k]
            changes[row, k] = _ZERO
        for k in range(BLOCK):
            error = (old[k] - values[row, k]) * (_ONE / factor[k, k])
            loss += error * error
            for j in range(k + 1, BLOCK):
                old[j] -= error * factor[k, j]
        first = _first_byte(targets, row, 0, group_scale)
        best = _try_candidates(lanes, targets, row, 0, factor, 0, first, group_scale)
        if get(lanes, _LOSS + best) < loss * f32(1 - 2.0**-18):
            step = scale_of(u32(first + best)) * group_scale
            _round_block(running, 0, 0, factor, 0, step, errors, new_codes, new_values)
            scales[row] = first + best
            changed += 1
            for k in range(BLOCK):
                changes[row, k] = new_values[0, k] - values[row, k]
                values[row, k] = new_values[0, k]
                codes[row, k] = new_codes[0, k]
    return changed
