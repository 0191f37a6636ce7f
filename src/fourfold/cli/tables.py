# SPDX-License-Identifier: Apache-2.0
"""Results in color: what `str` of a result says, laid out for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from fourfold.cli.options import as_options
from fourfold.cli.terminal import console, has_width
from fourfold.storage.units import aligned, fitted

if TYPE_CHECKING:
    from fourfold.evaluation.evaluated import Evaluation
    from fourfold.evaluation.generation import Generation
    from fourfold.evaluation.inspection import Inspection
    from fourfold.evaluation.sensitivity import Sensitivity
    from fourfold.planning import Plan
    from fourfold.recipes import Recipe
    from fourfold.run.convert import Converted
    from fourfold.run.merge import Merged
    from fourfold.run.result import Result
    from fourfold.verification import Report

_PLAN = {
    r"\A.*(?=: .* → recipe )": "bold",
    r"(?m)^(role|total) .*$": "bold",
    r"(?m)^  not \d.*$": "dim",
    r"(?m)^note: .*$": "yellow",
}
"""Regular expressions, and the style of what they match."""

_REPORT = {
    r"(?m)^error [\w-]+$": "bold red",
    r"(?m)^warning [\w-]+$": "yellow",
    r"(?m)^clean(?=: )": "bold green",
    r"(?m)^not clean(?=: )": "bold red",
}


def plan_text(plan: Plan) -> Text:
    """A plan: roles and sizes, which tensor-parallel sizes fit, notes."""
    return _colored(as_options(plan.text(console().width if has_width() else None)), _PLAN)


def report_text(report: Report) -> Text:
    """A verification: counts, errors of roles, findings, the verdict."""
    return _colored(as_options(str(report)), _REPORT)


def result_text(result: Result | Merged | Converted) -> Text:
    """The closing lines of a job."""
    return _colored(str(result), {r"(?s).*": "bold"})


def plain_text(text: object) -> Text:
    """The text of `str`, with its lines cut between words."""
    return _colored(str(text), {})


def inspection_table(inspection: Inspection) -> Text:
    """A checkpoint at a glance. Names that have no room beside their figures stand above them."""
    rows = inspection.rows()
    width = max(len(row[0]) for row in rows)
    figures = aligned([row[1:] for row in rows], left=2)
    has_room = width + 2 + len(figures[0]) <= console().width
    lines = [
        f"{name.ljust(width)}  {line}" if has_room else f"{name}\n    {line}"
        for (name, *_), line in zip(rows, figures, strict=True)
    ]
    styles = {r"\A.*|(?<=\n)tensors(\s.*|\n    dtype.*)": "bold"}
    return _colored("\n".join([inspection.headline, *lines, inspection.total]), styles)


def generation_table(generation: Generation) -> RenderableType:
    """The texts of both models: side by side, if there is a width to lay them out in."""
    if not has_width():
        return Text(str(generation))
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="", expand=True)
    for heading, model, _ in generation.columns():
        title = Text.assemble((heading, "bold"), (f"\n{model}", "dim"))
        table.add_column(title, ratio=1, overflow="fold", vertical="top")
    table.add_row(*(Text(text) for _, _, text in generation.columns()))
    remark = Text(as_options(generation.remark), style="dim")
    return Group(Text(generation.visible_prompt), Text(), table, Text(), remark)


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """The figures of all checkpoints, each in a column."""
    return _figures_table(evaluation, bold="KL")


def sensitivity_table(sensitivity: Sensitivity) -> RenderableType:
    """What each component of a model costs, with a column for each format."""
    return _figures_table(sensitivity)


def _figures_table(result: Evaluation | Sensitivity, bold: str | None = None) -> RenderableType:
    """A result's table between its headline and its remarks; the row called `bold` stands out."""
    if not has_width():
        return Text(str(result))
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    heads, *rows = result.rows()
    for number, head in enumerate(heads):
        justify: JustifyMethod = "right" if number else "left"
        table.add_column(Text(head), overflow="fold", justify=justify)
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == bold else None)
    remarks = Text(as_options("\n".join(result.remarks)), style="dim")
    return Group(Text(result.headline), Text(), table, Text(), remarks)


def recipes_entry(recipe: Recipe) -> Text:
    """A recipe's name and description."""
    return _colored(f"{recipe.name}\n    {recipe.description}", {r"\A.*": "bold"})


def _colored(text: str, styles: Mapping[str, str]) -> Text:
    colored = Text(fitted(text, console().width) if has_width() else text)
    for pattern, style in styles.items():
        colored.highlight_regex(pattern, style)
    return colored
