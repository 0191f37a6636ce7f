"""Numbers and lists of numbers, as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

LONGEST_NAME = 160


def figure(value: float | None, digits: int = 4) -> str:
    """1.148e-4, 0.0814, 12,345; nothing for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if 0.01 <= abs(value) < 1000:
        return f"{value:.{digits}g}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def whole(value: int | None) -> str:
    """12,345; nothing for None."""
    return "" if value is None else f"{value:,}"


def plural(count: int, noun: str) -> str:
    """1 expert, 2 experts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def runs(numbers: Iterable[int], dash: str = "–") -> str:
    """5, 7–9."""
    found: list[list[int]] = []
    for each in sorted(numbers):
        if found and each == found[-1][1] + 1:
            found[-1][1] = each
        else:
            found.append([each, each])
    return ", ".join(str(a) if a == b else f"{a}{dash}{b}" for a, b in found)


def clipped(name: str, longest: int = LONGEST_NAME) -> str:
    """A name without its middle, where it is absurdly long."""
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def times(before: float, after: float) -> str:
    """3.16 (times smaller)."""
    return f"{before / after:.2f}" if after else ""
