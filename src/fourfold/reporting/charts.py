"""Charts as inline SVG, made by hand: a heat map, lines with a band, a pair of bars.

Sizes are in CSS pixels and fixed, so that a cell is a whole number of pixels; a chart that is wider
than the window scrolls. Every mark says its figures in a <title>, which a browser shows under the
pointer. Colours are classes of `style`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fourfold.reporting.words import figure, plural, whole

WIDTH = 990
"""Of a chart that takes the page's whole width."""

NARROW = 4
"""Of a heat map's narrower cells, the cold ones are drawn this wide, over their neighbours."""

COLD = 0.01
"""An expert is cold where it saw less than this part of an even share of its layer's tokens."""


@dataclass(frozen=True)
class Level:
    """A colour of the heat map: experts whose part of an even share is below `bound`."""

    name: str
    bound: float
    label: str


LEVELS = (
    Level("none", 0, "no token"),
    Level("cold", COLD, f"cold, < {COLD * 100:g}\u00a0%"),
    Level("l0", 0.1, "< 10\u00a0%"),
    Level("l1", 0.25, "< 25\u00a0%"),
    Level("l2", 0.5, "< 50\u00a0%"),
    Level("l3", 1, "< 100\u00a0%"),
    Level("l4", 2, "1–2×"),
    Level("l5", 4, "2–4×"),
    Level("l6", math.inf, "≥ 4×"),
)


def level_of(tokens: int, total: int, experts: int) -> Level:
    """The level of an expert that saw `tokens` of its layer's `total`."""
    if not tokens:
        return LEVELS[0]
    part = tokens * experts / total
    return next((level for level in LEVELS[1:] if part < level.bound), LEVELS[-1])


@dataclass(frozen=True)
class HeatRow:
    """One layer of the heat map."""

    label: str
    tokens: Sequence[int]
    unreached: int = 0
    cold: int = 0


