# SPDX-License-Identifier: Apache-2.0
"""The definition of the mse search, as a full search that is fast enough for 10⁸ blocks.

Written from the definition alone (float64 losses, all 126 scales, no bound, no reciprocal), and
itself tested against the PyTorch reference. It shares no code with the kernels it judges.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 64
SCALES = np.array(
    [c * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(127)], np.float32
)
HALF, ONE, TWO, FOUR, SIX = (np.float32(v) for v in (0.5, 1, 2, 4, 6))


@njit(error_model="numpy")
def _rounded(x):
    """E2M1 value of x >= 0, to the nearest, halves to even; np.rint rounds halves to even."""
    fine = np.rint(x * TWO) * HALF
    middle = np.rint(x)
    coarse = np.rint(x * HALF) * TWO
    q = fine if x < TWO else (middle if x < FOUR else coarse)
    return q if q < SIX else SIX


@njit(error_model="numpy")
def _losses(w_KL, m, loss_L):
    for lane in range(LANES):
        loss_L[lane] = 0.0
    for k in range(16):
        for lane in range(LANES):
            w = w_KL[k, lane]
            d = np.float64(w) - np.float64(_rounded(w / m)) * np.float64(m)
            loss_L[lane] += d * d


@njit(error_model="numpy")
def _search(w_KL, global_scale, best_L, byte_L, loss_L):
    best_L[:] = np.inf
    byte_L[:] = 0
    for byte in range(1, 127):
        _losses(w_KL, SCALES[byte] * global_scale, loss_L)
        for lane in range(LANES):
            wins = loss_L[lane] < best_L[lane]
            byte_L[lane] = byte if wins else byte_L[lane]
            best_L[lane] = loss_L[lane] if wins else best_L[lane]


@njit(error_model="numpy", cache=True)
def full_search(blocks_NK, global_scale):
    """The winning byte of each block of |w|, [n, 16] float32."""
    n = blocks_NK.shape[0]
    found = np.zeros(n, np.uint8)
    for group in range((n + LANES - 1) // LANES):
        start = group * LANES
        w_KL = np.zeros((16, LANES), np.float32)
        best_L, loss_L = np.empty(LANES), np.empty(LANES)
        byte_L = np.empty(LANES, np.int64)
        for lane in range(min(LANES, n - start)):
            for k in range(16):
                w_KL[k, lane] = abs(blocks_NK[start + lane, k])
        _search(w_KL, global_scale, best_L, byte_L, loss_L)
        for lane in range(min(LANES, n - start)):
            found[start + lane] = byte_L[lane]
    return found
