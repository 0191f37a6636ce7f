# SPDX-License-Identifier: Apache-2.0
"""The table of what `run.py` found, as Markdown: a row for each family, a column for each recipe.

python scripts/engines/vllm/table.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALIKE = 1e-3
"""Log-probabilities that differ less differ by the order in which an engine adds."""


def main() -> None:
    results = [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob("*/*.json"))]
    by_family: dict[str, dict[str, Any]] = defaultdict(dict)
    for result in results:
        if "family" in result:
            by_family[result["family"]][result["recipe"]] = result
    recipes = sorted({recipe for row in by_family.values() for recipe in row}, reverse=True)
    heads = ["family", *(f"`{recipe}`" for recipe in recipes), "remark"]
    print("|".join(["", *(f" {head} " for head in heads), ""]))
    print("|---" * len(heads) + "|")
    for family, row in sorted(by_family.items()):
        cells = [family, *(cell(row.get(recipe)) for recipe in recipes), remark(row)]
        print("|".join(["", *(f" {text} " for text in cells), ""]))


def cell(result: Mapping[str, Any] | None) -> str:
    """Say whether a checkpoint was loaded exactly, and how much its predictions differ."""
    if result is None or result["exact"] is None:
        return "not loaded" if result else ""
    if not result["exact"]:
        return "**not exact**"
    if (difference := result["difference"]) is None:
        return "exact"
    return f"exact, {difference:.0e}" if difference < ALIKE else f"exact, **{difference:.0e}**"


def remark(row: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the causes of failures, each once."""
    causes = dict.fromkeys(result["cause"] for result in row.values() if result["cause"])
    kept = dict.fromkeys(name for result in row.values() for name in result["kept"])
    notes = [cause.replace("|", "\\|") for cause in causes]
    return "; ".join([*notes, *([f"not in the checkpoint: {len(kept)} vectors"] if kept else [])])


if __name__ == "__main__":
    main()
