# SPDX-License-Identifier: Apache-2.0
"""Odd values, and JSON-aware mutations of one document."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from random import Random
from typing import Any


class Raw(str):
    """Text that stands in a JSON document as it is, without quotes."""


ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 0.5, 1e-30, 1e30, math.nan, math.inf, -math.inf, "",
    10**7, 10**9, 2**31, 2**63, 2**64, 10**30, "0", "nan", "none", "../x", "/etc/passwd", "a\0b",
    "\ud800", "é\n\x1b[31m", "x" * 10_000, [], {}, [[]], [None], [0], {"a": {}}, {"": None},
    Raw("1e400"), Raw("-0"), Raw("9" * 5000), Raw("[" * 3000 + "]" * 3000), Raw("[" * 200_000),
    Raw(""), Raw("tru"),
)  # fmt: skip
NUMBERS = (0, 1, 2, 9, 10**6, 10**20)


def mutate_json(document: Any, rng: Random) -> str:
    """Change one place of a parsed document, and say how."""
    places = list(_places(document))
    if not places:
        return "nothing to change"
    holder, key = rng.choice(places)
    before, other = holder[key], rng.choice(places)
    what = rng.choice(("odd", "odd", "near", "near", "gone", "named", "twice", "nested", "as"))
    match what:
        case "gone":
            del holder[key]
            return f"{_short(key)} gone"
        case "named" if isinstance(holder, dict):
            name = rng.choice((_renumbered(key, rng), f"{key}x", key[:-1], key.upper(), *holder))
            holder[name] = holder.pop(key)
            return f"{_short(key)} named {_short(name)}"
        case "twice" if isinstance(holder, dict):
            again = json.dumps(rng.choice((before, None, 0)))
            holder[key] = Raw(f"{json.dumps(before)}, {json.dumps(key)}: {again}")
        case "nested":
            holder[key] = rng.choice(([before], {"x": before}, [[before] * 2]))
        case "as":
            holder[key] = deepcopy(other[0][other[1]])
        case "near":
            holder[key] = _near(before, rng)
        case _:
            holder[key] = rng.choice(ODD)
    return f"{_short(key)} {what}: {_short(before)} → {_short(holder[key])}"


def write_json(document: Any, rng: Random) -> bytes:
    """The document as bytes, whatever it holds."""
    raws: list[str] = []

    def prepared(value: Any) -> Any:
        match value:
            case Raw():
                raws.append(value)
                return f"@raw{len(raws) - 1}@"
            case dict():
                return {key: prepared(each) for key, each in value.items()}
            case list():
                return [prepared(each) for each in value]
        return value

    text = json.dumps(prepared(document), ensure_ascii=rng.random() < 0.5)
    text = re.sub(r'"@raw(\d+)@"', lambda found: raws[int(found[1])], text)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Containers, and the keys or indices of their values."""
    for key in value.keys() if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _near(value: Any, rng: Random) -> Any:
    """A value of the same kind: one more, twice as much, a name with another number."""
    match value:
        case bool():
            return not value
        case int() | float():
            more = (value + 1, value - 1, 2 * value, -value, value / 2, value * 1000, value * 10**6)
            return rng.choice((*more, 0, float(value), str(value)))
        case str():
            odd = (
                f"../{value}",
                f"/{value}",
                f"./{value}",
                value[:-1],
                value.upper(),
                f"{value}\0",
            )
            return rng.choice((*[_renumbered(value, rng)] * 3, *odd))
        case list() if value:
            return rng.choice((value[1:], value * 2, [*value, value[0]], value[::-1], value[:1]))
    return rng.choice(ODD)


def _renumbered(name: str, rng: Random) -> str:
    return re.sub(r"\d+", str(rng.choice(NUMBERS)), name, count=1)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)})"
