# SPDX-License-Identifier: Apache-2.0
"""The help pages: options in groups, examples that exist, completion for shells, the guide."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fourfold.cli.app import app
from fourfold.cli.help import _EXAMPLES
from fourfold.recipes import builtin_names
from fourfold.reporting.guide import COSTS, GUIDE, cost_of, guide_lines
from test_cli import options_of, run  # noqa: F401  # a fixture

DOCS = Path(__file__).parents[1]


def test_options_are_in_groups(run) -> None:  # noqa: F811
    code, text, _ = run("quantize", "--help")
    assert code == 0
    sections = re.split(r"\n(\w+):\n", text)
    groups = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(groups) == [
        "Arguments", "Options", "Calibration", "Machine", "Output", "Examples",
    ]  # fmt: skip
    assert "--calib-size" in groups["Calibration"]
    assert "--device-memory" in groups["Machine"]
    assert "--overwrite" in groups["Output"]
    assert "--recipe" in groups["Options"]


def test_every_command_has_examples_that_exist() -> None:
    from typer.main import get_command

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert _EXAMPLES.keys() == {*commands, "fourfold"}
    for examples in _EXAMPLES.values():
        for example in examples:
            words = shlex.split(example.partition(" > ")[0])
            words = words[words.index("fourfold") + 1 :]
            assert words[0] in commands, example
            assert {word for word in words if word.startswith("-")} <= options_of(words[0]), example
            assert len(example) <= 96


def test_examples_are_shown_as_they_are(run) -> None:  # noqa: F811
    for name in ("quantize", "generate"):
        text = run(name, "--help")[1]
        assert all(f"\n  {example}\n" in text for example in _EXAMPLES[name])


def test_completion_for_shells() -> None:
    environment = {
        "_FOURFOLD_COMPLETE": "complete_bash",
        "COMP_WORDS": "fourfold plan model --recipe w4a16_nvfp4_mlp",
        "COMP_CWORD": "4",
    }
    code = "import sys; sys.argv = ['fourfold']\nfrom fourfold.cli.app import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split() == ["w4a16_nvfp4_mlp_only_mse"], done.stderr


def advices() -> list[tuple[str, str, str, str]]:
    return [
        ("; ".join(hardware), advice.aim, f"`{advice.recipe}`", cost_of(advice.recipe))
        for hardware, advices in GUIDE.items()
        for advice in advices
    ]


def test_the_guide_names_recipes_that_exist(run) -> None:  # noqa: F811
    code, text, _ = run("recipes", "--guide")
    assert code == 0
    assert text.splitlines() == list(guide_lines())
    assert max(map(len, text.splitlines())) <= 110
    names = set(builtin_names())
    assert {advice[2].strip("`") for advice in advices()} <= names
    assert COSTS.keys() <= names
    entries = json.loads(run("recipes", "--guide", "--json")[1])["advice"]
    assert len(entries) == len(advices())
    assert entries[0]["cost"]["kl"] == COSTS[entries[0]["recipe"]].kl
    code, _, err = run("recipes", "nvfp4_experts_only", "--guide")
    assert code == 2
    assert "nvfp4_experts_only" in err


def test_the_page_says_what_the_guide_says() -> None:
    lines = (DOCS / "docs/which-recipe.md").read_text().splitlines()
    rows = [tuple(map(str.strip, line.strip("|").split("|"))) for line in lines if "`" in line]
    assert [row for row in rows if len(row) == 4] == advices()


@pytest.mark.parametrize(
    ("recipe", "row"),
    [
        ("w4a16_nvfp4_experts_only", 0),
        ("w4a16_nvfp4_experts_only_mse", 1),
        ("w4a16_nvfp4_experts_only_best", 2),
        ("nvfp4_experts_only", 3),
        ("nvfp4_experts_only_mse", 4),
        ("nvfp4_experts_only_best", 5),
        ("w4a16_nvfp4_default", 6),
        ("w4a16_nvfp4_default_mse", 7),
        ("w4a16_nvfp4_default_best", 8),
        ("nvfp4_default_best", 11),
        ("nvfp4_default_budget", 12),
        ("nvfp4_experts_only_mse-constant_inputs", 13),
        ("nvfp4_experts_only_mse-fp8_cast_kv", 14),
        ("nvfp4_default_mse-fp8_kv", 15),
    ],
)
def test_costs_are_those_of_the_readme(recipe: str, row: int) -> None:
    readme = (DOCS / "README.md").read_text().partition("KL, nats a byte")[2]
    figures = re.findall(r"\| \**(\d\.\d+e-\d)\** \| \**(\d\d\.\d) %\** \|", readme)
    kl, agreement = figures[row]
    assert COSTS[recipe].kl == float(kl)
    assert COSTS[recipe].top1_agreement == pytest.approx(float(agreement) / 100)
