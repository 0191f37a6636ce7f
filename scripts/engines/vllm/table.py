# SPDX-License-Identifier: Apache-2.0
"""The table of what `run.py` found, as Markdown: a row for each family, a column for each recipe.

python scripts/engines/vllm/table.py FOLDER
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALIKE = 1e-3
"""Log-probabilities that differ less differ by the order in which an engine adds."""


RECIPES = ("w4a16_nvfp4_experts_only", "w4a16_nvfp4_default", "nvfp4_experts_only")


def main() -> None:
    found = [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob("*/*.json"))]
    results = [result for result in found if "family" in result]
    by_family: dict[str, dict[str, Any]] = defaultdict(dict)
    for result in results:
        by_family[result["family"]][result["recipe"]] = result
    rows = [
        [family, *(cell(row.get(recipe)) for recipe in RECIPES), remark(row)]
        for family, row in sorted(by_family.items())
    ]
    print_table(["Family", *(f"`{recipe}`" for recipe in RECIPES), "Remark"], rows)
    others = [result for result in results if result["recipe"] not in RECIPES]
    print()
    print_table(
        ["Family", "Mixed recipe", "Result"],
        [[result["family"], f"`{result['recipe']}`", cell(result)] for result in others],
    )


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    for cells in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(cells)} |")


def cell(result: Mapping[str, Any] | None) -> str:
    """Say whether a checkpoint was loaded exactly, and how much its predictions differ."""
    if result is None or result["exact"] is None:
        return "not loaded" if result else ""
    if not result["exact"]:
        return "**not exact**"
    if (difference := result["difference"]) is None:
        return "exact"
    if result["dtype"] == "bfloat16":
        return f"exact, BF16: median {result['median']:.0e}"
    return f"exact, {difference:.0e}" if difference < ALIKE else f"exact, **{difference:.0e}**"


def remark(row: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the causes of failures, each once."""
    usual = [row[recipe] for recipe in RECIPES if recipe in row]
    causes = dict.fromkeys(result["cause"] for result in usual if result["cause"])
    kept = dict.fromkeys(name for result in usual for name in result["kept"])
    notes = [textwrap.shorten(cause.replace("|", "\\|"), 120) for cause in causes]
    return "; ".join([*notes, *(f"not in the checkpoint: `{name}`" for name in kept)])


if __name__ == "__main__":
    main()
