# SPDX-License-Identifier: Apache-2.0
"""The model card: OUT's README.md, ready for the hub.

It says what the checkpoint is made of and how to serve it, with front matter that the hub reads:
base model, licence, language and task come from the source's own card, which is kept beside it as
SOURCE_README.md. The card is written before the checkpoint is verified; `note_verification` puts
the result into it.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fourfold.formats.base import FORMATS
from fourfold.recipes import Recipe, builtin_names
from fourfold.reporting.guide import NOT_MEASURED, cost_of
from fourfold.reporting.serving import (
    LLAMA_CPP,
    NVFP4,
    Served,
    obstacle_in_llama_cpp,
    serve_commands,
    uses,
)
from fourfold.reporting.text import clipped, figure, integer, plural
from fourfold.storage.atomic import FileWriter
from fourfold.storage.names import CARD
from fourfold.storage.quant_summary import QuantSummary
from fourfold.storage.units import printable, size
from fourfold.verification import Report

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Entries of the source card's front matter that hold for the quantized model, too."""

NOT_VERIFIED = "Not verified. `fourfold verify` checks it, and compares it with the source."
_BEGIN, _END = "<!-- fourfold: verification -->", "<!-- fourfold: end -->"


def draw_card(
    summary: QuantSummary, base_model: str, source_card: str, warn: Callable[[str], None]
) -> str | None:
    """Return the card; if it cannot be drawn, call `warn` with the reason and return None.

    For the end of a run: a defect of the card must not cost the checkpoint.
    """
    try:
        return render_card(summary, base_model=base_model, source_card=source_card)
    except Exception as error:
        warn(
            f"{CARD}: could not be drawn ({type(error).__name__}: {error}). The checkpoint is not "
            "affected."
        )
        return None


def render_card(summary: QuantSummary, *, base_model: str, source_card: str = "") -> str:
    """Return the card of a checkpoint.

    Args:
        summary: Its summary.
        base_model: The source's name on the hub, or that of its folder.
        source_card: The source's README.md; empty if it has none.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown: `_cell` escapes what comes from a checkpoint
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "integer": integer, "plural": plural, "size": size}
    carried = _carried(source_card)
    served = Served.of_summary(summary)
    title = re.sub(r"[^\w.-]+", "-", base_model.rpartition("/")[2]).strip("-.") or "model"
    folder = f"{title}-NVFP4"
    return environment.get_template(f"{CARD}.jinja").render(
        front_matter=_front_matter(base_model, carried, served.layout),
        summary=summary,
        title=folder,
        base_model=base_model,
        is_on_hub="/" in base_model,
        licence=carried.get("license"),
        has_source_card=bool(source_card),
        served=served,
        formats=_formats(summary),
        commands={str(engine): serve_commands(engine, folder, served) for engine in served.engines},
        uses=uses(served),
        llama_cpp=serve_commands(LLAMA_CPP, folder, served),
        obstacle=obstacle_in_llama_cpp(served),
        has_code=any(name.endswith(".py") for name in summary.files),
        roles=list(_roles(summary)),
        errors=list(_errors(summary)),
        recipe=_recipe(summary),
        cost=_cost(summary),
        verification=f"{_BEGIN}\n{NOT_VERIFIED}\n{_END}",
    )


def note_verification(folder: Path, report: Report) -> None:
    """Put the result of a verification into the card in `folder`, if there is one of ours."""
    try:
        text = (folder / CARD).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        noted = f"{before}{begin}\n{_verdict(report)}\n{end}{after}"
        FileWriter(folder).write_text(CARD, noted)


def _verdict(report: Report) -> str:
    """The result, in the same words whether the source was at hand or not: `merge` has none."""
    counts = report.counts
    if not report.clean:
        return "**Not clean**: verification found errors. `fourfold verify` lists them."
    linears = plural(counts.quantized_linears, "linear weight")
    return (
        f"Verified after it was written, without an error: {linears}, "
        f"{counts.zero_block_scales:,} zero scales of {counts.block_scales:,}. `fourfold verify` "
        "does it again."
    )


def _carried(source_card: str) -> dict[str, Any]:
    """The entries of the source's front matter that hold for the output; a broken one has none."""
    import yaml

    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", source_card, re.DOTALL)
    try:
        entries = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, Mapping):
        return {}
    return {name: entries[name] for name in CARRIED if _is_plain(entries.get(name))}


def _is_plain(value: object) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(x, str) and x and x.isprintable() for x in values)


def _front_matter(base_model: str, carried: Mapping[str, Any], layout: str) -> str:
    import yaml

    hub_name = re.sub(r"[^\w./-]+", "-", base_model, flags=re.ASCII)
    entries = {
        "base_model": hub_name.strip("-.") or "model",
        "base_model_relation": "quantized",
        **carried,
        "tags": ["nvfp4", layout, "fourfold"],
    }
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).rstrip()


def _formats(summary: QuantSummary) -> str:
    """How many linear weights there are of each format."""
    counts = Counter(linear.format for linear in summary.linears)
    if counts.keys() <= {NVFP4}:
        return f"{plural(summary.ledger.linear_weights_quantized, 'linear weight')} in 4 bits"
    titles = {name: FORMATS[name].title if name in FORMATS else _cell(name) for name in counts}
    return ", ".join(f"{plural(counts[x], 'linear weight')} in {titles[x]}" for x in counts)


def _roles(summary: QuantSummary) -> Iterator[tuple[str, ...]]:
    """The table of formats by role, the largest first."""
    formats = defaultdict[str, set[str]](set)
    for linear in summary.linears:
        formats[linear.role].add(linear.format.upper())
    dtypes = "as in the source"
    for entry in sorted(summary.roles, key=lambda x: (-x.bytes_before, x.role, x.what)):
        is_quantized = bool(entry.linear_weights) and entry.what == "quantized"
        yield (
            _cell(entry.role),
            ", ".join(sorted(formats[entry.role])) if is_quantized else dtypes,
            integer(entry.tensors),
            size(entry.bytes_before),
            size(entry.bytes_after),
            f"{entry.bytes_after * 8 / entry.numel:.2f}" if entry.numel else "",
        )


def _errors(summary: QuantSummary) -> Iterator[tuple[str, ...]]:
    errors = defaultdict[str, list[float]](list)
    for linear in summary.linears:
        errors[linear.role].append(linear.relative_error)
    for role, values in sorted(errors.items()):
        median, largest = statistics.median(values), max(values)
        yield _cell(role), integer(len(values)), figure(median, 3), figure(largest, 3)


def _cost(summary: QuantSummary) -> str:
    """The recipe's measured cost on the embedded model; empty if there is no measurement."""
    name = summary.recipe_name
    if name not in builtin_names():
        return ""
    given = summary.recipe if summary.budget is None else summary.budget.recipe
    is_builtin = Recipe.load(name).model_dump(mode="json") == dict(given)
    return cost_of(name) if is_builtin and cost_of(name) != NOT_MEASURED else ""


def _recipe(summary: QuantSummary) -> str:
    import yaml

    entries = {name: value for name, value in summary.recipe.items() if name != "name"}
    text = yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, width=100)
    return printable(text.rstrip(), keep="\n")


def _cell(text: str) -> str:
    """Text from a checkpoint, in one line of Markdown or a cell of a table."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", printable(clipped(text)))
