# SPDX-License-Identifier: Apache-2.0
"""The search of `block_scales` on CPUs: 64 candidates at a time lie in lanes.

    lanes   float32, rows of 64 candidates: those of −Δ·C, one for each column, and then each
            figure of a candidate (see the names below)

Candidates are tried from the highest that can win downwards, 64 at a time, until the clipping of
those below exceeds the least loss found. Few blocks need a second time.

Shapes: O rows, I inputs, B blocks, K columns of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fourfold.formats.nvfp4.joint_cpu import LANES, grid, signed, subtract_multiple
from fourfold.formats.nvfp4.simd import contract, e4m3_byte, entry_point, get, put, scale_of
from fourfold.formats.nvfp4.sweep import EDGE

BLOCK = 16

f32, u32 = np.float32, np.uint32

_STEP = BLOCK * LANES
_INVERSE = _STEP + LANES
_LOSS = _INVERSE + LANES
_ERROR = _LOSS + LANES
_SIZE = _ERROR + LANES

_ZERO, _ONE, _SIX = f32(0), f32(1), f32(6)
_EDGE, _SLACK = f32(EDGE), f32(1 + 2.0**-16)
_LEAST, _MOST = f32(2.0**-9), f32(448)


@contract
def _byte_above(x: Any) -> int:
    """A byte whose value is not below x, or 126."""
    x = x if x > _LEAST else _LEAST
    x = x if x < _MOST else _MOST
    byte = int(e4m3_byte(x)) + 1
    return byte if byte < 126 else 126


@contract
def _highest(w: Any, row: int, start: int, is_diagonal: bool, group_scale: Any) -> int:
    """The highest candidate that can win."""
    amax = _ZERO
    for k in range(BLOCK):
        x = abs(w[row, start + k])
        amax = x if x > amax else amax
    if is_diagonal:
        first = _byte_above(amax * _EDGE / group_scale)
        last = (first if first > 8 else 8) + 7
        return last if last < 126 else 126
    return _byte_above(amax * f32(4.001) / group_scale)


@contract
def _try_candidates(
    lanes: Any, w: Any, row: int, start: int, factor: Any, block: int, is_diagonal: bool,
    first: int, group_scale: Any,
) -> int:  # fmt: skip
    """Round a block under 64 candidates; return the offset of the one with the least loss."""
    for c in range(LANES):
        step = scale_of(u32(first + c)) * group_scale  # of bytes beyond 126, only larger
        put(lanes, _STEP + c, step)
        put(lanes, _INVERSE + c, _ONE / step)
        put(lanes, _LOSS + c, _ZERO)
    for i in range(BLOCK * LANES):
        put(lanes, i, _ZERO)
    for k in range(BLOCK):
        x = w[row, start + k]
        size = abs(x)
        for c in range(LANES):
            q = grid(size * get(lanes, _INVERSE + c)) * get(lanes, _STEP + c)
            put(lanes, _ERROR + c, x - signed(q, x))
        for j in range(k if is_diagonal else 0, k + 1):
            subtract_multiple(lanes, LANES * j, _ERROR, factor[block, k, j])
    for j in range(BLOCK):
        for c in range(LANES):
            y = get(lanes, LANES * j + c)
            put(lanes, _LOSS + c, get(lanes, _LOSS + c) + y * y)
    best, least = 0, get(lanes, _LOSS)
    for c in range(1, LANES):
        loss = get(lanes, _LOSS + c)
        if loss < least:
            best, least = c, loss
    return best


@contract
def _clipping(
    w: Any, row: int, start: int, least: Any, block: int, byte: int, group_scale: Any
) -> Any:
    """What the loss of a candidate is not below, nor that of any below it."""
    top = _SIX * scale_of(u32(byte)) * group_scale
    loss = _ZERO
    for k in range(BLOCK):
        clipped = abs(w[row, start + k]) - top
        clipped = clipped if clipped > _ZERO else _ZERO
        loss += least[block, k] * clipped * clipped
    return loss


@entry_point
def choose_scales(
    w: Any, factor: Any, least: Any, is_diagonal: bool, group_scale: Any, scales: Any
) -> None:
    """Fill `scales`, uint8 [O, B].

    w: float32 [O, I]. factor: float32 [B, 16, 16], C of each block, lower triangular.
    least: float32 [B, 16]: the loss is not below Σ least_k·Δ_k².
    """
    lanes = np.empty(_SIZE, np.float32)
    for row in range(w.shape[0]):
        for block in range(w.shape[1] // BLOCK):
            start = block * BLOCK
            byte, loss = 1, f32(np.inf)
            first = _highest(w, row, start, is_diagonal, group_scale) + 1
            while first > 1:
                reach = _clipping(w, row, start, least, block, first - 1, group_scale)
                if reach > loss * _SLACK:
                    break
                first = first - LANES if first > LANES else 1
                best = _try_candidates(
                    lanes, w, row, start, factor, block, is_diagonal, first, group_scale
                )
                if get(lanes, _LOSS + best) <= loss:
                    byte, loss = first + best, get(lanes, _LOSS + best)
            scales[row, block] = byte
