"""Sizes and tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

PLAIN_WIDTH = 110
"""The width of text that is not printed to a terminal."""


def size(nbytes: int) -> str:
    """Bytes for people: 11.2 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes} B"


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return rows of cells as lines with columns of equal width.

    left: how many columns are flush left; the others are flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
