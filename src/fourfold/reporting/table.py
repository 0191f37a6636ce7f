"""A summary document's linear weights as a table in the terminal.

One line for each weight, or, as an MoE has thousands of them, one for all experts of a layer:

    model.layers.0.mlp.experts.0-127.gate_proj   768×2048   nvfp4   1.1e-4…2.3e-4   …

The table is laid out here, not by rich, which would take a minute for a hundred thousand rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

from fourfold.errors import UsageError
from fourfold.reporting.document import Document, Linear, read_document, text
from fourfold.reporting.tally import layers_of, spread, worst
from fourfold.reporting.words import clipped, figure, plural, runs, times, whole
from fourfold.storage.units import PLAIN_WIDTH, size

NARROWEST = 24
"""With less room beside the figures, every name gets a line of its own."""

_BOLD, _DIM, _PLAIN = Style(bold=True), Style(dim=True), Style()

Figure = Callable[[Linear], float | None]


@dataclass(frozen=True)
class _Column:
    head: str
    of: Figure
    is_count: bool = False

    def show(self, value: float | None, digits: int = 4) -> str:
        if self.is_count and value is not None:
            return f"{value:,.0f}"
        return figure(value, digits)


_FIGURES = (
    _Column("global scale", lambda linear: linear.global_scale),
    _Column("input amax", lambda linear: linear.input_amax),
    _Column("tokens", lambda linear: linear.tokens, is_count=True),
    _Column("rel. error", lambda linear: linear.relative_error),
)


def table_of(
    summary: Mapping[str, Any],
    *,
    role: str | None = None,
    layer: int | None = None,
    every: bool = False,
    worst_of_all: int | None = None,
) -> LinearTable:
    """The table of a summary document: what quant_summary.json holds, parsed.

    Of one role, or of one layer, or of both. `every`: a line for each weight, the experts of a
    layer in one otherwise. `worst_of_all`: so many with the largest relative errors, the largest
    first. Raises `UsageError` where the document has no weight of that role or layer.
    """
    document = read_document(summary)
    chosen = _chosen(document.linears, role, layer)
    if worst_of_all is not None:
        shown = [[linear] for linear in worst(chosen, worst_of_all)]
    elif every:
        shown = [[linear] for linear in chosen]
    else:
        shown = _grouped(chosen)
    return LinearTable(document, tuple(map(tuple, shown)), len(chosen))


def chosen_entries(
    summary: Mapping[str, Any],
    *,
    role: str | None = None,
    layer: int | None = None,
    worst_of_all: int | None = None,
) -> dict[str, Any]:
    """`summary` with those of its linear weights that `table_of` would show, for JSON."""
    linears = _chosen(read_document(summary).linears, role, layer)
    if worst_of_all is not None:
        linears = worst(linears, worst_of_all)
    places = {linear.name: place for place, linear in enumerate(linears)}
    entries = [each for each in summary.get("linears", []) if _name(each) in places]
    return {**summary, "linears": sorted(entries, key=lambda each: places[_name(each)])}


def _name(entry: object) -> str:
    return text(entry.get("name")) if isinstance(entry, dict) else ""


def _chosen(linears: Sequence[Linear], role: str | None, layer: int | None) -> list[Linear]:
    if role is not None and role not in (roles := Counter(each.role for each in linears)):
        there = ", ".join(f"{name} ({many:,})" for name, many in roles.most_common())
        raise UsageError(f"role {role!r}: no quantized linear weight has it. There are: {there}")
    if layer is not None and layer not in (layers := layers_of(linears)):
        known = f"Layers: {runs(layers)}" if layers else "No layer is known"
        raise UsageError(f"layer {layer}: holds no quantized linear weight. {known}.")
    found = [each for each in linears if role in (None, each.role) and layer in (None, each.layer)]
    if not found and linears:
        raise UsageError(f"layer {layer} holds no quantized linear weight of role {role!r}.")
    return found


def _grouped(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Experts of a layer that have one projection, shape and format together, others alone."""
    found: dict[tuple[object, ...], list[Linear]] = defaultdict(list)
    for linear in linears:
        found[_pattern(linear), linear.role, linear.shape, linear.format].append(linear)
    return list(found.values())


def _pattern(linear: Linear) -> str:
    """The name with `*` for its expert's number."""
    before, dot, after = linear.name.rpartition(f".{linear.expert}.")
    return f"{before}.*.{after}" if dot and linear.expert is not None else linear.name


