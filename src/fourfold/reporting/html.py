"""The page: one summary document as HTML that stands alone.

It needs no script, fetches nothing and says so to the browser (`default-src 'none'`); every word
that comes from the document is escaped. The same document gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fourfold.reporting.charts import bar_pair
from fourfold.reporting.document import Document, Ledger, Linear, RoleSizes, read_document, text
from fourfold.reporting.heat import calibration_section, calibration_tile
from fourfold.reporting.marks import (
    NUMBER,
    Column,
    Html,
    definitions,
    details,
    element,
    html,
    join,
    paragraph,
    section,
    table,
    tile,
)
from fourfold.reporting.spreads import activation_section, error_section, kv_section, relative_error
from fourfold.reporting.style import style_sheet
from fourfold.reporting.tally import spread, worst
from fourfold.reporting.words import clipped, figure, plural, times, whole
from fourfold.storage.units import size

WORST = 50
"""Linear weights that are listed by name."""

SHOWN_WORST = 12
"""Of these, the ones that are not folded away."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html_of(summary: Mapping[str, Any]) -> str:
    """The page of a summary document: what quant_summary.json holds, parsed.

    A key that is missing, as in a document of an older version, leaves out what needs it.
    """
    document = read_document(summary)
    body = join(
        [
            _head(document),
            element("main", join(_sections(document))),
            element("footer", _footer(document)),
        ]
    )
    title = html(f"{_title(document)}: {document.recipe_name}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style_sheet()}</style>\n</head>\n"
        f'<body>\n<div class="page">\n{body}\n</div>\n</body>\n</html>\n'
    )


def _sections(document: Document) -> list[Html]:
    return [
        calibration_section(document),
        error_section(document),
        activation_section(document),
        _sizes(document),
        kv_section(document),
        _worst(document.linears),
        element("div", join([_recipe(document), _account(document)]), "two"),
    ]


def _title(document: Document) -> str:
    return clipped(document.model or document.architecture or "quantized model", 90)


def _head(document: Document) -> Html:
    kinds = (document.architecture, document.model_type)
    kind = [part for part in kinds if part and part != _title(document)]
    recipe = document.recipe_name
    about = clipped(text(document.recipe.get("description")), 300)
    lines = [
        element("p", "fourfold · quantization report", "kicker"),
        element("h1", _title(document)),
        paragraph(
            join([*map(clipped, kind), join(["recipe ", element("b", clipped(recipe))])], " · "),
            classes="sub",
        ),
        paragraph(about, classes="muted") if about else "",
        _verdict(document),
        element("div", join(_tiles(document)), "tiles"),
    ]
    return element("header", join(lines))


def _verdict(document: Document) -> Html:
    """The ledger in one line: what was planned is what was quantized, or in red that it is not."""
    ledger = document.ledger
    planned, done = ledger.linear_weights_planned, ledger.linear_weights_quantized
    if planned is None or done is None:
        return element("p", "This document holds no ledger.", "verdict bad")
    if not planned == done == len(document.linears):
        listed = f"{len(document.linears):,} listed"
        words = f"✗ {planned:,} linear weights planned, {done:,} quantized, {listed}"
        return element("p", f"{words}: this does not balance.", "verdict bad")
    read, written = whole(ledger.source_tensors) or "?", whole(ledger.tensors_written) or "?"
    tensors = f"{read} tensors read, {written} written"
    words = f"✓ {planned:,} linear weights planned = {done:,} quantized · {tensors}"
    return element("p", words, "verdict good")


def _tiles(document: Document) -> list[Html]:
    return [
        _size_tile(document),
        _linears_tile(document),
        _error_tile(document.linears),
        calibration_tile(document),
    ]


def _size_tile(document: Document) -> Html:
    ledger = document.ledger
    before, after = ledger.bytes_before, ledger.bytes_after
    if before is None or after is None:
        return tile("Size", "?", "the document does not say")
    notes = [f"{times(before, after)}× smaller"] if after else []
    numel = sum(role.numel for role in document.roles)
    notes += [f"{after * 8 / numel:.2f} bits a weight"] if numel else []
    return tile("Size", f"{size(before)} → {size(after)}", " · ".join(notes))


def _linears_tile(document: Document) -> Html:
    roles = sorted({linear.role for linear in document.linears})
    names = ", ".join(roles) if len(roles) <= 4 else f"{len(roles)} roles"
    return tile("Linear weights quantized", f"{len(document.linears):,}", clipped(names, 60))


def _error_tile(linears: Sequence[Linear]) -> Html:
    found = spread(linears, relative_error)
    if found is None:
        return tile("Relative error", "?", "the document does not say")
    return tile("Relative error, median", figure(found.mid), f"largest {figure(found.high)}")


