# SPDX-License-Identifier: Apache-2.0
"""What programs read: every `--json` document follows its model, errors are documents, too, and
results show themselves in few words."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fourfold
from fourfold.documents import DOCUMENTS, SCHEMA_VERSION
from test_cli import Written, in_process
from test_cli_output import IMPORTING

PAGE = Path(__file__).parents[1] / "docs/json.md"


@pytest.fixture(scope="module")
def quantized(
    written: Written, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, fourfold.Result]:
    model, out = written("qwen3_moe")[0], tmp_path_factory.mktemp("quantized") / "out"
    return model, out, fourfold.quantize(model, out)


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch, capsys):
    """Run a command with --json; its exit code, and the document that it prints."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        code, text, _ = in_process(monkeypatch, capsys, *arguments, "--json")
        values = json.loads(text)
        assert values["schema_version"] == SCHEMA_VERSION
        assert list(values)[:2] == ["schema_version", "kind"]
        model = DOCUMENTS[values["kind"]]
        assert model(**values).model_dump(mode="json", exclude_unset=True) == values
        return code, values

    return run


def test_results_follow_their_models(document, quantized, tmp_path: Path) -> None:
    model, out, _ = quantized
    for kind, *arguments in (
        ("plan", "plan", model),
        ("plan", "plan", model, "--time"),
        ("quantization", "quantize", model, tmp_path / "out"),
        ("verification", "verify", out, "--source", model),
        ("merge", "merge", out, tmp_path / "merged"),
        ("inspection", "inspect", out),
        ("recipes", "recipes"),
        ("recipes", "recipes", "nvfp4_experts_only"),
        ("guide", "recipes", "--guide"),
    ):
        code, values = document(*arguments)
        assert code == 0
        assert values["kind"] == kind


def test_errors_mean_errors(document, quantized) -> None:
    model, out, _ = quantized
    _, values = document("verify", out, "--source", model)
    assert values["clean"]
    assert values["errors"] == []
    assert values["findings"] == values["warnings"]
    assert len(values["relative_errors"]) == values["counts"]["compared_linears"] > 0


@pytest.mark.parametrize(
    ("code", "kind", "arguments"),
    [
        (1, "SourceError", ["plan", "NOWHERE"]),
        (2, "UnreadableError", ["verify", "NOWHERE"]),
        (2, "RecipeError", ["plan", "NOWHERE", "--recipe", "w4"]),
        (2, "UsageError", ["plan", "NOWHERE", "--colour"]),
        (2, "UsageError", ["plan"]),
        (2, "UsageError", ["quantize", "NOWHERE", "out", "--threads", "none"]),
    ],
)
def test_an_error_is_a_document(
    code: int, kind: str, arguments: list[str], document, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    found, values = document(*[nowhere if x == "NOWHERE" else x for x in arguments])
    assert found == values["exit_code"] == code
    assert values["type"] == kind
    assert values["message"]


def test_a_signal_is_a_document(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTING, "plan", str(tmp_path), "--json", "torch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGINT
    values = DOCUMENTS["error"](**json.loads(done.stdout)).model_dump()
    assert values["exit_code"] == done.returncode
    assert done.stderr == f"error: {values['message']}\n"


def test_the_schema_of_each_kind(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for kind in DOCUMENTS:
        code, text, _ = in_process(monkeypatch, capsys, "schema", kind)
        assert code == 0
        assert json.loads(text)["properties"]["kind"]["const"] == kind
    code, text, _ = in_process(monkeypatch, capsys, "schema")
    assert len(json.loads(text)["$defs"]) > len(DOCUMENTS)
    code, _, err = in_process(monkeypatch, capsys, "schema", "plans")
    assert code == 2
    assert "no such kind of document. Give one of plan, " in err


def test_the_page_names_every_key() -> None:
    page = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    for kind, model in DOCUMENTS.items():
        assert {kind, *model.model_fields} <= page, kind


def test_results_are_short(quantized) -> None:
    model, _, result = quantized
    for value in (result, result.plan, result.report, fourfold.plan(model)):
        assert len(repr(value)) < 250
        assert repr(value).startswith(f"<{type(value).__name__}: ")
        assert "\n" not in repr(value)
        assert value._repr_html_().startswith("<pre>")
    assert "<pre>" not in result._repr_html_()[5:]


def test_python_is_told_of_arguments(quantized, tmp_path: Path) -> None:
    """And not of options, which the command line puts in their place."""
    from fourfold.reporting import read_summary, table_of

    with pytest.raises(fourfold.UsageError, match=r"^`out` is empty"):
        fourfold.quantize(quantized[0], "")
    with pytest.raises(fourfold.UsageError, match="and then `out`"):
        fourfold.merge([], tmp_path)
    assert "`every=True` gives each its own" in str(table_of(read_summary(quantized[1])))
    sources = Path(fourfold.__file__).parent
    spoken = re.compile(r"[\"'(\s]--(?!ckpt)[a-z][a-z-]+")
    for file in sources.rglob("*.py"):
        if file.parent.name in ("cli", "reporting") or file.name == "__main__.py":
            continue
        text = re.sub(r'"""[\s\S]*?"""|#.*', "", file.read_text())
        assert spoken.findall(text) == [], file


def test_the_command_line_is_told_of_options(
    quantized, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    _, text, _ = in_process(monkeypatch, capsys, "summary", quantized[1])
    assert text.splitlines()[-1].endswith("; --all gives each its own")
    code, _, err = in_process(monkeypatch, capsys, "quantize", quantized[0], "")
    assert (code, err) == (2, "error: OUT is empty: give the folder to write.\n")
