# SPDX-License-Identifier: Apache-2.0
"""The linear weights of a `quant_summary.json` as a table in the terminal.

One line for each weight, or, as an MoE has thousands of them, one for all experts of a layer:

    model.layers.0.mlp.experts.0-127.gate_proj   768×2048   nvfp4   1.1e-4…2.3e-4   …

The table is laid out here because rich would take a minute for a hundred thousand rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

from fourfold.errors import UsageError
from fourfold.models.names import natural
from fourfold.reporting.text import clipped, figure, integer, plural, runs
from fourfold.storage.quant_summary import LinearEntry, QuantSummary
from fourfold.storage.units import PLAIN_WIDTH, fitted, printable, size

NARROWEST_NAME = 24
"""If the figures leave less room than this for names, each name gets a line of its own."""

_FIGURES: dict[str, Callable[[LinearEntry], float | None]] = {
    "global scale": attrgetter("global_scale"),
    "input amax": attrgetter("input_amax"),
    "tokens": attrgetter("tokens"),
    "rel. error": attrgetter("relative_error"),
}


def select(
    summary: QuantSummary,
    *,
    role: str | None = None,
    layer: int | None = None,
    worst: int | None = None,
) -> list[LinearEntry]:
    """Return the linear weights of a role, a layer or both, by layer and name.

    worst: return only that many, the largest relative error first.

    Raises:
        UsageError: If the summary has no such weight.
    """
    linears = sorted(
        summary.linears, key=lambda x: (x.layer is None, x.layer or 0, natural(x.name))
    )
    if role is not None and role not in (roles := Counter(linear.role for linear in linears)):
        known = ", ".join(f"{name} ({count:,})" for name, count in roles.most_common())
        raise UsageError(f"role {role!r}: no quantized linear weight has it. Roles: {known}.")
    layers = {linear.layer for linear in linears if linear.layer is not None}
    if layer is not None and layer not in layers:
        known = runs(layers) or "none"
        raise UsageError(f"layer {layer}: holds no quantized linear weight. Layers: {known}.")
    chosen = [x for x in linears if role in (None, x.role) and layer in (None, x.layer)]
    if linears and not chosen:
        raise UsageError(f"layer {layer} holds no quantized linear weight of role {role!r}.")
    if worst is not None:
        chosen = sorted(chosen, key=lambda x: (-x.relative_error, x.name))[:worst]
    return chosen


def table_of(
    summary: QuantSummary,
    *,
    role: str | None = None,
    layer: int | None = None,
    every: bool = False,
    worst: int | None = None,
) -> LinearTable:
    """Return a table of the linear weights that `select` chooses.

    every: give each weight a line of its own, also the experts of one layer.
    """
    linears = select(summary, role=role, layer=layer, worst=worst)
    lines = defaultdict[object, list[LinearEntry]](list)
    for linear in linears:
        alone = every or worst is not None
        shared = _pattern(linear), linear.role, linear.shape, linear.format
        lines[linear.name if alone else shared].append(linear)
    total = len(linears) if worst is None else len(select(summary, role=role, layer=layer))
    return LinearTable(summary, tuple(map(tuple, lines.values())), total)


def _pattern(linear: LinearEntry) -> str:
    """The name with `*` for its expert's number."""
    before, dot, after = linear.name.rpartition(f".{linear.expert}.")
    return f"{before}.*.{after}" if dot else linear.name


