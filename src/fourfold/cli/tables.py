"""Results in color: what `str` of a result says, laid out for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fourfold.cli.options import as_options

if TYPE_CHECKING:
    from fourfold.evaluation.generation import Generation
    from fourfold.evaluation.inspection import Inspection
    from fourfold.planning import Plan
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
    return _colored(str(plan), _PLAN)


def report_text(report: Report) -> Text:
    """A verification: counts, errors of roles, findings, the verdict."""
    return _colored(str(report), _REPORT)


def result_text(result: Result | Merged | Converted) -> Text:
    """The closing lines of a job."""
    return Text(str(result), style="bold")


def inspection_table(inspection: Inspection) -> RenderableType:
    """A checkpoint at a glance; long names are folded."""
    header, *rows = inspection.rows()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header[:3]:
        table.add_column(name, overflow="fold")
    for name in header[3:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return Group(Text(inspection.headline, style="bold"), table, Text(inspection.total))


def generation_table(generation: Generation) -> RenderableType:
    """The texts of both models side by side."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="", expand=True)
    for heading, model, _ in generation.columns():
        title = Text.assemble((heading, "bold"), (f"\n{model}", "dim"))
        table.add_column(title, ratio=1, overflow="fold", vertical="top")
    table.add_row(*(Text(text) for _, _, text in generation.columns()))
    remark = Text(as_options(generation.remark), style="dim")
    return Group(Text(generation.visible_prompt), Text(), table, Text(), remark)


def _colored(text: str, styles: Mapping[str, str]) -> Text:
    colored = Text(text)
    for pattern, style in styles.items():
        colored.highlight_regex(pattern, style)
    return colored
