# SPDX-License-Identifier: Apache-2.0
"""What NVFP4 cannot hold, and what calibration did not see: repaired with a warning where it cannot
matter, an error whose remedy works where it may, and always an error with `strict`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fourfold
from conftest import Written
from fourfold.config import CalibrationConfig, OutputConfig
from fourfold.events import Event, WarningIssued
from fourfold.execution.repairs import FLOOR_SCALES, SCALE_OF_ONE
from fourfold.reporting import read_summary, table_of
from nvfp4_folders import tensors_of
from test_api import edited, ids
from test_cli import in_process

EXPERTS, DEFAULT = "w4a16_nvfp4_experts_only", "w4a16_nvfp4_default"
STRICT = OutputConfig(strict=True)


def scaled(written: Written, folder: Path, family: str, ending: str, factor: float) -> Path:
    """A family's checkpoint, in which the tensors with this ending are so much larger."""

    def change(name: str, value: torch.Tensor) -> None:
        if name.endswith(ending):
            value.mul_(factor)

    return edited(written(family)[0], folder, change)


UP = "layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("family", "ending", "recipe"),
    [
        ("qwen3_moe", UP, EXPERTS),
        ("qwen3_moe", UP, f"{EXPERTS}_mse"),
        ("qwen3_moe", "layers.0.self_attn.k_proj.weight", DEFAULT),
        ("mixtral", "layers.1.block_sparse_moe.experts.0.w1.weight", EXPERTS),
        ("deepseek_v3", "layers.1.mlp.shared_experts.gate_proj.weight", DEFAULT),
    ],
)
def test_a_nearly_dead_projection_is_repaired(
    written: Written, tmp_path: Path, family: str, ending: str, recipe: str
) -> None:
    model, out = scaled(written, tmp_path / "model", family, ending, 1e-7), tmp_path / "out"
    events: list[Event] = []
    with pytest.warns(fourfold.FourfoldWarning, match="1 linear weight too small beside"):
        result = fourfold.quantize(model, out, recipe, on_event=events.append)
    assert result.clean, result.report
    (name,) = result.repairs
    assert f"{name}.weight".endswith(ending)
    assert result.repairs[name] == FLOOR_SCALES
    assert " · 1 repaired · " in str(result)
    assert [name in x.text for x in events if isinstance(x, WarningIssued)] == [True]
    summary = read_summary(out)
    assert [(entry.name, entry.repair) for entry in summary.repairs] == [(name, FLOOR_SCALES)]
    assert "1 repaired" in str(table_of(summary))
    assert f"{name}: {FLOOR_SCALES}" in (out / "report.html").read_text()
    block_scales = tensors_of(out)[f"{name}.weight_scale"].view(torch.uint8)
    assert int(block_scales.min()) > 0


def test_a_weight_beside_one_that_fills_the_range(written: Written, tmp_path: Path) -> None:
    """Its energy, in units of the scale, underflows: it is lost whole, and both sides say so."""

    def change(name: str, value: torch.Tensor) -> None:
        if name.endswith("layers.1.mlp.experts.2.gate_proj.weight"):
            value[3] = 3e38

    model = edited(written("qwen3_moe")[0], tmp_path / "model", change)
    with pytest.warns(fourfold.FourfoldWarning, match="1 linear weight too small beside"):
        result = fourfold.quantize(model, tmp_path / "out", f"{EXPERTS}_mse")
    assert result.clean, result.report
    (name,) = result.repairs
    error = next(linear.relative_error for linear in result.linears if linear.name == name)
    assert error == pytest.approx(1, abs=1e-3)