@dataclass(frozen=True)
class LinearTable:
    """Lines of one or several linear weights. Printing it gives the table."""

    summary: QuantSummary
    lines: tuple[tuple[LinearEntry, ...], ...]
    total: int
    """The number of all linear weights; `lines` may show only the worst of them."""
    hint: str = "`every=True` gives each its own"
    """How to get a line for each weight."""

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the heads and the cells of each line, without columns that nothing fills."""
        figures = {
            head: of
            for head, of in _FIGURES.items()
            if any(of(linear) is not None for line in self.lines for linear in line)
        }
        heads = ["linear weight", "shape", "format", *figures]
        return heads, [_cells(line, figures.values()) for line in self.lines]

    def text(self, width: int) -> Iterator[tuple[str, Style]]:
        """Yield the lines to print on a terminal of `width` characters, and their styles."""
        title, *details = _head(self.summary)
        yield title, Style(bold=True)
        yield from ((line, Style()) for line in fitted("\n".join(details), width).splitlines())
        heads, rows = self.rows()
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        room = width - sum(widths[1:]) - 2 * (len(widths) - 1)
        widths[0] = min(widths[0], room) if room >= NARROWEST_NAME else 0
        for row in (heads, *rows):
            style = Style(bold=row is heads)
            yield from ((line, style) for line in _laid_out(row, widths))
        yield self._foot(), Style(dim=True)

    def _foot(self) -> str:
        shown = sum(map(len, self.lines))
        if shown < self.total:
            return f"{shown:,} of {plural(self.total, 'linear weight')}, the largest error first"
        counts = f"{plural(shown, 'linear weight')} in {plural(len(self.lines), 'line')}"
        return f"{counts}; {self.hint}" if shown > len(self.lines) else counts

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line, style in self.text(options.max_width):
            yield Segment(line, style)
            yield Segment.line()

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self.text(PLAIN_WIDTH))


def _head(summary: QuantSummary) -> Iterator[str]:
    ledger, calibration = summary.ledger, summary.calibration
    before, after = ledger.bytes_before, ledger.bytes_after
    yield f"{printable(clipped(summary.title))}: recipe {printable(clipped(summary.recipe_name))}"
    line = (
        f"  {size(before)} → {size(after)} ({before / max(after, 1):.2f}×) · "
        f"{ledger.linear_weights_quantized:,} / {ledger.linear_weights_planned:,} "
        "linear weights quantized"
    )
    if summary.repairs:
        line += f" · {len(summary.repairs):,} repaired"
    if summary.non_finite:
        line += f" · NaN or Inf in {plural(len(summary.non_finite), 'copied tensor')}"
    if summary.folds is not None:
        count = len(summary.folds.choices)
        line += f" · factors of {summary.folds.kept:,} of {plural(count, 'activation')} folded"
    yield line if calibration is None else f"{line} · calibrated on {calibration.tokens:,} tokens"
    gains = [x.asymmetric_gain or 0.0 for x in summary.linears if x.asymmetric is not None]
    if any(gains):
        yield (
            f"  weights make up for {100 * sum(gains) / len(gains):.0f} % of what quantized layers "
            "change in their inputs (squared, held-out texts, mean of the weights)"
        )
    if summary.budget is not None:
        first, last = summary.budget.curve[0], summary.budget.curve[-1]
        yield (
            f"  budget: {first.bits:.2f} → {last.bits:.2f} bits a weight · KL "
            f"{figure(first.kl, 3)} → {figure(last.kl, 3)}, other text "
            f"{figure(first.other_kl, 3)} → {figure(last.other_kl, 3)}"
        )


def _cells(
    line: Sequence[LinearEntry], figures: Iterable[Callable[[LinearEntry], float | None]]
) -> list[str]:
    first, name = line[0], line[0].name
    if len(line) > 1:
        experts = runs((linear.expert or 0 for linear in line), "-", ",")
        name = _pattern(first).replace(".*.", f".{clipped(experts, 40)}.")
    shape = "×".join(map(str, first.shape))
    return [printable(name), shape, printable(clipped(first.format, 20))] + [
        _range([value for linear in line if (value := of(linear)) is not None]) for of in figures
    ]


def _range(values: Sequence[float]) -> str:
    """A single figure, or the smallest and the largest."""
    if len(values) == 1:
        return _figure(values[0], 4)
    low, high = (_figure(of(values), 3) for of in (min, max)) if values else ("", "")
    return low if low == high else f"{low}…{high}"


def _figure(value: float, digits: int) -> str:
    return integer(value) if isinstance(value, int) else figure(value, digits)


def _laid_out(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """One line, or two if the name does not fit beside its figures: it stays in one piece."""
    name, *others = cells
    texts = [cell.ljust(width) for cell, width in zip(others[:2], widths[1:3], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(others[2:], widths[3:], strict=True)]
    if len(name) > widths[0]:
        yield name
        name = ""
    yield "  ".join([name.ljust(widths[0]), *texts, *numbers]).rstrip()
