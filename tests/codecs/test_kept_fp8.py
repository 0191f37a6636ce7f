# SPDX-License-Identifier: Apache-2.0
"""FP8 layers of a source that stay FP8 keep their codes and scales, bit for bit, beside experts
that become NVFP4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

import fourfold
import test_fp8_checkpoints as fp8
from encoding import SHARD, bits, encode
from nvfp4_folders import tensors_of
from test_mixed import calibration, tiny

CASES = {
    "deepseek": "w4a16_nvfp4_experts_mse-fp8_block_rest",
    "compressed-tensors channels": "rules",
    "mxfp8": "w4a16_nvfp4_experts_mse-mxfp8_rest",
}
RULES = """
rules:
  - {roles: [experts]}
  - {roles: [attention, mlp], weights: {format: fp8_channel, scale: max},
     activations: {format: fp8_channel}}
"""


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(tiny()).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    return tmp_path / "bf16"


@pytest.mark.parametrize("form", CASES)
def test_attention_stays_as_published(form: str, bf16: Path, tmp_path: Path) -> None:
    encode(bf16, tmp_path / "source", *fp8.FORMS[form])
    recipe = CASES[form]
    if recipe == "rules":
        (tmp_path / "recipe.yaml").write_text(RULES)
        recipe = str(tmp_path / "recipe.yaml")
    result = fourfold.quantize(tmp_path / "source", tmp_path / "out", recipe)
    assert result.clean, str(result.report)
    rest = [x for x in result.linears if ".experts." not in x.name]
    assert result.exact_casts == len(rest) > 0
    note = f"{len(rest)} FP8 weights keep their codes and scales"
    assert any(note in text for text in result.plan.notes)
    stored, made = load_file(tmp_path / "source" / SHARD), tensors_of(tmp_path / "out")
    for linear in rest:
        key = f"{linear.name}.weight"
        assert torch.equal(bits(made[key]), bits(stored[key])), key
        scales = next(
            stored[name]
            for name in stored
            if name.startswith(f"{linear.name}.") and "scale" in name
        )
        written = made[f"{linear.name}.weight_scale"]
        if scales.dtype == torch.uint8:
            assert torch.equal(written, scales)
        else:
            assert torch.equal(written.flatten(), scales.float().flatten()), key


def test_scales_that_engines_would_not_share(bf16: Path, tmp_path: Path) -> None:
    """q, k and v have a scale each: they are quantized again, under one. o keeps its own."""
    encode(bf16, tmp_path / "source", *fp8.FORMS["modelopt"])
    result = fourfold.quantize(
        tmp_path / "source",
        tmp_path / "out",
        "w4a16_nvfp4_experts_mse-fp8_rest",
        calibration=calibration(tmp_path),
    )
    assert result.clean, str(result.report)
    exact = {x.name.rpartition(".")[2] for x in result.linears if x.exact}
    assert exact == {"o_proj", "down_proj"}
    made = tensors_of(tmp_path / "out")
    for layer in range(3):
        names = [f"model.layers.{layer}.self_attn.{x}_proj.weight_scale" for x in "qkv"]
        assert len({float(made[name]) for name in names}) == 1


def test_scales_that_are_no_powers_of_two(bf16: Path, tmp_path: Path) -> None:
    """A group of 32 inputs may have a float32 scale, which MXFP8 cannot hold: quantized again."""
    quantization, _ = fp8.FORMS["mxfp8"]
    encoder = fp8.fp8(fp8.blocks_of(1, 32), fp8.sibling("weight_scale"))
    encode(bf16, tmp_path / "source", quantization, encoder)
    recipe = "w4a16_nvfp4_experts_mse-mxfp8_rest"
    result = fourfold.quantize(tmp_path / "source", tmp_path / "out", recipe)
    assert result.clean, str(result.report)
    assert result.exact_casts == 0
