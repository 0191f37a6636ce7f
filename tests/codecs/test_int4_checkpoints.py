# SPDX-License-Identifier: Apache-2.0
"""Proves that INT4 and INT8 checkpoints, in the forms in which they are published, are quantized to
the bytes that the BF16 checkpoint of the same values gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

import fourfold
from conftest import Written
from encoding import (
    W4A4,
    W4A16,
    Encoder,
    Tensors,
    change_config,
    change_tensors,
    encode,
    is_linear,
    quantize_both,
)
from integers import (
    awq,
    compressed,
    decompressed,
    dequantized_awq,
    dequantized_gptq,
    gptq,
    scheme,
    signed,
)


def is_expert(key: str, value: Tensor) -> bool:
    """What Kimi-K2 stores in INT4: neither attention nor dense layers nor shared experts."""
    return is_linear(key, value) and ".experts." in key


def quantized(value: Tensor, width: int, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes, scales and zeros of groups of columns: of their range, so not symmetric."""
    blocks = value.float().unflatten(-1, (-1, group or value.shape[-1]))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    top = (1 << width) - 1
    scales = ((high - low) / top).clamp(min=1e-5).half().float()
    zeros = (-low / scales).round().clamp(0, top)
    codes = (blocks / scales + zeros).round().clamp(0, top)
    return codes.flatten(-2).int(), scales.squeeze(-1), zeros.squeeze(-1).int()