def heat_map(rows: Sequence[HeatRow]) -> str:
    """Layers down, experts across; at the right, how many of a layer are unreached, and cold."""
    experts = max((len(row.tokens) for row in rows), default=0)
    left, right, top = 46, 104, 38
    wide = min(max((WIDTH - left - right) // max(experts, 1), 2), 50)
    high = 26 if len(rows) <= 8 else 16 if len(rows) <= 30 else 10
    gap = 1 if wide >= NARROW else 0
    width, height = left + wide * experts + right, top + high * len(rows) + 4
    with_counts = any(row.unreached or row.cold for row in rows)
    parts = [_expert_axis(experts, left, wide, top, with_counts=with_counts)]
    step = 1 if high >= 16 else 5
    for place, row in enumerate(rows):
        y = top + place * high
        parts.append(f'<g transform="translate({left},{y})">')
        if place % step == 0:
            parts.append(_text(-8, high / 2 + 4, row.label, "end"))
        for x, count, name in ((58, row.unreached, "bad"), (94, row.cold, "warn")):
            if count:
                parts.append(_text(wide * experts + x, high / 2 + 4, f"{count:,}", "end", name))
        parts.append(_cells(row, wide, high, gap))
        parts.append("</g>")
    return _svg(width, height, "Calibration tokens by layer and expert", "".join(parts))


def _cells(row: HeatRow, wide: int, high: int, gap: int) -> str:
    """A row's cells; the cold ones last, so that none of their neighbours lies over them."""
    total, experts = sum(row.tokens), len(row.tokens)
    last: list[str] = []
    parts: list[str] = []
    for expert, tokens in enumerate(row.tokens):
        level = level_of(tokens, total, experts)
        is_cold = level.bound <= COLD
        x, width = expert * wide, wide - gap
        if is_cold and wide < NARROW:
            x, width = x - (NARROW - wide) // 2, NARROW
        part = f" ({tokens * experts / total:.3g}×)" if tokens else ""
        title = f"layer {row.label}, expert {expert}: {plural(tokens, 'token')}{part}"
        (last if is_cold else parts).append(
            f'<rect class="cell {level.name}" x="{x}" width="{width}" height="{high - 1}">'
            f"<title>{escape(title)}</title></rect>"
        )
        if wide >= 36 and high >= 20:
            middle = _text(x + width / 2, high / 2 + 3.5, _short(tokens), "middle", level.name)
            last.append(middle)
    return "".join(parts + last)


def _short(tokens: int) -> str:
    """12k, for inside a cell."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= scale:
            return f"{tokens / scale:.3g}{unit}" if tokens < 1000 * scale else f"{tokens:.1e}"
    return str(tokens)


def _expert_axis(experts: int, left: int, wide: int, top: int, *, with_counts: bool) -> str:
    step = next((step for step in (1, 2, 4, 8, 16, 32, 64) if step * wide >= 26), 128)
    labels = [
        _text(left + at * wide + wide / 2, top - 7, str(at), "middle")
        for at in range(0, experts, step)
    ]
    right = left + wide * experts
    heads = [
        _text(left - 8, top - 7, "layer", "end"),
        _text(left, top - 24, "expert", "start"),
    ]
    if with_counts:
        heads.append(_text(right + 58, top - 7, "no token", "end"))
        heads.append(_text(right + 94, top - 7, "cold", "end"))
    return "".join(heads + labels)


@dataclass(frozen=True)
class Band:
    """What one layer has: the smallest, the middle and the largest; and words for the pointer."""

    low: float
    mid: float
    high: float
    title: str


@dataclass(frozen=True)
class Scale:
    """A vertical axis from `low` to `high`, in even steps or in decades."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False) -> Scale:
        """A scale that holds every value, with room at both ends. Logarithmic only for > 0."""
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        if log and low > 0:
            low, high = low / 1.3, high * 1.3
            return cls(low, max(high, low * 4), log=True)
        room = max((high - low) * 0.1, abs(high) * 0.02, 1e-30)
        return cls(low - room if low - room > 0 or low < 0 else 0.0, high + room)

    def part(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """A few round values."""
        return _decades(self.low, self.high) if self.log else _even(self.low, self.high)


def _even(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(step * unit for step in (1, 2, 2.5, 5, 10) if step * unit >= rough)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    leads = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 6)
    values = [lead * 10.0**k for k in range(first, last + 1, every) for lead in leads]
    return [value for value in values if low <= value <= high]


def bands(
    series: Sequence[Mapping[int, Band]],
    layers: Sequence[int],
    scale: Scale,
    *,
    width: int = 480,
    height: int = 154,
    label: str = "",
) -> str:
    """Lines over the layers, each with its band from smallest to largest; at most two series."""
    left, right, top, bottom = 56, 12, 8, 26
    plot = _Plot(layers, scale, left, top, width - left - right, height - top - bottom)
    parts = [plot.frame()]
    for place, points in enumerate(series):
        parts.append(f'<g class="{("first", "second")[place % 2]}">{plot.draw(points)}</g>')
    parts.append(plot.hovers({layer: band for points in series for layer, band in points.items()}))
    return _svg(width, height, label, "".join(parts))


@dataclass(frozen=True)
class _Plot:
    """The area that lines are drawn in."""

    layers: Sequence[int]
    scale: Scale
    left: float
    top: float
    width: float
    height: float

    @property
    def pitch(self) -> float:
        return self.width / max(len(self.layers), 1)

    def x(self, place: int) -> float:
        return round(self.left + (place + 0.5) * self.pitch, 1)

    def y(self, value: float) -> float:
        return round(self.top + (1 - self.scale.part(value)) * self.height, 1)

    def frame(self) -> str:
        """Grid, and both axes' labels."""
        right, bottom = self.left + self.width, self.top + self.height
        parts = []
        for tick in self.scale.ticks():
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(_text(self.left - 8, y + 4, figure(tick, 3), "end"))
        parts.append(
            f'<line class="axis" x1="{self.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        )
        step = next((k for k in (1, 2, 5, 10, 20, 50, 100) if k * self.pitch >= 30), 1000)
        for place in range(0, len(self.layers), step):
            parts.append(_text(self.x(place), bottom + 18, str(self.layers[place]), "middle"))
        parts.append(_text(self.left - 8, bottom + 18, "layer", "end"))
        return "".join(parts)

    def draw(self, points: Mapping[int, Band]) -> str:
        """Runs of neighbouring layers as bands; dots and whiskers where there are few."""
        parts = []
        dotted = len(self.layers) <= 24
        for run in _neighbours(self.layers, points):
            bands = [(self.x(place), points[self.layers[place]]) for place in run]
            if len(run) > 1:
                parts.append(self._band(bands))
            if dotted or len(run) == 1:
                parts.extend(self._dot(x, band, whisker=len(run) == 1) for x, band in bands)
        return "".join(parts)

    def _band(self, bands: Sequence[tuple[float, Band]]) -> str:
        upper = [f"{x},{self.y(band.high)}" for x, band in bands]
        lower = [f"{x},{self.y(band.low)}" for x, band in reversed(bands)]
        middle = [f"{x},{self.y(band.mid)}" for x, band in bands]
        return (
            f'<polygon class="band" points="{" ".join(upper + lower)}"/>'
            f'<polyline class="line" points="{" ".join(middle)}"/>'
        )

    def _dot(self, x: float, band: Band, *, whisker: bool) -> str:
        dot = f'<circle class="dot" cx="{x}" cy="{self.y(band.mid)}" r="2.5"/>'
        low, high = self.y(band.low), self.y(band.high)
        if not whisker or low == high:
            return dot
        return f'<line class="whisker" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>{dot}'

    def hovers(self, points: Mapping[int, Band]) -> str:
        """A column over each layer that says its figures under the pointer."""
        size = f'y="{self.top}" width="{self.pitch:.2f}" height="{self.height}"'
        return "".join(
            f'<rect class="hover" x="{self.left + place * self.pitch:.2f}" {size}>'
            f"<title>{escape(points[layer].title)}</title></rect>"
            for place, layer in enumerate(self.layers)
            if layer in points
        )


def _neighbours(layers: Sequence[int], points: Mapping[int, Band]) -> list[list[int]]:
    """Places in `layers` that have a point, in runs without a gap."""
    found: list[list[int]] = []
    for place, layer in enumerate(layers):
        if layer not in points:
            continue
        if found and found[-1][-1] == place - 1:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def bar_pair(before: int, after: int, largest: int, width: int = 270) -> str:
    """Bytes before, and below them bytes after, against the largest of all."""
    unit = width / max(largest, 1)
    bars = (
        f'<rect class="{name}" y="{y}" width="{max(value * unit, 1):.1f}" height="7" rx="1.5"/>'
        for name, y, value in (("before", 0, before), ("after", 8, after))
    )
    label = f"{whole(before)} bytes before, {whole(after)} after"
    return _svg(width, 15, label, "".join(bars))


def _text(x: float, y: float, words: str, anchor: str, name: str = "") -> str:
    named = f' class="{name}"' if name else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{named}>{escape(words)}</text>'


def _svg(width: int, height: int, label: str, inside: str) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{inside}</svg>'
    )
