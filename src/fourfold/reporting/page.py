# SPDX-License-Identifier: Apache-2.0
"""Draws `report.html`, a page about a quantized checkpoint, from its `quant_summary.json`.

The functions here turn a summary into tables and heat maps of plain strings;
`report.html.jinja` lays them out. The page fetches nothing, every name in it is escaped, and the
same summary gives the same bytes. Its one script searches and sorts the table of all weights.

It is drawn before the checkpoint is verified; `note_in_report` puts the result into it, and a page
that is drawn again keeps that.
"""

from __future__ import annotations

import bisect
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from fourfold.errors import OutputError
from fourfold.reporting.budget import CURVE, budget_text, components_table, curve_rows
from fourfold.reporting.quality import quality_rows, quality_text
from fourfold.reporting.serving import Served, serve_commands
from fourfold.reporting.table import select
from fourfold.reporting.text import clipped, figure, integer, plural, runs
from fourfold.storage.atomic import FileWriter
from fourfold.storage.names import REPORT
from fourfold.storage.quant_summary import (
    ExpertsEntry,
    LinearEntry,
    QuantSummary,
    RoleEntry,
    read_summary,
)
from fourfold.storage.units import printable, size
from fourfold.verification import Report

WORST = 20
"""How many linear weights with the largest errors are listed by name."""

COLD = 0.01
"""An expert is cold if it saw less than this part of an even share of its layer's tokens."""

SHARES = (
    (COLD, "cold", f"cold, < {COLD:.0%}"),
    (0.1, "l0", "< 10%"),
    (0.25, "l1", "< 25%"),
    (0.5, "l2", "< 50%"),
    (1, "l3", "< 100%"),
    (2, "l4", "1–2×"),
    (4, "l5", "2–4×"),
    (float("inf"), "l6", "≥ 4×"),
)
"""Colors of tokens: the part of an even share that ends each, its CSS class and its meaning."""

_BEGIN, _END = "<!-- fourfold: verification -->", "<!-- fourfold: end -->"

Figure = Callable[[LinearEntry], float | None]


