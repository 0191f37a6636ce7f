"""The Python face: names, typed results, callbacks, and the ledger that must close."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from families import Truth
from fourfold import pipeline
from fourfold.fold import Folding, Progress

Written = Callable[[str], tuple[Path, Truth]]
EXPERTS = "w4a16_nvfp4_experts_only_mse"


def test_public_names() -> None:
    assert set(fourfold.__all__) == {
        "CalibrationError", "Finding", "FourfoldError", "ModelError", "NonFiniteError",
        "ObservationError", "OutputError", "Plan",
        "PlanError", "Recipe", "RecipeError", "Report", "Result", "SourceError", "Statistics",
        "UnreadableError",
        "UsageError",
        "__version__", "load", "plan", "quantize", "verify",
    }  # fmt: skip
    for name in fourfold.__all__:
        assert getattr(fourfold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fourfold.nonsense


def test_importing_is_quick() -> None:
    code = "import sys, fourfold; assert not {'torch', 'numba', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_are_typed_and_print(written: Written, tmp_path: Path) -> None:
    folder, _ = written("mixtral")
    recipe = fourfold.Recipe.load(EXPERTS)
    plan = fourfold.plan(folder, recipe=recipe)
    result = fourfold.quantize(str(folder), str(tmp_path / "out"), recipe=recipe)
    report = fourfold.verify(tmp_path / "out", source=folder)
    assert isinstance(plan, fourfold.Plan)
    assert isinstance(result, fourfold.Result)
    assert isinstance(report, fourfold.Report)
    assert result.clean
    assert str(result).startswith("36 / 36 linear weights quantized · 0 zero scales of 6,912 · ")
    assert str(result).splitlines()[0].endswith(" · verified")
    assert str(result).endswith("of memory at the peak")
    assert "bits/weight" in str(plan)
    assert "clean: no errors" in str(report)
    assert json.loads(json.dumps(result.to_dict()))["linear_weights_quantized"] == 36
    assert [linear.name for linear in result.linears] == sorted(x.name for x in plan.linears)
    errors = {error.name: error.relative_error for error in report.errors}
    for linear in result.linears:
        assert linear.relative_error == pytest.approx(errors[linear.name], rel=1e-4)


def test_callbacks(written: Written, tmp_path: Path) -> None:
    plans: list[fourfold.Plan] = []
    events: list[Progress] = []
    fourfold.quantize(
        written("mixtral")[0],
        tmp_path / "out",
        EXPERTS,
        threads=2,
        on_plan=plans.append,
        progress=events.append,
    )
    (plan,) = plans
    assert [event.shards_done for event in events] == list(range(1, len(plan.shards) + 1))
    assert {event.unit for event in events} == {"shell", "layer 0", "layer 1", "layer 2"}
    assert events[-1].bytes_done == events[-1].bytes_total == plan.nbytes


@pytest.mark.parametrize("field", ["compared_linears", "copied_tensors"])
def test_a_ledger_that_does_not_close(
    field: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = pipeline.verify

    def forgetful(*arguments: object, **options: object) -> fourfold.Report:
        report = verify(*arguments, **options)  # type: ignore[arg-type]
        short = replace(report.counts, **{field: getattr(report.counts, field) - 1})
        return replace(report, counts=short)

    monkeypatch.setattr(pipeline, "verify", forgetful)
    with pytest.raises(fourfold.FourfoldError, match=r"36 linear weights and .* planned"):
        fourfold.quantize(written("mixtral")[0], tmp_path / "out", EXPERTS)


def test_a_weight_that_is_not_written(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = Folding.finished
    monkeypatch.setattr(Folding, "finished", lambda work: finished(work)[1:])
    with pytest.raises(fourfold.FourfoldError, match="36 linear weights planned, 35 written"):
        fourfold.quantize(written("mixtral")[0], tmp_path / "out", EXPERTS)
    assert not (tmp_path / "out").exists()


def edited(folder: Path, model: Path, change: Callable[[str, torch.Tensor], object]) -> Path:
    model.mkdir()
    (model / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        change(name, value)
    save_file(tensors, model / "model.safetensors")
    return model


def test_all_zero_and_tiny_experts(written: Written, tmp_path: Path) -> None:
    """Positive scales, codes 0 where all is 0, and a clean report."""

    def change(name: str, value: torch.Tensor) -> None:
        if ".experts.2." in name or name.endswith("experts.1.w1.weight"):
            value.zero_()
        if name.endswith("experts.0.w2.weight"):
            value.mul_(2.0**-100)

    model = edited(written("mixtral")[0], tmp_path / "model", change)
    for recipe in ("w4a16_nvfp4_experts_only", EXPERTS):
        result = fourfold.quantize(model, tmp_path / recipe, recipe)
        assert result.clean, str(result.report)
        made: dict[str, torch.Tensor] = {}
        for file in (tmp_path / recipe).glob("*.safetensors"):
            made |= load_file(file)
        for name, value in made.items():
            if name.endswith("weight_scale_2"):
                assert 0 < value.item() < float("inf")
            if ".experts.2." in name and name.endswith(".weight"):
                assert not value.any()


def test_an_outlier_that_ruins_its_neighbour_is_reported(written: Written, tmp_path: Path) -> None:
    """Gate and up share a global scale: a value of 3e38 in one leaves nothing of the other."""

    def change(name: str, value: torch.Tensor) -> None:
        if name.endswith("layers.1.block_sparse_moe.experts.0.w3.weight"):
            value[0, 0] = 3e38

    model = edited(written("mixtral")[0], tmp_path / "model", change)
    result = fourfold.quantize(model, tmp_path / "out", EXPERTS)
    assert not result.clean
    assert result.report is not None
    errors = {finding.tensor for finding in result.report.findings if finding.severity == "error"}
    assert errors == {"model.layers.1.block_sparse_moe.experts.0.w1"}
    assert "NOT CLEAN" in str(result)
