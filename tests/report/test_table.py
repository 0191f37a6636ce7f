# SPDX-License-Identifier: Apache-2.0
"""`fourfold summary`: the table of every linear weight, its filters, and what users do wrong."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fourfold.errors import UsageError
from fourfold.reporting import LinearTable, QuantSummary
from fourfold.reporting import table_of as table_of_summary

from .documents import document, weights_only, with_budget


@pytest.fixture(scope="module")
def calibrated() -> dict[str, Any]:
    return document(tokens_of={(1, 9): 0, (1, 3): 107_000})


@pytest.fixture
def out(calibrated, tmp_path: Path) -> Path:
    (tmp_path / "quant_summary.json").write_text(json.dumps(calibrated))
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        from fourfold.cli.app import main

        monkeypatch.setattr(sys, "argv", ["fourfold", "summary", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as caught:
            code = int(caught.code or 0)
        return code, *capsys.readouterr()

    return call


def table_of(summary: dict[str, Any], **options: Any) -> LinearTable:
    return table_of_summary(QuantSummary.model_validate_json(json.dumps(summary)), **options)


def test_what_a_budget_was_spent_on(calibrated) -> None:
    assert str(table_of(with_budget(calibrated))).splitlines()[2] == (
        "  budget: 4.50 → 4.62 bits a weight · KL 0.05 → 0.0321, other text 0.06 → 0.0432"
    )
    assert "budget" not in str(table_of(calibrated))


def printed(table: object, width: int) -> list[str]:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table, crop=False)
    return buffer.getvalue().splitlines()


def entry_of(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in summary["linears"] if each["name"] == name)


def test_experts_of_a_layer_share_a_line(calibrated) -> None:
    lines = printed(table_of(calibrated), 120)
    assert lines[0] == "Folded-30B-A3B: recipe nvfp4_default_mse-fp8_kv"
    assert "208 / 208 linear weights quantized · calibrated on 65,536 tokens" in lines[1]
    assert len(lines) == 3 + 4 * (3 + 4) + 1
    assert lines[-1] == "208 linear weights in 28 lines; `every=True` gives each its own"
    line = next(line for line in lines if ".1.mlp.experts.0-15.down_proj" in line)
    assert " 2048×768 " in line
    assert " 0…107,000 " in line
    same = [
        each
        for each in calibrated["linears"]
        if each["layer"] == 1 and each["name"].endswith("down_proj")
    ]
    errors = [each["relative_error"] for each in same]
    assert line.endswith(f"{min(errors):.3g}…{max(errors):.3g}")


def test_a_line_for_each(calibrated) -> None:
    table = table_of(calibrated, every=True)
    lines = {line.split()[0]: line.split()[1:] for line in str(table).splitlines()[3:-1]}
    assert len(lines) == 208
    name = "model.layers.1.mlp.experts.3.up_proj"
    entry = entry_of(calibrated, name)
    mantissa, exponent = f"{entry['global_scale']:.3e}".split("e")
    assert lines[name] == [
        "768×2048",
        "nvfp4",
        f"{mantissa.rstrip('0')}e{int(exponent)}",
        f"{entry['input_amax']:.4g}",
        "107,000",
        f"{entry['relative_error']:.4g}",
    ]
    names = list(lines)
    assert names.index("model.layers.0.mlp.experts.2.up_proj") < names.index(
        "model.layers.0.mlp.experts.10.up_proj"
    )


def test_experts_that_are_missing_show_as_gaps(calibrated) -> None:
    kept = copy.deepcopy(calibrated)
    gone = ("experts.4.up_proj", "experts.9.up_proj")
    kept["linears"] = [each for each in kept["linears"] if not each["name"].endswith(gone)]
    assert "model.layers.2.mlp.experts.0-3,5-8,10-15.up_proj" in str(table_of(kept))


def test_shapes_are_not_mixed_in_a_line(calibrated) -> None:
    odd = copy.deepcopy(calibrated)
    entry_of(odd, "model.layers.0.mlp.experts.7.up_proj")["shape"] = [1024, 2048]
    text = str(table_of(odd))
    assert "model.layers.0.mlp.experts.0-6,8-15.up_proj" in text
    assert "model.layers.0.mlp.experts.7.up_proj" in text


def test_filters(calibrated) -> None:
    assert len(table_of(calibrated, role="attention").lines) == 16
    assert len(table_of(calibrated, role="attention", layer=2).lines) == 4
    assert len(table_of(calibrated, layer=2).lines) == 7
    worst = table_of(calibrated, role="experts", worst=5)
    errors = [line[0].relative_error or 0 for line in worst.lines]
    experts = [each for each in calibrated["linears"] if each["role"] == "experts"]
    assert errors == sorted((each["relative_error"] for each in experts), reverse=True)[:5]
    assert str(worst).endswith("5 of 192 linear weights, the largest error first")


def test_what_is_not_there_is_wrong_usage(calibrated) -> None:
    with pytest.raises(UsageError, match=r"role 'expert': .* experts \(192\), attention \(16\)"):
        table_of(calibrated, role="expert")
    with pytest.raises(UsageError, match=r"layer 7: .* Layers: 0–3"):
        table_of(calibrated, layer=7)
    bare = {**calibrated, "linears": [each | {"layer": None} for each in calibrated["linears"]]}
    with pytest.raises(UsageError, match=r"layer 0: .* Layers: none"):
        table_of(bare, layer=0)


def test_columns_that_nothing_fills_are_left_out(calibrated) -> None:
    heads, _ = table_of(weights_only(calibrated)).rows()
    assert heads == ["linear weight", "shape", "format", "global scale", "rel. error"]


@pytest.mark.parametrize("width", [20, 80, 105, 120, 200])
def test_no_width_loses_a_figure_or_a_name(calibrated, width: int) -> None:
    table = table_of(calibrated)
    text = "".join(printed(table, width)).replace(" ", "")
    for row in table.rows()[1]:
        assert all(cell in text for cell in row[1:])
        assert row[0] in text  # in one piece


def test_a_name_without_room_stands_above_its_figures(calibrated) -> None:
    long = json.loads(json.dumps(calibrated).replace("layers.2.mlp", "layers.2.a_long_word.mlp"))
    lines = printed(table_of(long), 120)
    above = lines.index("model.layers.2.a_long_word.mlp.experts.0-15.up_proj")
    assert lines[above + 1].startswith(" " * 40)
    assert lines[above + 1].strip().startswith("768×2048")
    assert all(len(line) <= 120 for line in lines)


def test_no_linear_weight(calibrated) -> None:
    assert "0 linear weights in 0 lines" in str(table_of({**calibrated, "linears": []}))


def test_names_cannot_command_the_terminal(calibrated) -> None:
    hostile = json.loads(
        json.dumps(calibrated).replace("gate_proj", r"\u001b[2Jgate\n\u202e[bold]")
    )
    text = str(table_of(hostile)) + "".join(printed(table_of(hostile, every=True), 120))
    assert not {"\x1b", "\u202e"} & set(text)
    assert r"\x1b[2Jgate\n\u202e[bold]" in text


@pytest.mark.slow
def test_a_hundred_thousand_weights() -> None:
    many = document(88, 384)
    assert len(many["linears"]) > 100_000
    assert len(printed(table_of(many, every=True), 120)) == 3 + len(many["linears"]) + 1


def test_command(run, out: Path) -> None:
    code, text, _ = run(out)
    assert code == 0
    assert "208 linear weights in 28 lines" in text
    code, text, _ = run(out, "--role", "experts", "--layer", 1, "--all")
    assert code == 0
    assert text.splitlines()[-1] == "48 linear weights in 48 lines"
    code, text, _ = run(out, "--worst", 3)
    assert len(text.splitlines()) == 3 + 3 + 1


def test_json_is_the_document_with_the_chosen_weights(run, out: Path, calibrated) -> None:
    code, text, _ = run(out, "--json")
    assert code == 0
    whole = json.loads(text)
    assert {**whole, "linears": None} == {**calibrated, "linears": None}
    assert {each["name"]: each for each in whole["linears"]} == {
        each["name"]: each for each in calibrated["linears"]
    }
    chosen = json.loads(run(out, "--json", "--worst", 4, "--role", "attention")[1])["linears"]
    errors = [each["relative_error"] for each in chosen]
    assert errors == sorted(errors, reverse=True)
    assert {each["role"] for each in chosen} == {"attention"}
    assert len(chosen) == 4


def test_a_summary_that_cannot_be_read(run, tmp_path: Path) -> None:
    (tmp_path / "quant_summary.json").write_text('{"linears": 3}')
    code, text, error = run(tmp_path)
    assert (code, text) == (1, "")
    assert "quant_summary.json: " in error
    assert error.count("\n") == 1


def test_wrong_usage(run, out: Path) -> None:
    for arguments in (["--layer", "x"], ["--worst", "0"], ["--layer", "-1"], ["--rolle", "x"]):
        assert run(out, *arguments)[0] == 2
    code, _, error = run(out, "--role", "router")
    assert code == 2
    assert "experts (192)" in error


def test_options() -> None:
    from typer.main import get_command

    from fourfold.cli.app import app

    found = get_command(app).commands["summary"]  # type: ignore[attr-defined]
    names = {name for parameter in found.params for name in parameter.opts}
    assert names == {"out", "--role", "--layer", "--all", "--worst", "--json"}