def test_only_the_dead_projection_changes(written: Written, tmp_path: Path) -> None:
    fourfold.quantize(written("qwen3_moe")[0], tmp_path / "whole", EXPERTS)
    model = scaled(written, tmp_path / "model", "qwen3_moe", UP, 1e-7)
    with pytest.warns(fourfold.FourfoldWarning):
        fourfold.quantize(model, tmp_path / "out", EXPERTS)
    whole, repaired = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    differ = {name for name in whole if whole[name].tolist() != repaired[name].tolist()}
    stem = "model.layers.1.mlp.experts.2"
    assert {f"{stem}.up_proj.weight", f"{stem}.up_proj.weight_scale"} <= differ
    # The gate changes only if the up had the larger amax of the two.
    assert all(name.startswith((f"{stem}.up_proj", f"{stem}.gate_proj")) for name in differ)


def keep_of(error: BaseException) -> str:
    """The keep patterns that an error advises, as YAML."""
    advised = re.search(r"keep: (\[.*\]) in the recipe\.$", str(error))
    assert advised, error
    return advised[1]


def recipe_with(folder: Path, keep: str) -> Path:
    file = folder / "keep.yaml"
    file.write_text(
        f"weights: {{format: nvfp4, scale: mse}}\nquantize: [experts, attention]\nkeep: {keep}\n"
    )
    return file


@pytest.mark.parametrize(
    ("family", "ending"),
    [("qwen3_moe", UP), ("qwen3_moe", "layers.0.self_attn.k_proj.weight")],
)
def test_strict_refuses_with_a_remedy_that_works(
    written: Written, tmp_path: Path, family: str, ending: str
) -> None:
    model, out = scaled(written, tmp_path / "model", family, ending, 1e-7), tmp_path / "out"
    with pytest.raises(fourfold.WeightLostError, match=re.escape(ending[:-7])) as caught:
        fourfold.quantize(model, out, DEFAULT, output=STRICT)
    assert not out.exists()
    recipe = recipe_with(tmp_path, keep_of(caught.value))
    result = fourfold.quantize(model, out, recipe, output=STRICT)
    assert result.clean
    assert not result.repairs


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_5_moe"])
def test_beside_an_outlier_a_weight_matters(written: Written, tmp_path: Path, family: str) -> None:
    """A single huge element does not make an ordinary weight small: it looks like damage."""
    folder, truth = written(family)
    key = next(key for key in truth.raw if "experts" in key and "bias" not in key)

    def spoil(name: str, value: torch.Tensor) -> None:
        if name == key:
            value[(0,) * value.ndim] = 3e38

    model, out = edited(folder, tmp_path / "model", spoil), tmp_path / "out"
    with pytest.raises(fourfold.WeightLostError, match="Is the checkpoint damaged") as caught:
        fourfold.quantize(model, out, EXPERTS)
    result = fourfold.quantize(model, out, recipe_with(tmp_path, keep_of(caught.value)))
    assert result.clean


def test_a_weight_that_is_nothing_by_itself(written: Written, tmp_path: Path) -> None:
    """Subnormal numbers alone in their group are as good as 0, whatever their group is."""
    ending = "layers.1.block_sparse_moe.experts.0.w2.weight"
    model = scaled(written, tmp_path / "model", "mixtral", ending, 2.0**-127)
    values = load_file(model / "model.safetensors")[f"model.{ending}"]
    assert 0 < float(values.abs().max()) < 2.0**-117
    with pytest.warns(fourfold.FourfoldWarning, match=r"experts\.0\.w2"):
        assert fourfold.quantize(model, tmp_path / "out", EXPERTS).clean
    with pytest.raises(fourfold.WeightLostError):
        fourfold.quantize(model, tmp_path / "strict", EXPERTS, output=STRICT)


def test_inputs_that_were_always_zero(written: Written, tmp_path: Path) -> None:
    """The ups of all experts are 0, so their downs see nothing; a scale of 1 is a guess."""

    def silence(name: str, value: torch.Tensor) -> None:
        if "layers.1.mlp.experts." in name and "up_proj" in name:
            value.zero_()

    model = edited(written("qwen3_moe")[0], tmp_path / "model", silence)
    calib = CalibrationConfig(ids(tmp_path), calib_seq=24)
    with pytest.warns(fourfold.FourfoldWarning, match="inputs that were all 0 in calibration"):
        result = fourfold.quantize(model, tmp_path / "out", "nvfp4_experts_only", calibration=calib)
    assert result.clean
    assert set(result.repairs.values()) == {SCALE_OF_ONE}
    assert all(".layers.1." in name and "down" in name for name in result.repairs)
    with pytest.raises(fourfold.ObservationError, match="inputs were all 0"):
        fourfold.quantize(
            model, tmp_path / "s", "nvfp4_experts_only", calibration=calib, output=STRICT
        )


