"""Small helps for printing, by rich."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

PLAIN_WIDTH = 110


def plain(value: Any) -> str:
    """What rich would print of `value`, without colors."""
    buffer = io.StringIO()
    Console(file=buffer, width=PLAIN_WIDTH, no_color=True).print(value)
    return buffer.getvalue().rstrip("\n")


def size(nbytes: int) -> str:
    """Bytes for people: 11.2 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes} B"