@dataclass(frozen=True)
class LinearTable:
    """Lines of one or several linear weights. Prints as the command prints."""

    document: Document
    lines: tuple[tuple[Linear, ...], ...]
    linears: int
    """How many linear weights were chosen, shown one by one or not."""

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heads, and the cells of each line; a column that no weight fills is left out."""
        figures = [column for column in _FIGURES if self._has(column.of)]
        heads = ["linear weight", "shape", "format", *(column.head for column in figures)]
        return heads, [_cells(line, figures) for line in self.lines]

    def _has(self, of: Figure) -> bool:
        return any(of(linear) is not None for line in self.lines for linear in line)

    def text_of(self, room: int) -> Iterator[tuple[str, Style]]:
        """The lines that are printed where a line has `room` characters, and how each looks."""
        title, *rest = _head(self.document)
        yield title, _BOLD
        yield from ((words, _PLAIN) for words in rest)
        heads, rows = self.rows()
        widths = _widths(heads, rows, room)
        yield from ((words, _BOLD) for words in _laid_out(heads, widths))
        for row in rows:
            yield from ((words, _PLAIN) for words in _laid_out(row, widths))
        yield self._foot(), _DIM

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for words, style in self.text_of(options.max_width):
            yield Segment(words, style)
            yield Segment.line()

    def _foot(self) -> str:
        shown = sum(map(len, self.lines))
        if shown < self.linears:
            return f"{shown:,} of {plural(self.linears, 'linear weight')}, the largest error first"
        words = f"{plural(shown, 'linear weight')} in {plural(len(self.lines), 'line')}"
        return f"{words}; --all gives each its own" if shown > len(self.lines) else words

    def __str__(self) -> str:
        return "\n".join(words for words, _ in self.text_of(PLAIN_WIDTH))


def _head(document: Document) -> Iterator[str]:
    """What was made, of what, and whether the ledger balances."""
    model = clipped(document.model or document.architecture or "quantized model")
    yield f"{model}: recipe {clipped(document.recipe_name)}"
    ledger = document.ledger
    parts = []
    if ledger.bytes_before is not None and ledger.bytes_after:
        factor = times(ledger.bytes_before, ledger.bytes_after)
        parts.append(f"{size(ledger.bytes_before)} → {size(ledger.bytes_after)} ({factor}×)")
    if ledger.linear_weights_planned is not None:
        done = whole(ledger.linear_weights_quantized) or "?"
        parts.append(f"{done} / {ledger.linear_weights_planned:,} linear weights quantized")
    if document.calibration is not None and document.calibration.tokens:
        parts.append(f"calibrated on {document.calibration.tokens:,} tokens")
    if parts:
        yield "  " + " · ".join(parts)


def _cells(line: Sequence[Linear], columns: Sequence[_Column]) -> list[str]:
    first = line[0]
    name = first.name
    if len(line) > 1:
        numbers = runs((each.expert or 0 for each in line), "-").replace(", ", ",")
        name = _pattern(first).replace(".*.", f".{clipped(numbers, 40)}.")
    shape = "×".join(map(str, first.shape))
    return [name, clipped(shape, 40), clipped(first.format, 20)] + [
        _range(line, column) for column in columns
    ]


def _range(line: Sequence[Linear], column: _Column) -> str:
    if len(line) == 1:
        return column.show(column.of(line[0]))
    found = spread(line, column.of)
    if found is None:
        return ""
    low, high = column.show(found.low, 3), column.show(found.high, 3)
    return low if low == high else f"{low}…{high}"


def _widths(heads: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Of each column; 0 for names that all get lines of their own."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    left = room - sum(widths[1:]) - 2 * (len(widths) - 1)
    return [min(widths[0], left) if left >= NARROWEST else 0, *widths[1:]]


def _laid_out(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """One line, or two where the name has no room beside its figures: it stays in one piece."""
    name, wide = cells[0], widths[0]
    texts, numbers = cells[1:3], cells[3:]
    left = [cell.ljust(width) for cell, width in zip(texts, widths[1:], strict=False)]
    right = [cell.rjust(width) for cell, width in zip(numbers, widths[3:], strict=True)]
    if len(name) > wide:
        yield name
        name = ""
    yield "  ".join([name.ljust(wide), *left, *right]).rstrip()
