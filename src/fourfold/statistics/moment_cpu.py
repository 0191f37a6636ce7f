# SPDX-License-Identifier: Apache-2.0
"""Adding a product to a second moment on CPUs, in one pass over the half that is stored.

Import this module at first use: it imports numba.

Shapes: I input features.
"""

from __future__ import annotations

from typing import Any

from fourfold.formats.nvfp4.simd import entry_point


@entry_point
def add_lower(moment: Any, product: Any, shift: float) -> None:
    """Add the lower half of a product to that of a moment, rounded by adding a number first.

    moment: float64 [I, I]; changed. product: float32 [I, I].
    """
    for i in range(moment.shape[0]):
        for j in range(i + 1):
            moment[i, j] += (product[i, j] + shift) - shift
