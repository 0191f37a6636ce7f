# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4 checkpoints as sources: cast without loss where that is exact, and otherwise
quantized to the bytes that the BF16 checkpoint of the same values gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

import fourfold
from conftest import Written
from encoding import (
    SHARD,
    W4A4,
    W4A16,
    Encoder,
    Tensors,
    bits,
    change_config,
    change_tensors,
    encode,
    is_linear,
    quantize_both,
)
from fourfold.errors import DamagedError
from fourfold.formats import nvfp4
from jobs import ids_file
from nvfp4_folders import tensors_of

MXFP4 = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 128, "max_position_embeddings": 128, "sliding_window": 16, "pad_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
"""A gpt-oss whose dimensions are multiples of 32."""

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def mxfp4_of(value: Tensor, lift: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [.., out, in/2], exponents [.., out, in/32] and decoded values of [.., out, in]."""
    blocks = value.float().unflatten(-1, (-1, 32))
    exponents = lift(blocks.abs().amax(-1).clamp(min=2.0**-20).log2().floor() - 2)
    scaled = blocks / 2.0 ** exponents.unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    decoded = (E2M1[codes] * scaled.sign() * 2.0 ** exponents.unsqueeze(-1)).flatten(-2)
    codes = (codes | (scaled < 0).long() << 3).to(torch.uint8).flatten(-2)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return packed, (exponents + 127).to(torch.uint8), decoded.bfloat16()


def flat(exponents: Tensor) -> Tensor:
    return exponents


def spanning(exponents: Tensor) -> Tensor:
    """Exponents of which one lies far below the others: a cast is not exact then."""
    lifted = exponents.clone()
    lifted.reshape(-1)[0] = exponents.max() - 18
    return lifted


def packed(lift: Callable[[Tensor], Tensor]) -> Encoder:
    def encoder(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
        if not is_linear(key, value) or value.shape[-1] % 32:
            return None
        stem = key.removesuffix(".weight")
        codes, exponents, decoded = mxfp4_of(value, lift)
        return {f"{stem}.weight_packed": codes, f"{stem}.weight_scale": exponents}, decoded

    return encoder


def gpt_oss(lift: Callable[[Tensor], Tensor]) -> Encoder:
    def encoder(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        codes, exponents, decoded = mxfp4_of(value.transpose(1, 2), lift)
        blocks = codes.unflatten(-1, (-1, 16))
        decoded = decoded.transpose(1, 2).contiguous()
        return {f"{key}_blocks": blocks, f"{key}_scales": exponents}, decoded

    return encoder


def nvfp4_packed(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
    """q, k and v share a global scale, and so do gate and up: engines fuse them."""
    if not is_linear(key, value):
        return None
    stem = key.removesuffix(".weight")
    divisor = torch.tensor([5000.0])
    quantized = nvfp4.quantize(value, global_scale=1 / 5000)
    scales = quantized.block_scale.float() / divisor
    exact = nvfp4.dequantize(quantized.codes, quantized.block_scale, 1.0) / (
        quantized.block_scale.float().repeat_interleave(16, -1)
    )
    parts = {
        f"{stem}.weight_packed": quantized.codes,
        f"{stem}.weight_scale": quantized.block_scale,
        f"{stem}.weight_global_scale": divisor,
        f"{stem}.input_global_scale": torch.tensor([300.0]),
    }
    return parts, (exact * scales.repeat_interleave(16, -1)).bfloat16()


@pytest.fixture
def tiny_gpt_oss(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = GptOssConfig(**TINY)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def calibration(folder: Path, recipe: str) -> fourfold.CalibrationConfig | None:
    if recipe == W4A16:
        return None
    return fourfold.CalibrationConfig(ids_file(folder), calib_size=8, calib_seq=24)


def check_exact(out: Path, source: Path, result: fourfold.Result, count: int) -> None:
    """Every weight has no error, the source's bytes, and is called exact."""
    assert result.clean, str(result.report)
    assert result.report is not None
    assert len(result.linears) == result.exact_casts == count
    assert {error.relative_error for error in result.report.relative_errors} == {0.0}
    assert f"{count} of {count} MXFP4 weights are cast without loss" in "".join(result.plan.notes)
    summary = json.loads((out / "quant_summary.json").read_text())
    assert all(linear["exact"] for linear in summary["linears"])
    assert "have the source's own codes" in (out / "README.md").read_text()
    assert fourfold.verify(out, source=source).clean


@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_gpt_oss_is_cast_without_loss(tiny_gpt_oss: Path, tmp_path: Path, recipe: str) -> None:
    encoded = tmp_path / "encoded"
    encode(tiny_gpt_oss, encoded, GPT_OSS, gpt_oss(flat))
    out = tmp_path / "out"
    result = fourfold.quantize(encoded, out, recipe, calibration=calibration(tmp_path, recipe))
    check_exact(out, encoded, result, count=2 * 4 * 3)
    stored, made = load_file(encoded / SHARD), tensors_of(out)
    experts = "model.layers.1.mlp.experts"
    blocks = stored[f"{experts}.gate_up_proj_blocks"][2].flatten(1)
    assert torch.equal(made[f"{experts}.2.gate_proj.weight"], blocks[::2])
    assert torch.equal(made[f"{experts}.2.up_proj.weight"], blocks[1::2])
    down = stored[f"{experts}.down_proj_blocks"][3].flatten(1)
    assert torch.equal(made[f"{experts}.3.down_proj.weight"], down)
    generated = fourfold.load(out)
    wanted = load_file(tiny_gpt_oss / SHARD)
    for name in ("gate_up_proj", "down_proj"):
        key = f"{experts}.{name}"
        assert torch.equal(generated.state_dict()[key], wanted[key])


@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_scales_that_span_too_much(tiny_gpt_oss: Path, tmp_path: Path, recipe: str) -> None:
    """In each layer, gate and up of expert 0 are quantized as those of a BF16 checkpoint are, and
    so is its down; the others are cast."""
    encoded, out = tmp_path / "encoded", tmp_path / "out"
    encode(tiny_gpt_oss, encoded, GPT_OSS, gpt_oss(spanning))
    chosen = calibration(tmp_path, recipe)
    result = fourfold.quantize(encoded, out, recipe, calibration=chosen)
    assert result.clean, str(result.report)
    assert result.exact_casts == 2 * 3 * 3
    assert "18 of 24 MXFP4 weights are cast without loss" in "".join(result.plan.notes)
    fourfold.quantize(tiny_gpt_oss, tmp_path / "wanted", recipe, calibration=chosen)
    made, wanted = tensors_of(out), tensors_of(tmp_path / "wanted")
    assert made.keys() == wanted.keys()
    inexact = [linear.name for linear in result.linears if not linear.exact]
    assert all(".experts.0." in name for name in inexact)
    for key, value in wanted.items():
        stem = key.rpartition(".")[0]
        if stem in inexact or key.endswith("input_scale") or ".experts." not in key:
            assert torch.equal(bits(made[key]), bits(value)), key


def test_weights_in_mxfp4_one_by_one(written: Written, tmp_path: Path) -> None:
    """A scale that both halves of a block share, also of weights that engines fuse."""
    source, _ = written("qwen3_moe")
    folder, encoded, out = tmp_path / "source", tmp_path / "encoded", tmp_path / "out"
    copy_of(source, folder)
    encode(folder, encoded, MXFP4, packed(flat))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("quantize: [attention]\n")
    result = fourfold.quantize(encoded, out, str(recipe))
    check_exact(out, encoded, result, count=len(result.linears))
    stored, made = load_file(encoded / SHARD), tensors_of(out)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(made[f"{name}.weight"], stored[f"{name}.weight_packed"])
    powers = made[f"{name}.weight_scale"].float() * made[f"{name}.weight_scale_2"]
    wanted = 2.0 ** (stored[f"{name}.weight_scale"].float() - 127)
    assert torch.equal(powers, wanted.repeat_interleave(2, -1))


@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_experts_in_mxfp4_one_by_one(written: Written, tmp_path: Path, recipe: str) -> None:
    """Where a cast is not exact, they give the bytes of the BF16 checkpoint."""
    copy_of(written("qwen3_moe")[0], tmp_path / "source")
    encode(tmp_path / "source", tmp_path / "encoded", MXFP4, packed(spanning))
    result = quantize_both(tmp_path / "source", tmp_path / "encoded", tmp_path / "out", recipe)
    assert result.exact_casts == 0
    assert "0 of 16 MXFP4 weights are cast without loss" in "".join(result.plan.notes)


@pytest.mark.parametrize(
    ("config", "encoder", "scale", "message"),
    [
        (
            MXFP4,
            packed(flat),
            0xFF,
            r"\.weight in .*: 32 NaN or Inf in row 5, decoded to BF16 from",
        ),
        (NVFP4, nvfp4_packed, 0x7F, r"\.weight_scale: nan; a block scale must be 0 or positive"),
        (NVFP4, nvfp4_packed, 0xFF, r"\.weight_scale: nan; a block scale must be 0 or positive"),
        (NVFP4, nvfp4_packed, 0xB8, r"\.weight_scale: -1\.0; a block scale must be 0 or positive"),
    ],
)
def test_a_scale_that_is_none(
    config: dict[str, str],
    encoder: Encoder,
    scale: int,
    message: str,
    written: Written,
    tmp_path: Path,
) -> None:
    """Neither `quantize` nor `convert`, also into another layout, carries it on."""
    copy_of(written("qwen3_moe")[0], tmp_path / "source")
    encode(tmp_path / "source", tmp_path / "encoded", config, encoder)
    name = "model.layers.1.mlp.experts.2.up_proj"

    def spoil(tensors: Tensors) -> None:
        tensors[f"{name}.weight_scale"].view(torch.uint8)[5, 1] = scale

    change_tensors(tmp_path / "encoded", spoil)
    with pytest.raises(DamagedError, match=f"^{name}{message}"):
        fourfold.quantize(tmp_path / "encoded", tmp_path / "out", W4A16)
    for layout in (None, "modelopt") if config is NVFP4 else (None,):
        with pytest.raises(DamagedError, match=f"^{name}{message}"):
            fourfold.convert(tmp_path / "encoded", tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [W4A16, W4A4])
def test_weights_in_nvfp4_are_quantized_again(
    written: Written, tmp_path: Path, recipe: str
) -> None:
    source, _ = written("qwen3_moe")
    copy_of(source, tmp_path / "source")
    encode(tmp_path / "source", tmp_path / "encoded", NVFP4, nvfp4_packed)
    result = quantize_both(tmp_path / "source", tmp_path / "encoded", tmp_path / "out", recipe)
    assert "lose again" in "".join(result.plan.notes)


def test_block_scales_that_are_all_zero(written: Written, tmp_path: Path) -> None:
    """They are not carried on into another layout, unless the codes are 0, too."""
    copy_of(written("qwen3_moe")[0], tmp_path / "source")
    encode(tmp_path / "source", tmp_path / "encoded", NVFP4, nvfp4_packed)
    name = "model.layers.1.mlp.experts.2.up_proj"

    def clear(part: str) -> Callable[[Tensors], object]:
        return lambda tensors: tensors[f"{name}.{part}"].view(torch.uint8).zero_()

    change_tensors(tmp_path / "encoded", clear("weight_scale"))
    with pytest.raises(DamagedError, match=rf"^{name}\.weight_scale: nothing but zeros"):
        fourfold.convert(tmp_path / "encoded", tmp_path / "out", layout="modelopt")
    change_tensors(tmp_path / "encoded", clear("weight_packed"))
    fourfold.convert(tmp_path / "encoded", tmp_path / "out", layout="modelopt")


def test_nvfp4_keeps_its_codes_in_the_other_layout(written: Written, tmp_path: Path) -> None:
    copy_of(written("qwen3_moe")[0], tmp_path / "source")
    encode(tmp_path / "source", tmp_path / "encoded", NVFP4, nvfp4_packed)
    fourfold.convert(tmp_path / "encoded", tmp_path / "out", layout="modelopt")
    stored, made = load_file(tmp_path / "encoded" / SHARD), tensors_of(tmp_path / "out")
    linears = [key.removesuffix(".weight_packed") for key in stored if key.endswith("_packed")]
    assert linears
    for name in linears:
        parts = {
            "weight": stored[f"{name}.weight_packed"],
            "weight_scale": stored[f"{name}.weight_scale"],
            "weight_scale_2": 1 / stored[f"{name}.weight_global_scale"].squeeze(),
            "input_scale": 1 / stored[f"{name}.input_global_scale"].squeeze(),
        }
        for part, wanted in parts.items():
            assert torch.equal(bits(made[f"{name}.{part}"]), bits(wanted)), f"{name}.{part}"
    report = fourfold.verify(tmp_path / "out", source=tmp_path / "source")
    assert report.clean, str(report)
    assert max(error.relative_error for error in report.relative_errors) < 1e-2


def copy_of(source: Path, folder: Path) -> None:
    import shutil

    shutil.copytree(source, folder)
    change_config(folder, dtype="bfloat16")
