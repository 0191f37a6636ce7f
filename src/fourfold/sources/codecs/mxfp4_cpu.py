# SPDX-License-Identifier: Apache-2.0
"""MXFP4 to bf16 on the CPU, transposed on the way: out[i, o] = code[o, i] · 2^(k − 127).

Codes are moved eight to a word, and 64 outputs at a time are decoded side by side, so that the
transposition costs an eighth of what it costs for weights. A value has at most two bits, and bf16
has the exponents of float32, so that nothing is rounded.

Import this module at first use: it imports numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fourfold.formats.nvfp4.simd import (
    LINE,
    TILE,
    as_bits,
    e2m1_value,
    entry_point,
    exact,
    get,
    load_tile,
    put,
)

f32, u16, u32 = np.float32, np.uint16, np.uint32

_WORDS = 4  # words of a block of 32 codes


def decode_transposed(
    codes_OI: torch.Tensor,
    exponents_OB: torch.Tensor,
    scales: npt.NDArray[np.float32],
    out_IO: torch.Tensor,
) -> None:
    """Fill `out`. Releases the GIL.

    Args:
        codes_OI: U8 [outputs, in/2], the low half of a byte first.
        exponents_OB: U8 [outputs, in/32].
        scales: What each of 256 exponents stands for.
        out_IO: Contiguous bfloat16 [in, outputs].
    """
    words, exponents = codes_OI.numpy().view(np.uint32), exponents_OB.numpy()
    _decode(words, exponents, scales, out_IO.view(torch.int16).numpy().view(np.uint16))


@exact
def _load_scales(exponents: Any, scales: Any, row: int, block: int, rows: int, scale: Any) -> None:
    for r in range(rows):
        put(scale, r, scales[exponents[row + r, block]])


@entry_point
def _decode(words: Any, exponents: Any, scales: Any, out: Any) -> None:
    outputs, count = words.shape
    tile, scale = np.empty(TILE * LINE, np.uint32), np.empty(TILE, np.float32)
    for row in range(0, outputs, TILE):
        rows = min(TILE, outputs - row)
        for column in range(0, count, LINE):
            columns = min(LINE, count - column)
            load_tile(words, row, column, rows, columns, tile)
            for c in range(columns):
                if c % _WORDS == 0:
                    _load_scales(exponents, scales, row, (column + c) // _WORDS, rows, scale)
                for place in range(8):
                    line = out[8 * (column + c) + place, row : row + rows]
                    for r in range(rows):
                        value = e2m1_value(get(tile, c * TILE + r), place) * get(scale, r)
                        put(line, r, u16(as_bits(value) >> u32(16)))