_SIZE_COLUMNS = (
    Column("role"),
    Column("what happened"),
    Column("tensors", NUMBER),
    Column("linear weights", NUMBER),
    Column("before", NUMBER),
    Column("after", NUMBER),
    Column("bits/weight", NUMBER),
    Column(join([element("span", "before", "key0"), element("span", " after", "key1")]), "bar"),
)


def _sizes(document: Document) -> Html:
    """Bytes of each role, as figures and bars."""
    if not document.roles:
        return Html("")
    largest = max(max(role.bytes_before, role.bytes_after) for role in document.roles)
    ordered = sorted(document.roles, key=lambda role: (-role.bytes_before, role.role, role.what))
    rows = [
        [clipped(role.role, 60), clipped(role.what, 60), *_size_figures(role), _bar(role, largest)]
        for role in ordered
    ]
    names = ("tensors", "linear_weights", "bytes_before", "bytes_after", "numel")
    sums = (sum(getattr(role, name) for role in document.roles) for name in names)
    total = _size_figures(RoleSizes("total", "", *sums))
    return section("Sizes by role", table(_SIZE_COLUMNS, rows, ["total", "", *total, ""]))


def _size_figures(role: RoleSizes) -> list[str]:
    bits = f"{role.bytes_after * 8 / role.numel:.2f}" if role.numel else ""
    linears = whole(role.linear_weights) if role.linear_weights else ""
    return [whole(role.tensors), linears, size(role.bytes_before), size(role.bytes_after), bits]


def _bar(role: RoleSizes, largest: int) -> Html:
    return Html(bar_pair(role.bytes_before, role.bytes_after, largest))


def _worst(linears: Sequence[Linear]) -> Html:
    found = worst(linears, WORST)
    if not found:
        return Html("")
    is_observed = any(linear.input_amax is not None for linear in found)
    columns = _worst_columns(is_observed)
    rows = [_worst_row(place, linear, is_observed) for place, linear in enumerate(found, 1)]
    parts = [table(columns, rows[:SHOWN_WORST])]
    if rows[SHOWN_WORST:]:
        rest = rows[SHOWN_WORST:]
        parts.append(details(f"the next {len(rest)}", table(columns, rest)))
    return section(f"The {plural(len(found), 'linear weight')} with the largest error", *parts)


def _worst_columns(is_observed: bool) -> list[Column]:
    numbers = ["amax", "global scale", *(["input amax", "tokens"] if is_observed else [])]
    return [
        Column("", NUMBER),
        Column("linear weight", "name"),
        Column("role"),
        *(Column(head, NUMBER) for head in ("shape", *numbers, "relative error")),
    ]


def _worst_row(place: int, linear: Linear, is_observed: bool) -> list[str]:
    observed = [figure(linear.input_amax), whole(linear.tokens)] if is_observed else []
    return [
        str(place),
        clipped(linear.name),
        clipped(linear.role, 40),
        clipped(" × ".join(map(str, linear.shape)), 40),
        figure(linear.amax),
        figure(linear.global_scale),
        *observed,
        figure(linear.relative_error),
    ]


def _recipe(document: Document) -> Html:
    data = {key: value for key, value in document.recipe.items() if key != "name"}
    head = element("p", clipped(document.recipe_name), "small muted")
    return section("Recipe", head, element("pre", _as_yaml(data)))


def _as_yaml(data: Mapping[str, Any]) -> str:
    if not data:
        return "(the document holds none)"
    try:
        shown = yaml.safe_dump(
            data, sort_keys=False, default_flow_style=None, width=10_000, allow_unicode=True
        )
    except (yaml.YAMLError, RecursionError):
        return "(cannot be shown as YAML)"
    return "\n".join(text(line) for line in shown.splitlines())


_LEDGER_WORDS = {
    "source_tensors": "tensors of the source",
    "linear_weights_planned": "linear weights planned",
    "linear_weights_quantized": "linear weights quantized",
    "tensors_written": "tensors written",
    "bytes_before": "bytes before",
    "bytes_after": "bytes after",
}


def _account(document: Document) -> Html:
    """The ledger, and what made this: versions, and the calibration data's digest."""
    made = [(clipped(name), clipped(version)) for name, version in document.versions]
    if document.calibration is not None and document.calibration.digest:
        made.append(("calibration data", f"sha256 {clipped(document.calibration.digest)}"))
    parts = [element("h3", "Made with"), definitions(made)] if made else []
    return section("Ledger", definitions(_ledger_lines(document.ledger)), *parts)


def _ledger_lines(ledger: Ledger) -> list[tuple[str, str]]:
    figures = ((words, getattr(ledger, name)) for name, words in _LEDGER_WORDS.items())
    return [(words, whole(value)) for words, value in figures if value is not None]


def _footer(document: Document) -> Html:
    return join(
        [
            f"Written by {clipped(document.producer)} from quant_summary.json, which holds every "
            "linear weight; ",
            element("code", "fourfold summary"),
            " prints it as a table. What was written is proved by ",
            element("code", "fourfold verify"),
            ".",
        ]
    )
