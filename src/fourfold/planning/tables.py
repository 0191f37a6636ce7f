"""A plan's rows as tables for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from fourfold.planning.rows import Action, Row
from fourfold.storage.units import size


def role_table(rows: Sequence[Row]) -> Table:
    """Roles × what happens × counts and bytes, with a total."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("role")
    table.add_column("what happens")
    for name in ("linear weights", "tensors", "before", "after", "bits/weight"):
        table.add_column(name, justify="right")
    for (role, action), part in by_role(rows):
        table.add_row(role, action, *_figures(part))
    table.add_section()
    table.add_row("total", "", *_figures(rows), style="bold")
    return table


def by_role(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    """Rows by role and what happens to them, the largest first."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        what = "quantized" if row.action is Action.QUANTIZE else "kept bit for bit"
        found[row.role.value, what].append(row)
    return sorted(found.items(), key=lambda item: (-sum(row.nbytes for row in item[1]), item[0]))


def _figures(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    before, after = sum(row.nbytes for row in rows), sum(row.nbytes_after for row in rows)
    linears, numel = sum(row.linears for row in rows), sum(row.numel for row in rows)
    bits = f"{after * 8 / numel:.2f}" if numel else ""
    return [f"{linears:,}" if linears else "", f"{len(rows):,}", size(before), size(after), bits]


def tensor_parallel_lines(sizes: Mapping[int, str]) -> Iterable[Text]:
    """Which tensor-parallel sizes fit the weights, and why not the others."""
    fine = [str(count) for count, obstacle in sizes.items() if not obstacle]
    yield Text(f"tensor-parallel sizes that fit: {', '.join(fine) or 'none'}")
    reasons: dict[str, list[str]] = defaultdict(list)
    for count, why in sizes.items():
        if why:
            reasons[why].append(str(count))
    for why, counts in reasons.items():
        yield Text(f"  not {', '.join(counts)}: {why}", style="dim")
