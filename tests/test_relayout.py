# SPDX-License-Identifier: Apache-2.0
"""`fourfold convert` of quantized checkpoints: decoded, or as another layout has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fourfold
from conftest import Written
from extending import reciprocal
from fourfold.config import CalibrationConfig, OutputConfig
from fourfold.errors import PlanError, SourceError, UnreadableError, UsageError
from fourfold.layouts.base import LAYOUTS
from fourfold.verification.readers import READERS
from nvfp4_folders import Tensors, changed, tensors_of

RECIPE = "w4a16_nvfp4_experts_only_mse"
W4A4 = "nvfp4_default_mse-fp8_kv"


@pytest.fixture
def other_layout() -> Iterator[str]:
    reciprocal.register()
    yield reciprocal.Reciprocal.name
    del LAYOUTS[reciprocal.Reciprocal.name], READERS[reciprocal.Reciprocal.name]


@pytest.fixture(scope="module")
def quantized(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("w4a4")
    ids = folder / "ids.jsonl"
    ids.write_text(json.dumps({"input_ids": list(range(16))}) + "\n")
    calibration = CalibrationConfig(ids, calib_size=1, calib_seq=16)
    fourfold.quantize(written("qwen3_moe")[0], folder / "out", W4A4, calibration=calibration)
    return folder / "out"


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def test_the_same_layout_has_the_same_bytes(quantized: Path, tmp_path: Path) -> None:
    fourfold.convert(quantized, tmp_path / "out", layout="modelopt", shards=2)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(quantized)
    assert ours.keys() == theirs.keys()
    assert any(key.endswith("k_scale") for key in ours)
    assert all(same(ours[key], theirs[key]) for key in ours)
    for name in ("config.json", "hf_quant_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
            (quantized / name).read_text()
        )
    report = fourfold.verify(tmp_path / "out")
    assert report.clean, str(report)


@pytest.mark.parametrize("family", ["dbrx", "granitemoe", "step3p7"])
def test_experts_that_transformers_knows_stacked_alone(
    family: str, written: Written, tmp_path: Path
) -> None:
    source = written(family)[0]
    fourfold.quantize(source, tmp_path / "out", RECIPE)
    fourfold.convert(tmp_path / "out", tmp_path / "other", layout="compressed-tensors")
    report = fourfold.verify(tmp_path / "other", source=source)
    assert report.clean, str(report)


def test_another_layout_has_the_same_codes(
    written: Written, tmp_path: Path, other_layout: str
) -> None:
    out = tmp_path / "quantized"
    fourfold.quantize(written("qwen3_moe")[0], out, RECIPE)
    fourfold.convert(out, tmp_path / "out", layout=other_layout)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(out)
    linears = [key.removesuffix(".weight_scale_2") for key in theirs if key.endswith("scale_2")]
    assert linears
    for name in linears:
        assert same(ours.pop(f"{name}.packed_codes"), theirs.pop(f"{name}.weight"))
        assert same(ours.pop(f"{name}.packed_scale"), theirs.pop(f"{name}.weight_scale"))
        divisor = 1 / theirs.pop(f"{name}.weight_scale_2").reshape(1)
        assert same(ours.pop(f"{name}.packed_divisor"), divisor)
    assert ours.keys() == theirs.keys()
    report = fourfold.verify(tmp_path / "out", source=written("qwen3_moe")[0])
    assert report.clean, str(report)


def test_without_a_layout_weights_are_decoded(quantized: Path, tmp_path: Path) -> None:
    fourfold.convert(quantized, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    decoded = tensors_of(tmp_path / "out")
    assert {value.dtype for value in decoded.values()} == {torch.bfloat16}
    model = fourfold.load(quantized)
    for key in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert torch.equal(decoded[key], model.state_dict()[key])


def test_what_fused_weights_do_not_share(quantized: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.q_proj.weight_scale_2"

    def change(tensors: Tensors) -> None:
        if key in tensors:
            tensors[key] = tensors[key] * 2

    folder = changed(quantized, tmp_path / "changed", change)
    with pytest.raises(PlanError, match=r"q_proj has the global scale .* and .*k_proj"):
        fourfold.convert(folder, tmp_path / "out", layout="modelopt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["a scale for each head", "a layer of another name"])
def test_kv_scales_that_a_layout_has_no_place_for(
    quantized: Path, tmp_path: Path, change: str
) -> None:
    key = "model.layers.0.self_attn.k_proj.k_scale"

    def edit(tensors: Tensors) -> None:
        if key not in tensors:
            return
        if change == "a scale for each head":
            tensors[key] = torch.tensor([0.5, 0.25])
        else:
            tensors["model.layers.0.cross.k_scale"] = tensors.pop(key)

    folder = changed(quantized, tmp_path / "changed", edit)
    with pytest.raises(SourceError, match=r"k_scale in .*: \[.*one number for each attention"):
        fourfold.convert(folder, tmp_path / "out", layout="modelopt")
    assert not (tmp_path / "out").exists()


def test_what_has_no_codes_to_keep(quantized: Path, written: Written, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no NVFP4 weights that `layout` could carry over"):
        fourfold.convert(written("qwen3_moe")[0], tmp_path / "out", layout="modelopt")
    with pytest.raises(UsageError, match="`layout=gguf`: no such layout"):
        fourfold.convert(quantized, tmp_path / "out", layout="gguf")


def test_errors_against_what_the_source_was_made_from(
    quantized: Path, written: Written, tmp_path: Path
) -> None:
    """A quantized source hides its own error; `reference` shows it."""
    original = written("qwen3_moe")[0]
    output = OutputConfig(reference=original)
    result = fourfold.quantize(quantized, tmp_path / "out", RECIPE, output=output)
    report = result.report
    assert report is not None
    assert report.clean, str(report)
    assert str(original) == report.reference
    against_original = fourfold.verify(tmp_path / "out", source=original)
    wanted = {error.name: error for error in against_original.relative_errors}
    assert len(wanted) == len(report.reference_errors) > 0
    for error in report.reference_errors:
        assert error.relative_error == wanted[error.name].relative_error
    (role,), (against,) = report.roles, report.reference_roles
    assert role.relative_error < against.relative_error
    assert f"against {original}, which the source was made from" in str(report)
    with pytest.raises(UnreadableError, match="no weight of this name, where the output has"):
        fourfold.verify(tmp_path / "out", reference=written("mixtral")[0])
    with pytest.raises(UsageError, match="`reference`: has no effect without `verify`"):
        OutputConfig(reference=original, verify=False)
