# SPDX-License-Identifier: Apache-2.0
"""What the forms of INT4 and INT8 have in common: unsigned codes, a scale and a zero for a group.

    w[r, c] = (code[r, c] − zero[r, g]) · scale[r, g]        g: the group of column c

Symmetric weights have the zero 8, or 128 for 8 bits. A group is so many columns in a row, or, where
columns were ordered by their activations, what a list of each column's group says. The product is
rounded to the dtype of the scales, and then to that of the weight, as every library does.
"""

from __future__ import annotations

import torch

from fourfold.errors import DamagedError
from fourfold.sources.codecs.base import REMEDY

CHUNK = 1 << 20
"""Codes that are read at a time: few enough to stay in a CPU's cache."""

LOSES_AGAIN = (
    "weights that were quantized to 4 bits lose again; start from the checkpoint that they were "
    "made from, if you have it"
)

SCALE_DTYPES = ("BF16", "F16", "F32")


def check_finite(name: str, scales: torch.Tensor) -> None:
    """Raise `DamagedError` unless all scales are finite. Some tools store negative ones."""
    if not scales.isfinite().all():
        value = float(scales[~scales.isfinite()][0])
        raise DamagedError(f"{name}: {value}; a scale must be finite. {REMEDY}")


def groups_of(name: str, index: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Return the group of each column in I32; empty if they lie one after the other.

    Raises:
        DamagedError: A column belongs to none of the `count` groups.
    """
    ordered = torch.arange(len(index)) // width
    if (index == -1).all() or torch.equal(index.long(), ordered):  # −1: was never set
        return torch.empty(0, dtype=torch.int32)
    if int(index.min()) < 0 or int(index.max()) >= count:
        raise DamagedError(f"{name}: names groups beyond the {count} that there are. {REMEDY}")
    return index.int().contiguous()


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in words I32 [rows, words], lowest bits first: I32 [rows, words·32/bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
