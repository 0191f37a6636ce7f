# SPDX-License-Identifier: Apache-2.0
"""A plan as text for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fourfold.planning.rows import Action, Row
from fourfold.storage.units import aligned, size

HEADER = ("role", "what happens", "linear weights", "tensors", "before", "after", "bits/weight")


_DISPENSABLE = ("tensors", "linear weights", "bits/weight", "before")
"""Columns that are left out where there is no room, in this order."""


def role_lines(rows: Sequence[Row], width: int | None = None) -> list[str]:
    """Return a table of counts and bytes: a line for each role and what happens to it, a total.

    width: characters of a line, at most; columns beyond that are left out.
    """
    table = [HEADER, *((*key, *_figures(part)) for key, part in by_role(rows))]
    columns = dict(
        zip(HEADER, zip(*table, ("total", "", *_figures(rows)), strict=True), strict=True)
    )
    for name in ("", *_DISPENSABLE):
        columns.pop(name, None)
        lines = aligned(list(zip(*columns.values(), strict=True)), left=2)
        if width is None or max(map(len, lines)) <= width:
            break
    return lines


def by_role(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    """Return rows by role and what happens to them, the largest first."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kept = "kept, decoded" if row.is_decoded else "kept bit for bit"
        what = "quantized" if row.action is Action.QUANTIZE else kept
        groups[row.role.value, what].append(row)
    return sorted(groups.items(), key=lambda item: (-sum(row.nbytes for row in item[1]), item[0]))


def _figures(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    before, after = sum(row.nbytes for row in rows), sum(row.nbytes_after for row in rows)
    linears, numel = sum(row.linears for row in rows), sum(row.numel for row in rows)
    bits = f"{after * 8 / numel:.2f}" if numel else ""
    return [f"{linears:,}" if linears else "", f"{len(rows):,}", size(before), size(after), bits]


def tensor_parallel_lines(sizes: Mapping[int, str]) -> Iterator[str]:
    """Say which tensor-parallel sizes fit the weights, and why the others do not."""
    fitting = [str(count) for count, obstacle in sizes.items() if not obstacle]
    yield f"tensor-parallel sizes that fit: {', '.join(fitting) or 'none'}"
    reasons: dict[str, list[str]] = defaultdict(list)
    for count, why in sizes.items():
        if why:
            reasons[why].append(str(count))
    for why, counts in reasons.items():
        yield f"  not {', '.join(counts)}: {why}"