@pytest.fixture
def shy(written: Written, tmp_path: Path) -> Path:
    """A model whose router sends every token to experts 0 and 1 of 4."""

    def push_away(name: str, value: torch.Tensor) -> None:
        if name.endswith("e_score_correction_bias"):
            value[2:] = -1e4

    return edited(written("deepseek_v3")[0], tmp_path / "shy", push_away)


ADVICE = (
    r"[24] (of 8 )?experts saw no calibration token \(model\.layers\.1\.mlp\.experts: 2–3.*"
    r"`calib`, `calib_size`.*all_experts: true"
)


def test_unreached_experts_are_a_warning_with_advice(shy: Path, tmp_path: Path) -> None:
    calib, out = CalibrationConfig(ids(tmp_path), calib_seq=24), tmp_path / "out"
    with pytest.warns(fourfold.FourfoldWarning, match=ADVICE) as caught:
        result = fourfold.quantize(shy, out, "nvfp4_experts_only", calibration=calib)
    assert result.clean
    assert [warning.filename for warning in caught] == [__file__]
    assert re.search(ADVICE, result.warnings[0])
    with pytest.raises(fourfold.ObservationError, match=ADVICE):
        fourfold.quantize(
            shy, tmp_path / "strict", "nvfp4_experts_only", calibration=calib, output=STRICT
        )
    assert not (tmp_path / "strict").exists()
    saved = out / "calibration.safetensors"
    with pytest.raises(fourfold.ObservationError, match=ADVICE):
        fourfold.quantize(
            shy, tmp_path / "strict", "nvfp4_experts_only", calibration=saved, output=STRICT
        )


@pytest.mark.filterwarnings("error:.*experts saw no calibration token")
def test_the_advice_helps(shy: Path, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(
        "weights: {format: nvfp4, scale: max}\nactivations: {format: nvfp4, amax: max}\n"
        "quantize: [experts]\ncalibration: {all_experts: true}\n"
    )
    calib = CalibrationConfig(ids(tmp_path), calib_seq=24)
    result = fourfold.quantize(
        shy, tmp_path / "out", tmp_path / "all.yaml", calibration=calib, output=STRICT
    )
    assert result.clean


def test_the_command_says_so(
    shy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: object) -> tuple[int, str, str]:
        options = (
            "--recipe",
            "nvfp4_experts_only",
            "--calib",
            ids(tmp_path),
            "--calib-seq",
            24,
            *more,
        )
        return in_process(monkeypatch, capsys, "quantize", shy, tmp_path / "out", *options)

    code, _, err = run("--strict")
    assert code == 1
    assert "2 experts saw no calibration token (model.layers.1.mlp.experts: 2–3)" in err
    assert "--strict" in err
    code, _, err = run()
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith("warning: 4 of 8 experts saw no calibration token")
    assert "--calib, --calib-size" in line


def test_a_strict_run_does_not_resume_another(written: Written, tmp_path: Path) -> None:
    """The shards that are finished may hold what a strict run refuses."""

    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, fourfold.events.ShardWritten):
            raise Stop

    model, out = written("qwen3_moe")[0], tmp_path / "out"
    with pytest.raises(Stop):
        fourfold.quantize(model, out, EXPERTS, on_event=stop)
    with pytest.raises(fourfold.OutputError, match="strict"):
        fourfold.quantize(model, out, EXPERTS, output=STRICT)
    assert fourfold.quantize(model, out, EXPERTS).clean
