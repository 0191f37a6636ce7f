# SPDX-License-Identifier: Apache-2.0
"""NVFP4 rounding of activations by the definition: a loop over blocks, with tables of its own."""

from __future__ import annotations

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E4M3 = np.array(
    [c * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(127)], np.float32
)


def nearest(table: np.ndarray, value: np.float32) -> np.float32:
    """Of a table in ascending order; a halfway point goes to the even index, as bits do."""
    above = int(np.searchsorted(table, value))
    if above == len(table):
        return table[-1]
    if above == 0 or table[above] == value:
        return table[above]
    below = above - 1
    low, high = float(value) - float(table[below]), float(table[above]) - float(value)
    if low == high:
        return table[below if below % 2 == 0 else above]
    return table[below if low < high else above]


def by_the_definition(x_TI: np.ndarray, input_scale: float) -> np.ndarray:
    """x̂ of finite float32 rows, before it is rounded to a dtype."""
    scale = np.float32(input_scale)
    out = np.empty_like(x_TI)
    with np.errstate(over="ignore", under="ignore"):
        for row, x_I in enumerate(x_TI):
            for start in range(0, len(x_I), 16):
                block = x_I[start : start + 16]
                s = nearest(E4M3, np.abs(block).max() / (np.float32(6) * scale))
                for k, x in enumerate(block):
                    m = s * scale
                    q = nearest(E2M1, np.abs(x) / m) if m else np.float32(0)
                    out[row, start + k] = np.copysign(q * m, x)
    return out


def rounded(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """`by_the_definition` of a tensor of any shape and dtype, rounded to its dtype."""
    rows = x.detach().float().reshape(-1, x.shape[-1]).numpy()
    return torch.from_numpy(by_the_definition(rows, input_scale)).to(x.dtype).view(x.shape)
