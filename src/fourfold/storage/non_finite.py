# SPDX-License-Identifier: Apache-2.0
"""Find NaN and Inf in the bytes of floating-point tensors.

Read as integers, the numbers that are not finite are the largest: of those with the sign bit among
unsigned integers, of the others among signed ones. So two maxima, which run at the speed of memory,
prove that there are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_SMALLEST = {
    "F64": ("8", 0x7FF0_0000_0000_0000),
    "F32": ("4", 0x7F80_0000),
    "BF16": ("2", 0x7F80),
    "F16": ("2", 0x7C00),
    "F8_E5M2": ("1", 0x7C),
    "F8_E4M3": ("1", 0x7F),
}
"""Bytes of a number, and the bits of the first one that is not finite."""


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The NaN and Inf in one tensor."""

    name: str
    values: int
    rows: int
    """The number of rows (of the first dimension) that hold some."""
    first_row: int
    last_row: int

    def __str__(self) -> str:
        where = f"row {self.first_row:,}"
        if self.rows > 1:
            where = f"{self.rows:,} rows from {self.first_row:,} to {self.last_row:,}"
        return f"{self.values:,} NaN or Inf in {where}"


def find_non_finite(
    name: str, data: Bytes, dtype: str, row_bytes: int, start: int = 0
) -> NonFinite | None:
    """Return the NaN and Inf in bytes of a tensor; None if there are none, or no floats.

    Args:
        name: The tensor's name.
        data: Whole numbers of the tensor.
        dtype: As in safetensors headers.
        row_bytes: Bytes of one row.
        start: The position of `data` in the tensor, in bytes.
    """
    if dtype not in _SMALLEST or not len(data):
        return None
    size, smallest = _SMALLEST[dtype]
    numbers: npt.NDArray[Any] = data.view(f"u{size}")
    sign = 1 << (8 * int(size) - 1)
    if data.view(f"i{size}").max() < smallest and numbers.max() < sign | smallest:
        return None
    places = np.flatnonzero((numbers & numbers.dtype.type(sign - 1)) >= smallest)
    rows = np.unique((places * int(size) + start) // max(1, row_bytes))
    return NonFinite(name, len(places), len(rows), int(rows[0]), int(rows[-1]))


def merge(parts: Iterable[NonFinite]) -> list[NonFinite]:
    """Join what was found in pieces of tensors, which come in order; sorted by name."""
    merged: dict[str, NonFinite] = {}
    for part in parts:
        before = merged.get(part.name)
        if before is None:
            merged[part.name] = part
            continue
        rows = before.rows + part.rows - (before.last_row == part.first_row)
        merged[part.name] = replace(
            before, values=before.values + part.values, rows=rows, last_row=part.last_row
        )
    return [merged[name] for name in sorted(merged)]