def packs(
    width: int,
    group: int | None,
    symmetric: bool,
    chosen: Callable[[str, Tensor], bool] = is_linear,
    extra: Callable[[str], Tensors] = lambda stem: {},
) -> Encoder:
    """An encoder to compressed-tensors' form of the weights in `chosen`."""
    form = scheme(width, group, symmetric)

    def encoder(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
        if not chosen(key, value):
            return None
        codes, scales, zeros = quantized(value, width, group)
        parts = {
            "weight_packed": pack_to_int32(signed(codes, width), width),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor(value.shape, dtype=torch.int32),
        }
        if not symmetric:
            parts["weight_zero_point"] = pack_to_int32(signed(zeros, width), width, packed_dim=0)
        stem = key.removesuffix(".weight")
        stored = {f"{stem}.{name}": part for name, part in parts.items()} | extra(stem)
        return stored, decompressed(parts, form)

    return encoder


def has_words(key: str, value: Tensor) -> bool:
    """Gates of a few outputs do not fill a word, and stay as they are."""
    return is_linear(key, value) and len(value) % 8 == 0


def to_awq(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
    if not has_words(key, value):
        return None
    codes, scales, zeros = (part.T.contiguous() for part in quantized(value, 4, 16))
    parts = awq(codes, zeros, scales.half())
    stem = key.removesuffix(".weight")
    stored = {f"{stem}.{name}": part for name, part in parts.items()}
    return stored, dequantized_awq(parts).T.bfloat16().contiguous()


def to_gptq(width: int, less: int) -> Encoder:
    """Columns are ordered by something: they are reversed."""

    def encoder(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
        if not has_words(key, value):
            return None
        codes, scales, zeros = (part.T for part in quantized(value.flip(-1), width, 16))
        index = (torch.arange(len(codes)) // 16).flip(0)
        parts = gptq(
            codes.flip(0), zeros.contiguous(), scales.half().contiguous(), index, bits=width,
            less=less,
        )  # fmt: skip
        stem = key.removesuffix(".weight")
        stored = {f"{stem}.{name}": part for name, part in parts.items()}
        return stored, dequantized_gptq(parts, bits=width, more=less).T.bfloat16().contiguous()

    return encoder


def statics(stem: str) -> Tensors:
    """A scale of a KV cache, as compressed-tensors stores it."""
    if not stem.endswith("k_proj"):
        return {}
    return {f"{stem.removesuffix('.k_proj')}.k_scale": torch.tensor([0.5])}


KIMI = compressed(scheme(4, 16, True)) | {
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "quantization_status": "compressed",
}

FORMS: dict[str, tuple[dict[str, Any], Encoder]] = {
    "kimi": (KIMI, packs(4, 16, True, is_expert)),
    "asymmetric": (compressed(scheme(4, 16, False)), packs(4, 16, False, extra=statics)),
    "channels": (compressed(scheme(4, None, True)), packs(4, None, True)),
    "8 bits": (compressed(scheme(8, None, True)), packs(8, None, True)),
    "awq": ({"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16}, to_awq),
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, to_gptq(4, 1)),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
        to_gptq(8, 0),
    ),
}
"""How INT4 and INT8 are published: `quantization_config`, and the encoder."""


def both(family: str, form: str, written: Written, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of the family, and the same values in this form."""
    folder = Path(shutil.copytree(written(family)[0], tmp_path / "source"))
    change_config(folder, dtype="bfloat16")
    encode(folder, tmp_path / "encoded", *FORMS[form])
    return folder, tmp_path / "encoded"


@pytest.mark.parametrize(
    ("family", "form", "recipe", "title"),
    [
        ("deepseek_v3_mtp", "kimi", W4A16, "INT4 (compressed-tensors)"),
        ("deepseek_v3_mtp", "kimi", W4A4, "INT4 (compressed-tensors)"),
        ("qwen3_moe", "asymmetric", W4A16, "INT4 (compressed-tensors)"),
        ("qwen3_moe", "asymmetric", W4A4, "INT4 (compressed-tensors)"),
        ("glm4_moe", "channels", W4A16, "INT4 (compressed-tensors)"),
        ("qwen3_moe", "8 bits", W4A16, "INT8 (compressed-tensors)"),
        ("qwen3_moe", "awq", W4A16, "INT4 (AWQ)"),
        ("qwen3_moe", "awq", W4A4, "INT4 (AWQ)"),
        ("mixtral", "gptq", W4A16, "INT4 (GPTQ)"),
        ("qwen3_moe", "gptq", W4A4, "INT4 (GPTQ)"),
        ("qwen2_moe", "gptq v2", W4A16, "INT8 (GPTQ)"),
    ],
)
def test_it_is_quantized_like_the_bf16_checkpoint_of_its_values(
    family: str, form: str, recipe: str, title: str, written: Written, tmp_path: Path
) -> None:
    folder, encoded = both(family, form, written, tmp_path)
    result = quantize_both(folder, encoded, tmp_path / "out", recipe)
    notes = " ".join(result.plan.notes)
    assert f"weights from {title} (" in notes
    assert ("lose again" in notes) == title.startswith("INT4")


def test_kimi_k2_by_its_own_name(written: Written, tmp_path: Path) -> None:
    """A `model_type` of its own; attention, dense layers and shared experts are not quantized."""
    folder, encoded = both("deepseek_v3_mtp", "kimi", written, tmp_path)
    for checkpoint in (folder, encoded):
        own = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
        change_config(checkpoint, model_type="kimi_k2", auto_map=own)
    quantize_both(folder, encoded, tmp_path / "out", W4A16)
    config = json.loads((tmp_path / "out" / "made" / "config.json").read_text())
    assert config["model_type"] == "kimi_k2"


LAST = "model.layers.2.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{LAST}.weight_scale"),
            rf"^{LAST}\.weight_scale: missing beside {LAST}\.weight_packed\. Download",
        ),
        (
            lambda tensors: tensors.update({f"{LAST}.weight_scale": torch.ones(64, 2)}),
            rf"^{LAST}\.weight_scale: F32 \[64, 2\] does not fit .* 4 bits in groups of 16\.",
        ),
        (
            lambda tensors: tensors.pop(f"{LAST}.weight_packed"),
            rf"^{LAST}\.weight_scale in .*: BF16, of a weight that is not INT4",
        ),
    ],
)
def test_a_broken_checkpoint_is_not_planned(
    change: Callable[[Tensors], object], message: str, written: Written, tmp_path: Path
) -> None:
    _, encoded = both("deepseek_v3_mtp", "kimi", written, tmp_path)
    change_tensors(encoded, change)
    with pytest.raises(fourfold.SourceError, match=message):
        fourfold.plan(encoded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors[f"{LAST}.weight_scale"][5, 1:2].fill_(torch.nan),
            rf"^{LAST}\.weight_scale: nan; a scale must be finite\.",
        ),
        (
            lambda tensors: tensors[f"{LAST}.weight_shape"].fill_(7),
            rf"^{LAST}\.weight_shape: \[7, 7\], but the codes beside it",
        ),
    ],
)
def test_values_that_cannot_be(
    change: Callable[[Tensors], object], message: str, written: Written, tmp_path: Path
) -> None:
    _, encoded = both("deepseek_v3_mtp", "kimi", written, tmp_path)
    change_tensors(encoded, change)
    with pytest.raises(fourfold.SourceError, match=message):
        fourfold.quantize(encoded, tmp_path / "out", W4A16)
