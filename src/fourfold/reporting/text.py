# SPDX-License-Identifier: Apache-2.0
"""Numbers and names as text, for the report and the terminal table."""

from __future__ import annotations

import math
from collections.abc import Iterable


def figure(value: float | None, digits: int = 4) -> str:
    """Format a number, e.g. 1.148e-4, 0.0814 or 12,345; None gives nothing."""
    if value is None:
        return ""
    if not value or not math.isfinite(value) or 0.01 <= abs(value) < 1000:
        return f"{value:.{digits}g}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def integer(value: int | None) -> str:
    """Format a count, e.g. 12,345; None gives nothing."""
    return "" if value is None else f"{value:,}"


def plural(count: int, noun: str) -> str:
    """Return e.g. "1 expert" or "2 experts"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def runs(numbers: Iterable[int], dash: str = "–", comma: str = ", ") -> str:
    """Return sorted numbers with consecutive ones joined, e.g. "5, 7–9"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return comma.join(str(a) if a == b else f"{a}{dash}{b}" for a, b in spans)


def clipped(text: str, longest: int = 160) -> str:
    """Return a text without its middle if it is longer than `longest`."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