class Table(NamedTuple):
    """A table of strings. The first `texts` columns are text, the others numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


class Cell(NamedTuple):
    """One expert of one layer in a heat map."""

    color: str
    """A CSS class: "none", "cold", or "l0" to "l6"."""
    title: str
    label: str
    """The value in few characters, shown where cells are wide."""


class HeatMap(NamedTuple):
    """Values by layer (rows) and expert (columns)."""

    rows: Sequence[tuple[str, Sequence[Cell]]]
    """The label of each row, and its cells."""
    legend: Sequence[tuple[str, str]]
    """Colors and their meanings."""


def write_report(out: str | Path, file: str | Path | None = None) -> Path:
    """Draw the report of the checkpoint in the folder `out`, and return its path.

    Args:
        out: A folder that `fourfold quantize` wrote.
        file: The file to write; by default `report.html` in `out`.

    Raises:
        SourceError: If the folder has no valid summary.
        OutputError: If the file cannot be written.
    """
    folder = Path(out).expanduser()
    page = render_report(read_summary(folder), verified=_noted(folder / REPORT))
    path = Path(file or folder / REPORT).expanduser()
    try:
        path.write_text(page, "utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}.") from error
    return path


def draw_report(summary: QuantSummary, warn: Callable[[str], None]) -> str | None:
    """Return the report; if it cannot be drawn, call `warn` with the reason and return None.

    For the end of a run: a defect of the report must not cost the checkpoint.
    """
    try:
        return render_report(summary)
    except Exception as error:
        warn(
            f"{REPORT}: could not be drawn ({type(error).__name__}: {error}). The checkpoint is "
            "not affected. `fourfold report` draws the page again."
        )
        return None


def redraw_report(folder: Path, summary: QuantSummary) -> None:
    """Draw the page in `folder` again, if there is one of ours; it keeps its verification."""
    if (verified := _noted(folder / REPORT)) is not None:
        FileWriter(folder).write_text(REPORT, render_report(summary, verified=verified))


def note_in_report(folder: Path, report: Report) -> None:
    """Put the result of today's verification into the page in `folder`, if there is one."""
    if _noted(folder / REPORT) is None:
        return
    today = datetime.now(UTC).date().isoformat()
    before, _, rest = (folder / REPORT).read_text("utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    FileWriter(folder).write_text(REPORT, f"{before}{_BEGIN}{_verdict(report, today)}{_END}{after}")


def _noted(page: Path) -> str | None:
    """The result of the verification on an earlier page; None if the page is not ours."""
    try:
        _, begin, rest = page.read_text("utf-8").partition(_BEGIN)
    except (OSError, UnicodeDecodeError):
        return None
    text, end, _ = rest.partition(_END)
    return text if begin and end else None


def _verdict(report: Report, today: str) -> str:
    """The result as HTML, in the same words with and without the source: `merge` has none."""
    if not report.clean:
        count = plural(len(report.errors), "error")
        text = f"✗ Verified on {today}: {count}. <code>fourfold verify OUT</code> lists them."
        return f'<p class="bad">{text}</p>'
    counts = report.counts
    linears = plural(counts.quantized_linears, "linear weight")
    warnings = f", {plural(len(report.warnings), 'warning')}" if report.warnings else ""
    return (
        f'<p class="good">✓ Verified on {today}, after it was written: no error{warnings} · '
        f"{linears} · {counts.zero_block_scales:,} zero scales of {counts.block_scales:,}</p>"
    )


NOT_VERIFIED = (
    "<p>Not verified when it was written. <code>fourfold verify OUT --source MODEL</code> proves "
    "it tensor by tensor.</p>"
)


def render_report(summary: QuantSummary, *, verified: str | None = None) -> str:
    """Return the report on a quantized checkpoint as one HTML page.

    verified: what an earlier page of the checkpoint says of its verification, as HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"integer": integer, "clipped": clipped, "plural": plural}
    linears = select(summary)
    served = Served.of_summary(summary)
    folder = re.sub(r"[^\w.-]+", "-", summary.title).strip("-.") or "OUT"
    return environment.get_template(f"{REPORT}.jinja").render(
        summary=summary,
        recipe=_recipe(summary),
        tiles=_tiles(summary),
        roles=_roles(summary.roles),
        quality=_quality(summary),
        budget=_budget(summary),
        errors=_spreads("role", linears, attrgetter("role"), attrgetter("relative_error")),
        error_map=_error_map(linears),
        tokens_map=_tokens_map(summary.experts),
        unreached=_list_experts(summary.experts, lambda share: share == 0),
        cold=_list_experts(summary.experts, lambda share: 0 < share < COLD),
        inputs=_spreads(
            "input of",
            linears,
            lambda x: f"{x.role} {x.name.rpartition('.')[2]}",
            attrgetter("input_amax"),
        ),
        kv_cache=Table(
            ("attention module", "k_scale", "v_scale"),
            [(clipped(x.name), figure(x.k_scale), figure(x.v_scale)) for x in summary.kv_cache],
        ),
        worst=_worst(select(summary, worst=WORST)),
        linears=Markup(_linears(linears)),
        verified=Markup(f"{_BEGIN}{verified or NOT_VERIFIED}{_END}"),
        commands={
            engine.value: serve_commands(engine, f"{folder}-NVFP4", served)
            for engine in served.engines
        },
    )


def _recipe(summary: QuantSummary) -> list[str]:
    """The lines of the recipe in YAML."""
    import yaml

    entries = {name: value for name, value in summary.recipe.items() if name != "name"}
    text = yaml.safe_dump(
        entries, sort_keys=False, default_flow_style=None, width=1000, allow_unicode=True
    )
    return text.splitlines()


def _tiles(summary: QuantSummary) -> list[tuple[str, str, str]]:
    """The figures at the top of the page: heading, figure, note."""
    before, after = summary.ledger.bytes_before, summary.ledger.bytes_after
    errors = [linear.relative_error for linear in summary.linears] or [0.0]
    roles = ", ".join(sorted({linear.role for linear in summary.linears}))
    tiles = [
        ("Size", f"{size(before)} → {size(after)}", f"{before / max(after, 1):.2f}× smaller"),
        ("Linear weights quantized", integer(len(summary.linears)), clipped(roles, 60)),
        (
            "Relative error",
            f"median {figure(statistics.median(errors))}",
            f"largest {figure(max(errors))}",
        ),
    ]
    if summary.calibration is None:
        return [*tiles, ("Calibration", "none", _why_none(summary))]
    unreached = plural(summary.calibration.unreached_experts, "expert")
    tokens = plural(summary.calibration.tokens, "token")
    return [*tiles, ("Calibration", tokens, f"{unreached} without a token")]


def _quality(summary: QuantSummary) -> tuple[str, Table] | None:
    """What was measured of the model, and the figures."""
    if (entry := summary.evaluation) is None:
        return None
    return quality_text(entry), Table(("figure", "value"), quality_rows(entry))


def _budget(summary: QuantSummary) -> tuple[str, Table, Table] | None:
    """What the recipe's budget was spent on: in words, the curve, and the components."""
    if (entry := summary.budget) is None:
        return None
    heads, rows = components_table(entry)
    return budget_text(entry), Table(CURVE, curve_rows(entry)), Table(heads, rows, texts=2)


def _roles(entries: Sequence[RoleEntry]) -> Table:
    """Tensors and bytes of each role; the last row is the total."""
    ordered = sorted(entries, key=lambda entry: (-entry.bytes_before, entry.role, entry.what))
    counts = ("tensors", "linear_weights", "numel", "bytes_before", "bytes_after")
    sums = {name: sum(getattr(entry, name) for entry in entries) for name in counts}
    ordered.append(RoleEntry(role="total", what="", **sums))
    rows = [
        [
            clipped(entry.role, 60),
            clipped(entry.what, 60),
            integer(entry.tensors),
            integer(entry.linear_weights or None),
            size(entry.bytes_before),
            size(entry.bytes_after),
            f"{entry.bytes_after * 8 / entry.numel:.2f}" if entry.numel else "",
        ]
        for entry in ordered
    ]
    heads = ("role", "what happened", "tensors", "linear weights", "before", "after", "bits/weight")
    return Table(heads, rows, texts=2)


def _spreads(
    kind: str, linears: Iterable[LinearEntry], group_of: Callable[[LinearEntry], str], of: Figure
) -> Table:
    """The smallest, median and largest figure of each group of linear weights."""
    groups: dict[str, list[float]] = defaultdict(list)
    for linear in linears:
        if (value := of(linear)) is not None:
            groups[group_of(linear)].append(value)
    rows = [
        [
            clipped(name, 60),
            integer(len(values)),
            *map(figure, (min(values), statistics.median(values), max(values))),
        ]
        for name, values in groups.items()
    ]
    return Table((kind, "linear weights", "smallest", "median", "largest"), rows)


def _error_map(linears: Sequence[LinearEntry]) -> HeatMap | None:
    """The largest error of each expert's projections, in seven colors from smallest to largest."""
    layers: dict[str, dict[int, float]] = defaultdict(dict)
    for linear in linears:
        if linear.expert is not None:
            errors = layers[_label(linear.layer, linear.name.rpartition(f".{linear.expert}.")[0])]
            errors[linear.expert] = max(linear.relative_error, errors.get(linear.expert, 0.0))
    if not layers:
        return None
    known = [error for errors in layers.values() for error in errors.values()]
    low, high = min(known), max(known)
    bounds = [low + (high - low) * step / 7 for step in range(7)]
    rows = [
        (
            label,
            [
                Cell(
                    f"l{bisect.bisect(bounds, error) - 1}",
                    f"layer {label}, expert {expert}: {figure(error)}",
                    figure(error, 3),
                )
                for expert, error in sorted(errors.items())
            ],
        )
        for label, errors in layers.items()
    ]
    return HeatMap(rows, [(f"l{step}", f"≥ {figure(bound)}") for step, bound in enumerate(bounds)])


def _tokens_map(entries: Sequence[ExpertsEntry]) -> HeatMap | None:
    """The calibration tokens of each expert, colored by their part of an even share."""
    rows = []
    for entry in entries:
        label = _label(entry.layer, entry.module)
        cells = [
            Cell(
                color_of(share),
                f"layer {label}, expert {expert}: {plural(tokens, 'token')}",
                str(tokens) if tokens < 1000 else f"{tokens / 1000:.3g}k",
            )
            for expert, (tokens, share) in enumerate(zip(entry.tokens, _shares(entry), strict=True))
        ]
        rows.append((label, cells))
    legend = [("none", "no token"), *((color, meaning) for _, color, meaning in SHARES)]
    return HeatMap(rows, legend) if rows else None


def color_of(share: float) -> str:
    """Return the color of an expert that saw this part of an even share of tokens."""
    return "none" if share == 0 else next(color for end, color, _ in SHARES if share < end)


def _shares(entry: ExpertsEntry) -> list[float]:
    even = max(sum(entry.tokens), 1) / max(len(entry.tokens), 1)
    return [tokens / even for tokens in entry.tokens]


def _why_none(summary: QuantSummary) -> str:
    if any(linear.input_scale is not None for linear in summary.linears):
        return "all input scales are 1"
    return "activations are not quantized"


def _list_experts(
    entries: Sequence[ExpertsEntry], is_listed: Callable[[float], bool]
) -> tuple[int, list[str]]:
    """Count the experts whose share of tokens is to be listed, and list them by layer."""
    total, lines = 0, []
    for entry in entries:
        experts = [expert for expert, share in enumerate(_shares(entry)) if is_listed(share)]
        total += len(experts)
        if experts:
            lines.append(f"layer {_label(entry.layer, entry.module)}: {runs(experts)}")
    return total, lines


def _label(layer: int | None, module: str) -> str:
    return clipped(module, 40) if layer is None else str(layer)


def _worst(linears: Sequence[LinearEntry]) -> Table:
    rows = [
        [
            clipped(linear.name),
            clipped(linear.role, 40),
            clipped("×".join(map(str, linear.shape)), 40),
            figure(linear.amax),
            figure(linear.global_scale),
            figure(linear.input_amax),
            integer(linear.tokens),
            figure(linear.relative_error),
        ]
        for linear in linears
    ]
    heads = ("linear weight", "role", "shape", "amax", "global scale", "input amax", "tokens")
    return Table((*heads, "relative error"), rows, texts=2)


FIGURES = ("amax", "global_scale", "input_amax", "tokens", "relative_error")


def _linears(linears: Sequence[LinearEntry]) -> str:
    """All linear weights as JSON for the page's script, small enough for a hundred thousand.

    `groups` are weights whose names differ in the expert alone: the name before and after it, the
    role, the shape and the format. `rows` have the number of a group, the expert, and figures.
    """
    groups: dict[tuple[str, ...], int] = {}
    rows = []
    for linear in linears:
        before, dot, after = linear.name.rpartition(f".{linear.expert}.")
        parts = (f"{before}.", f".{after}") if dot else (linear.name, "")
        about = linear.role, "×".join(map(str, linear.shape)), linear.format
        group = (clipped(parts[0], 120), clipped(parts[1], 60), *(clipped(x, 40) for x in about))
        number = groups.setdefault(tuple(map(printable, group)), len(groups))
        figures = [getattr(linear, name) for name in FIGURES]
        short = [float(f"{x:.4g}") if isinstance(x, float) else x for x in figures]
        rows.append([number, linear.expert if dot else None, *short])
    text = json.dumps({"groups": list(groups), "rows": rows}, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # nothing in it may end the script
