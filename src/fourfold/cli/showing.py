# SPDX-License-Identifier: Apache-2.0
"""The commands that show something, and compute and write nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.cli.options import Json
from fourfold.cli.terminal import console, print_json, show
from fourfold.errors import UsageError

if TYPE_CHECKING:
    from fourfold.recipes import Recipe


def inspect(
    folder: Annotated[Path, typer.Argument(help="Any safetensors checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show the formats, sizes and scales of a checkpoint's tensors."""
    from fourfold.cli.tables import inspection_table
    from fourfold.evaluation.inspection import inspect as run

    show(run(folder), as_json, inspection_table)


def summary(
    out: Annotated[Path, typer.Argument(help="A folder that `fourfold quantize` wrote.")],
    role: Annotated[str | None, typer.Option(help="Only weights of this role.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Only weights of this layer.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Print a line for each weight of each expert.")
    ] = False,
    worst: Annotated[
        int | None,
        typer.Option(min=1, help="Only this many weights, the largest relative error first."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show scales, input amax, tokens and error of linear weights."""
    from fourfold.reporting import read_summary, select, table_of

    record = read_summary(out)
    if as_json:
        linears = tuple(select(record, role=role, layer=layer, worst=worst))
        print_json(record.model_copy(update={"linears": linears}).to_dict())
        return
    table = table_of(record, role=role, layer=layer, every=every, worst=worst)
    console().print(replace(table, hint="--all gives each its own"), crop=False)


def report(
    out: Annotated[Path, typer.Argument(help="A folder that `fourfold quantize` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page's file; by default report.html in OUT."),
    ] = None,
) -> None:
    """Draw the report page from the quant_summary.json in OUT."""
    from fourfold.reporting import write_report

    print(write_report(out, output))


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    guide: Annotated[
        bool,
        typer.Option(
            "--guide", help="Say which recipe suits which hardware and aim, at what cost."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the built-in recipes, print one, or help to choose."""
    from fourfold.cli.tables import recipes_entry
    from fourfold.recipes import Recipe, builtin_names

    if guide:
        _print_guide(name, as_json)
        return
    if name is None:
        all_recipes = [Recipe.load(builtin) for builtin in builtin_names()]
        if as_json:
            _print_recipes(all_recipes)
        else:
            for recipe in all_recipes:
                console().print(recipes_entry(recipe), soft_wrap=True)
        return
    chosen = Recipe.load(name)
    if as_json:
        _print_recipes([chosen])
    else:
        print(chosen.to_yaml(), end="")


def _print_recipes(recipes: Sequence[Recipe]) -> None:
    from fourfold.documents import document

    dumps = {recipe.name: recipe.model_dump(mode="json") for recipe in recipes}
    print_json(document("recipes", recipes=dumps))


def _print_guide(name: str | None, as_json: bool) -> None:
    from fourfold.cli.tables import plain_text
    from fourfold.reporting.guide import guide_entries, guide_lines

    if name is not None:
        raise UsageError(f"--guide: is about all recipes; leave out {name}.")
    if as_json:
        from fourfold.documents import document

        print_json(document("guide", advice=guide_entries()))
    else:
        console().print(plain_text("\n".join(guide_lines())), soft_wrap=True)


def schema(
    kind: Annotated[
        str | None, typer.Argument(help="That of one kind of document: plan, error, …")
    ] = None,
) -> None:
    """Print the JSON Schema of what --json prints."""
    from pydantic.json_schema import models_json_schema

    from fourfold.documents import DOCUMENTS

    if kind is None:
        print_json(models_json_schema([(x, "serialization") for x in DOCUMENTS.values()])[1])
        return
    if kind not in DOCUMENTS:
        raise UsageError(f"{kind}: no such kind of document. Give one of {', '.join(DOCUMENTS)}.")
    print_json(DOCUMENTS[kind].model_json_schema(mode="serialization"))
