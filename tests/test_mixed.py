# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: NVFP4 experts beside FP8, from the recipe to the loaded model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3_5MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import fourfold
from conftest import Written
from families.configs import OVERRIDES, tiny_config
from fourfold.config import CalibrationConfig
from fourfold.recipes import builtin_names
from jobs import assert_same, flat, ids_file, start
from nvfp4_folders import tensors_of
from test_ranks import on_ranks

RESTS = {"fp8": "FP8", "fp8_block": "FP8_PB_WO", "mxfp8": "MXFP8"}
RECIPES = [name for name in builtin_names() if name.endswith("_rest")]


def tiny() -> Qwen3MoeConfig:
    """Widths that are multiples of 128, and a dense layer."""
    return Qwen3MoeConfig(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, num_experts=4,
        num_experts_per_tok=2, vocab_size=128, max_position_embeddings=256, mlp_only_layers=[0],
        tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixed") / "source"
    Qwen3MoeForCausalLM(tiny()).to(torch.bfloat16).save_pretrained(folder)
    return folder


def calibration(folder: Path) -> CalibrationConfig:
    return CalibrationConfig(ids_file(folder), calib_size=8, calib_seq=24)


def test_there_are_six_recipes() -> None:
    assert len(RECIPES) == 2 * len(RESTS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_built_in_recipe(recipe: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    needs_data = recipe.startswith("nvfp4") or recipe.endswith("-fp8_rest")
    data = calibration(tmp_path) if needs_data else None
    result = fourfold.quantize(model, out, recipe, calibration=data)
    assert result.clean, str(result.report)
    assert result.report is not None
    assert not result.report.findings, str(result.report)
    rest = recipe.rpartition("-")[2].removesuffix("_rest")
    check_configuration(out, RESTS[rest], "NVFP4" if recipe.startswith("nvfp4") else "W4A16_NVFP4")
    errors = {role.role: role.relative_error for role in result.report.roles}
    assert 0.08 < errors["experts"] < 0.11
    assert 0.02 < errors["attention"] < 0.035
    assert 0.02 < errors["mlp"] < 0.035
    check_loaded(out, model)
    card = (out / "README.md").read_text()
    assert re.search(r"\d+ linear weights in (MX)?FP8", card)
    assert "vllm serve" in card
    assert "sglang" not in card


def check_configuration(out: Path, rest: str, experts: str) -> None:
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    body = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == body["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == body["quantized_layers"]
    layers = config["quantized_layers"]
    stored = {key.rpartition(".")[0] for key in tensors_of(out) if key.endswith(".weight_scale")}
    assert layers.keys() == stored
    for name, entry in layers.items():
        is_expert = ".experts." in name
        wanted = {"quant_algo": experts, "group_size": 16} if is_expert else {"quant_algo": rest}
        assert entry == wanted, name


def check_loaded(out: Path, source: Path) -> None:
    """The loaded model is near the source's: its logits differ by what quantization loses."""
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        logits = fourfold.load(out, dtype=torch.float32)(ids).logits
        wanted = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    assert float((logits - wanted).norm() / wanted.norm()) < 0.15


def test_activations_of_experts_alone(model: Path, tmp_path: Path) -> None:
    """W4A4 experts beside W4A16 attention, also when activations are simulated."""
    recipe = tmp_path / "recipe.yaml"
    experts = "{roles: [experts], activations: {format: nvfp4}}"
    recipe.write_text(f"rules:\n  - {experts}\n  - {{roles: [attention]}}\n")
    out = tmp_path / "out"
    result = fourfold.quantize(model, out, str(recipe), calibration=calibration(tmp_path))
    assert result.clean, str(result.report)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        exact = fourfold.load(out, dtype=torch.float32)(ids).logits
        rounded = fourfold.load(out, dtype=torch.float32, simulate_activations=True)(ids).logits
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.2


def test_ranks_and_kills_leave_the_same_bytes(model: Path, tmp_path: Path) -> None:
    recipe, ids = "nvfp4_experts_mse-fp8_rest", ids_file(tmp_path)
    options = {"calib": ids, "calib_size": 8, "calib_seq": 24, "shards": 2, "threads": 1}
    whole = tmp_path / "whole"
    fourfold.quantize(model, whole, recipe, **flat(**options))
    for kill_at in (60, 0):
        process = start(model, tmp_path / "killed", recipe, kill_at=kill_at, **options)
        process.join(120)
        assert process.exitcode == (-9 if kill_at else 0)
    assert_same(tmp_path / "killed", whole)
    line = ["--calib", ids, "--calib-size", 8, "--calib-seq", 24, "--shards", 2, "--threads", 1]
    for code, _, err in on_ranks(["quantize", model, tmp_path / "ranks", "-r", recipe, *line]):
        assert code == 0, err
    assert_same(tmp_path / "ranks", whole)


def test_families_with_other_modules(written: Written, tmp_path: Path) -> None:
    """Linear attention and shared experts in MXFP8, beside fused experts and MTP layers."""
    source = written("qwen3_5_moe_vl")[0]
    result = fourfold.quantize(source, tmp_path / "out", "w4a16_nvfp4_experts_mse-mxfp8_rest")
    assert result.clean, str(result.report)
    formats = {(x.role.value, result.plan.scheme_of(x).weights) for x in result.plan.linears}
    assert ("experts", "nvfp4") in formats
    assert {("linear_attention", "mxfp8"), ("shared_experts", "mxfp8")} <= formats


def test_narrow_layers_that_engines_fuse_stay(tmp_path: Path) -> None:
    """Qwen3.5's `in_proj_a` and `in_proj_b` have an output for each head: less than a block."""
    sizes = {
        "hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "shared_expert_intermediate_size": 128,
    }  # fmt: skip
    config = tiny_config("qwen3_5_moe_text", OVERRIDES["qwen3_5_moe_text"] | sizes)
    Qwen3_5MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    recipe = "w4a16_nvfp4_experts_mse-fp8_block_rest"
    plan = fourfold.plan(tmp_path / "source", recipe)
    formats = {x.name.rpartition(".")[2]: plan.scheme_of(x).weights for x in plan.linears}
    assert formats["in_proj_qkv"] == formats["in_proj_z"] == formats["out_proj"] == "fp8_block"
    kept = {
        row.key: row.reason for row in plan.rows if row.key.endswith(("_a.weight", "_b.weight"))
    }
    assert len(kept) == 4
    assert all("blocks of rows" in reason for reason in kept.values())
    assert fourfold.quantize(tmp_path / "source", tmp_path / "out", recipe).clean
    named = tmp_path / "named.yaml"
    rule = "weights: {format: fp8_block, scale: max}, activations: {format: fp8_block}"
    named.write_text(f"rules:\n- {{names: ['*in_proj_[ab]'], {rule}}}\n- {{roles: [experts]}}\n")
    with pytest.raises(fourfold.PlanError, match="4 and 4 outputs are no multiples of 128"):
        fourfold.plan(tmp_path / "source", named)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("{roles: [attention], weights: {format: fp8, scale: max}}",
         r"cannot say fp8\. Choose activations: \{format: fp8\}"),
        ("{roles: [attention], weights: {format: nvfp4}, activations: {format: fp8}}",
         r"cannot say nvfp4 with fp8 activations\. Choose activations: none, or"),
        ("{roles: [attention], weights: {format: fp8, scale: mse}, activations: {format: fp8}}",
         "mse does not quantize to FP8"),
        ("{roles: [experts], weights: {format: mxfp8, scale: max}, activations: {format: mxfp8}}",
         "and no weight NVFP4"),
        ("{names: ['*.q_proj'], weights: {format: mxfp8, scale: max}, "
         "activations: {format: mxfp8}}]\n  - {roles: [experts]}", "engines fuse them"),
    ],
)  # fmt: skip
def test_what_no_engine_reads(rules: str, message: str, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"rules:\n  - {rules.replace(']' + chr(10), chr(10))}\n")
    with pytest.raises((fourfold.PlanError, fourfold.RecipeError), match=message):
        fourfold.plan(model, str(recipe))
