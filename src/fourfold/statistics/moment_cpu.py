# SPDX-License-Identifier: Apache-2.0
"""Passes over the half of a second moment that is stored, on CPUs.

Import this module at first use: it imports numba.

Shapes: I input features.
"""

from __future__ import annotations

from typing import Any

from fourfold.formats.nvfp4.simd import entry_point

TILE = 32
"""Rows and columns that are turned over at once."""


@entry_point
def add_lower(moment: Any, product: Any, shift: float) -> None:
    """Add the lower half of a product to that of a moment, rounded by adding a number first.

    moment: float64 [I, I]; changed. product: float32 [I, I].
    """
    for i in range(moment.shape[0]):
        for j in range(i + 1):
            moment[i, j] += (product[i, j] + shift) - shift


@entry_point
def whole_mean(moment: Any, count: float, mean: Any) -> None:
    """Fill both halves of a mean, float32 [I, I], from the lower half of a moment, float64."""
    width = moment.shape[0]
    for first in range(0, width, TILE):
        for other in range(0, first + TILE, TILE):
            for i in range(first, min(first + TILE, width)):
                for j in range(other, min(other + TILE, i + 1)):
                    mean[i, j] = moment[i, j] / count
            for j in range(other, min(other + TILE, width)):
                for i in range(max(first, j), min(first + TILE, width)):
                    mean[j, i] = mean[i, j]
