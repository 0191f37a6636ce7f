"""What the page says of many linear weights at once: spreads by layer and role, cold experts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeGuard

from fourfold.reporting.charts import LEVELS, Band, level_of
from fourfold.reporting.document import ExpertTokens, Linear
from fourfold.reporting.words import clipped, figure, plural

LARGEST = 1e30
"""Figures beyond it are no figures: they are left out of charts."""

Figure = Callable[[Linear], float | None]


@dataclass(frozen=True)
class Spread:
    """A figure of some linear weights: of how many, smallest, middle, largest, the largest's."""

    count: int
    low: float
    mid: float
    high: float
    worst: Linear


def spread(linears: Iterable[Linear], of: Figure) -> Spread | None:
    """The spread of a figure over those that have one; None where none has."""
    known = [(value, linear) for linear in linears if is_fine(value := of(linear))]
    if not known:
        return None
    values = [value for value, _ in known]
    high, worst = max(known, key=lambda each: each[0])
    return Spread(len(known), min(values), median(values), high, worst)


def is_fine(value: float | None) -> TypeGuard[float]:
    """Whether a chart can show it."""
    return value is not None and math.isfinite(value) and 0 <= value < LARGEST


def by_role(linears: Iterable[Linear]) -> list[tuple[str, list[Linear]]]:
    """Linear weights of each role; the role with the most first."""
    found: dict[str, list[Linear]] = defaultdict(list)
    for linear in linears:
        found[linear.role].append(linear)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def by_site(linears: Iterable[Linear]) -> list[tuple[str, list[Linear]]]:
    """Linear weights of each input site: projections of a role whose input scales are the same.

    "experts gate_proj, up_proj" and "experts down_proj", for instance.
    """
    found: dict[tuple[str, str], list[Linear]] = defaultdict(list)
    for linear in linears:
        found[linear.role, linear.name.rpartition(".")[2]].append(linear)
    sites: dict[tuple[str, frozenset[object]], list[str]] = defaultdict(list)
    for (role, projection), each in found.items():
        scales: frozenset[object] = frozenset((one.layer, one.input_scale) for one in each)
        sites[role, scales].append(projection)
    named = [
        (f"{role} {', '.join(names)}", [one for name in names for one in found[role, name]])
        for (role, _), names in sites.items()
    ]
    return sorted(named, key=lambda item: (-len(item[1]), item[0]))


def layers_of(linears: Iterable[Linear]) -> list[int]:
    """Every layer that some weight lies in."""
    return sorted({linear.layer for linear in linears if linear.layer is not None})


def by_layer(linears: Iterable[Linear], of: Figure) -> dict[int, Band]:
    """The band of a figure in each layer that has it."""
    found: dict[int, list[Linear]] = defaultdict(list)
    for linear in linears:
        if linear.layer is not None:
            found[linear.layer].append(linear)
    spreads = ((layer, spread(each, of)) for layer, each in found.items())
    return {layer: _band(layer, each) for layer, each in spreads if each is not None}


def _band(layer: int, each: Spread) -> Band:
    title = (
        f"layer {layer}, {plural(each.count, 'weight')}: median {figure(each.mid)}, "
        f"{figure(each.low)} to {figure(each.high)}\nlargest: {clipped(each.worst.name)}"
    )
    return Band(each.low, each.mid, each.high, title)


@dataclass(frozen=True)
class Coldness:
    """How the calibration tokens fell on the experts of all layers."""

    experts: int
    levels: Mapping[str, int]
    """How many experts each level of the heat map has."""
    unreached: Mapping[str, Sequence[int]]
    """Layer's label -> experts that saw no token."""
    cold: Mapping[str, Sequence[int]]
    """Layer's label -> experts that saw some, but less than `charts.COLD` of an even share."""

    @property
    def unreached_count(self) -> int:
        """Experts without a token."""
        return sum(map(len, self.unreached.values()))

    @property
    def cold_count(self) -> int:
        """Experts with few."""
        return sum(map(len, self.cold.values()))


def coldness(rows: Mapping[str, ExpertTokens]) -> Coldness:
    """Count and list the cold experts of each labelled layer."""
    levels = {level.name: 0 for level in LEVELS}
    lists: dict[str, dict[str, list[int]]] = {"none": {}, "cold": {}}
    for label, row in rows.items():
        total, experts = sum(row.tokens), len(row.tokens)
        for expert, tokens in enumerate(row.tokens):
            name = level_of(tokens, total, experts).name
            levels[name] += 1
            if name in lists:
                lists[name].setdefault(label, []).append(expert)
    return Coldness(sum(levels.values()), levels, lists["none"], lists["cold"])


def labelled(rows: Iterable[ExpertTokens]) -> dict[str, ExpertTokens]:
    """Rows by label: the layer's number, or the module's name where that is not one row's alone."""
    rows = [row for row in rows if row.tokens]
    layers = [row.layer for row in rows]
    found: dict[str, ExpertTokens] = {}
    for row in sorted(rows, key=lambda row: (row.layer is None, row.layer or 0)):
        alone = row.layer is not None and layers.count(row.layer) == 1
        label = str(row.layer) if alone else clipped(row.module, 40) or "?"
        while label in found:
            label += "′"
        found[label] = row
    return found


def worst(linears: Iterable[Linear], many: int) -> list[Linear]:
    """Those with the largest relative errors, the largest first; NaN is the largest of all."""
    return sorted((each for each in linears if each.relative_error is not None), key=_error)[:many]


def _error(linear: Linear) -> tuple[bool, float, str]:
    error = linear.relative_error or 0.0
    return not math.isnan(error), 0.0 if math.isnan(error) else -error, linear.name
