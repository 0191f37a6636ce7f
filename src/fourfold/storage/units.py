# SPDX-License-Identifier: Apache-2.0
"""Sizes and tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

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


def fitted(text: str, width: int) -> str:
    """Return a text whose lines are cut between words where `width` is too narrow for them."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        lines += wrap(
            line,
            width,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def printable(text: str, *, keep: str = "") -> str:
    """Return a text with its control and bidirectional characters escaped, but for those in `keep`.

    Names come from checkpoints, and a model may write anything: it must not move a terminal's
    cursor or reverse a page's text.
    """
    return "".join(x if x.isprintable() or x in keep else ascii(x)[1:-1] for x in text)
