# SPDX-License-Identifier: Apache-2.0
"""Proves that FP8 checkpoints, in the forms in which they are published, are quantized to the bytes
that the BF16 checkpoint of the same values gives."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fourfold
from conftest import Written
from encoding import (
    W4A4,
    W4A16,
    Encoder,
    Tensors,
    bits,
    change_tensors,
    encode,
    is_linear,
    quantize_both,
)
from families import FAMILIES, read_back

MAX = 448.0


def spread(scales: Tensor, shape: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """The scale of each weight."""
    rows = scales.float().repeat_interleave(size[0], -2)
    return rows.repeat_interleave(size[1], -1)[..., : shape[-2], : shape[-1]]


def in_blocks(value: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """E4M3 codes, and the float32 scale of each block."""
    height, width = size
    rows, columns = value.shape[-2:]
    padding = (0, -columns % width, 0, -rows % height)
    blocks = torch.nn.functional.pad(value.float(), padding).abs()
    blocks = blocks.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    scales = blocks.amax((-1, -3)).clamp(min=1e-4) / MAX
    return (value.float() / spread(scales, value.shape, size)).to(torch.float8_e4m3fn), scales


def fp8(
    size: Callable[[Tensor], tuple[int, int]],
    names: Callable[[str], str],
    scale_of: Callable[[Tensor], Tensor] = lambda scales: scales,
    extra: Callable[[str], Tensors] = lambda key: {},
) -> Encoder:
    """An encoder: the block size of a weight, the name of its scale, and how the scale is stored;
    `extra` tensors lie beside it."""

    def encoder(key: str, value: Tensor) -> tuple[Tensors, Tensor] | None:
        if not is_linear(key, value):
            return None
        block = size(value)
        _, scales = in_blocks(value, block)
        stored = scale_of(scales)
        is_byte = stored.dtype == torch.uint8
        factors = (stored.view(torch.float8_e8m0fnu) if is_byte else stored).float()
        factors = factors.reshape(scales.shape)
        codes = (value.float() / spread(factors, value.shape, block)).clamp(-MAX, MAX)
        codes = codes.to(torch.float8_e4m3fn)
        decoded = codes.float() * spread(factors, value.shape, block)
        return {key: codes, names(key): stored, **extra(key)}, decoded.bfloat16()

    return encoder


def blocks_of(height: int, width: int) -> Callable[[Tensor], tuple[int, int]]:
    return lambda _: (height, width)


def whole(value: Tensor) -> tuple[int, int]:
    return value.shape[-2], value.shape[-1]


def channel(value: Tensor) -> tuple[int, int]:
    return 1, value.shape[-1]


def sibling(name: str) -> Callable[[str], str]:
    """`<linear>.<name>`; of a fused tensor `<key>_<name>`, without another `weight_`."""

    def scale(key: str) -> str:
        stem = key.removesuffix(".weight")
        return f"{stem}.{name}" if stem != key else f"{key}_{name.removeprefix('weight_')}"

    return scale


def powers_of_two(scales: Tensor) -> Tensor:
    return scales.log2().ceil().exp2()


def statics(key: str) -> Tensors:
    """What ModelOpt stores beside a weight and a layer's KV cache."""
    stem = key.removesuffix(".weight")
    one = {f"{stem}.input_scale": torch.tensor(0.25)}
    for name in ("k", "v"):
        if stem.endswith(f"{name}_proj"):
            one[f"{stem}.{name}_scale"] = torch.tensor(1.0)
    return one


def compressed_tensors(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "format": "float-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


TRANSFORMERS = {"quant_method": "fp8", "activation_scheme": "dynamic"}
SMALL_BLOCKS = {**TRANSFORMERS, "weight_block_size": [24, 40]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}

FORMS: dict[str, tuple[dict[str, Any], Encoder]] = {
    "transformers": (SMALL_BLOCKS, fp8(blocks_of(24, 40), sibling("weight_scale_inv"))),
    "deepseek": (TRANSFORMERS, fp8(blocks_of(128, 128), sibling("scale"))),
    "ue8m0": (
        {**SMALL_BLOCKS, "scale_fmt": "ue8m0"},
        fp8(
            blocks_of(24, 40),
            sibling("weight_scale_inv"),
            lambda scales: powers_of_two(scales).to(torch.float8_e8m0fnu),
        ),
    ),
    "bf16 scales": (
        SMALL_BLOCKS,
        fp8(blocks_of(24, 40), sibling("weight_scale_inv"), lambda scales: scales.bfloat16()),
    ),
    "compressed-tensors blocks": (
        compressed_tensors("block", block_structure=[24, 40]),
        fp8(blocks_of(24, 40), sibling("weight_scale")),
    ),
    "compressed-tensors channels": (
        compressed_tensors("channel"),
        fp8(channel, sibling("weight_scale"), lambda scales: scales.bfloat16()),
    ),
    "modelopt": (
        MODELOPT,
        fp8(
            whole,
            sibling("weight_scale"),
            lambda scales: scales.squeeze((-1, -2)) if scales.numel() == 1 else scales,
            statics,
        ),
    ),
    "modelopt blocks": (
        {**MODELOPT, "quant_algo": "FP8_PB_WO"},
        fp8(
            blocks_of(128, 128),
            sibling("weight_scale"),
            lambda scales: scales.unsqueeze(-2).unsqueeze(-1),
        ),
    ),
    "modelopt channels": (
        {**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        fp8(channel, sibling("weight_scale"), lambda scales: scales.squeeze(-1)),
    ),
    "mxfp8": (
        {**TRANSFORMERS, "scale_fmt": "ue8m0", "weight_block_size": [1, 32]},
        fp8(
            blocks_of(1, 32),
            sibling("weight_scale_inv"),
            lambda scales: powers_of_two(scales).to(torch.float8_e8m0fnu).view(torch.uint8),
        ),
    ),
}
"""How FP8 is published: `quantization_config`, and the encoder."""


def both(family: str, form: str, written: Written, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of the family, and the same values in this form."""
    folder = shutil.copytree(written(family)[0], tmp_path / "source")
    encode(folder, tmp_path / "encoded", *FORMS[form])
    return folder, tmp_path / "encoded"


@pytest.mark.parametrize(
    ("family", "form", "recipe"),
    [
        ("deepseek_v3_mtp", "transformers", W4A16),
        ("deepseek_v3_mtp", "transformers", W4A4),
        ("deepseek_v3_mtp", "deepseek", W4A16),
        ("qwen3_moe", "compressed-tensors channels", W4A16),
        ("qwen3_moe", "compressed-tensors channels", W4A4),
        ("qwen3_moe", "compressed-tensors blocks", W4A16),
        ("qwen3_moe", "modelopt", W4A16),
        ("qwen3_moe", "modelopt", W4A4),
        ("qwen3_moe", "modelopt channels", W4A16),
        ("glm4_moe", "modelopt blocks", W4A16),
        ("minimax_m2", "bf16 scales", W4A16),
        ("minimax_m2", "ue8m0", W4A16),
        ("mixtral", "mxfp8", W4A16),
        ("qwen3_5_moe_vl", "transformers", W4A16),
        ("qwen3_5_moe_vl", "transformers", W4A4),
        ("llama4", "modelopt channels", W4A16),
        ("qwen3_vl_moe", "transformers", W4A16),
        ("gpt_oss", "transformers", W4A16),
        ("inkling2", "mxfp8", W4A16),
        ("step3p7", "transformers", W4A16),
        ("granitemoe", "modelopt", W4A16),
        ("dbrx", "compressed-tensors blocks", W4A16),
    ],
)
def test_it_is_quantized_like_the_bf16_checkpoint_of_its_values(
    family: str, form: str, recipe: str, written: Written, tmp_path: Path
) -> None:
    result = quantize_both(*both(family, form, written, tmp_path), tmp_path / "out", recipe)
    notes = " ".join(result.plan.notes)
    assert re.search(r"\d weights from (MX)?FP8", notes)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "jetmoe"])
def test_every_family(family: str, written: Written, tmp_path: Path) -> None:
    names = list(FORMS)
    form = names[list(FAMILIES).index(family) % len(names)]
    recipe = W4A16 if FAMILIES[family].experts.name != "dense" else "w4a16_nvfp4_default"
    quantize_both(*both(family, form, written, tmp_path), tmp_path / "out", recipe)


def test_experts_apart_of_a_family_that_fuses_them(written: Written, tmp_path: Path) -> None:
    """Qwen3.5 in FP8 has a tensor for each expert, while in BF16 it has fused ones."""
    folder = shutil.copytree(written("qwen3_5_moe_vl")[0], tmp_path / "source")

    def cut(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith("experts.gate_up_proj")]:
            stem = key.removesuffix(".gate_up_proj")
            down = tensors.pop(f"{stem}.down_proj")
            for expert, (both_, last) in enumerate(zip(tensors.pop(key), down, strict=True)):
                gate, up = both_.chunk(2)
                parts = {"gate_proj": gate, "up_proj": up, "down_proj": last}
                for name, part in parts.items():
                    tensors[f"{stem}.{expert}.{name}.weight"] = part.contiguous()

    change_tensors(folder, cut)
    encode(folder, tmp_path / "encoded", *FORMS["transformers"])
    quantize_both(folder, tmp_path / "encoded", tmp_path / "out", W4A16)


def test_it_loads_as_the_bf16_checkpoint_of_its_values(written: Written, tmp_path: Path) -> None:
    folder, encoded = both("deepseek_v3_mtp", "transformers", written, tmp_path)
    wanted, _ = read_back(FAMILIES["deepseek_v3_mtp"], folder)
    state = fourfold.load(encoded).state_dict()
    assert state.keys() == wanted.state_dict().keys()
    for key, tensor in wanted.state_dict().items():
        assert torch.equal(bits(state[key]), bits(tensor)), key


@pytest.mark.parametrize(
    ("family", "form", "formats"),
    [
        ("qwen3_moe", "modelopt", {"fp8"}),
        ("qwen3_moe", "modelopt channels", {"fp8_channel"}),
        ("qwen3_vl_moe", "modelopt channels", {"fp8_channel"}),
        ("granitemoe", "modelopt channels", {"fp8_channel"}),
    ],
)
def test_its_inputs_are_rounded(
    family: str, form: str, formats: set[str], written: Written, tmp_path: Path
) -> None:
    """Also where all experts of a layer are one tensor."""
    encoded = both(family, form, written, tmp_path)[1]
    model: Any = fourfold.load(encoded, simulate_activations=True)
    sites = model.fourfold_simulation.sites
    experts = [rounding for products in sites.experts.values() for rounding in products.values()]
    assert experts
    assert {x.format for x in (*sites.linears.values(), *experts)} == formats
    assert {x.scale is None for x in experts} == {formats != {"fp8"}}


LAST = "model.layers.2.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{LAST}.weight_scale_inv"),
            rf"^{LAST}\.weight: FP8 without weight_scale_inv or weight_scale\. Download",
        ),
        (
            lambda tensors: tensors.update({f"{LAST}.weight_scale_inv": torch.ones(3, 3)}),
            rf"^{LAST}\.weight_scale_inv: F32 \[3, 3\] does not fit weight \[64, 48\]",
        ),
    ],
)
def test_a_broken_checkpoint_is_not_planned(
    change: Callable[[Tensors], object], message: str, written: Written, tmp_path: Path
) -> None:
    _, encoded = both("deepseek_v3_mtp", "transformers", written, tmp_path)
    change_tensors(encoded, change)
    with pytest.raises(fourfold.SourceError, match=message):
        fourfold.plan(encoded)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda tensors: tensors[f"{LAST}.weight"].view(torch.uint8)[5, 7:8].fill_(0x7F),
            fourfold.NonFiniteError,
            rf"^{LAST}\.weight in .*: 1 NaN or Inf in row 5, decoded to BF16 from",
        ),
        (
            lambda tensors: tensors[f"{LAST}.weight_scale_inv"][1, 1:2].fill_(-1.0),
            fourfold.SourceError,
            rf"^{LAST}\.weight_scale_inv: -1\.0; a scale must be finite and not negative\.",
        ),
    ],
)
def test_values_that_are_none(
    change: Callable[[Tensors], object],
    error: type[Exception],
    message: str,
    written: Written,
    tmp_path: Path,
) -> None:
    _, encoded = both("deepseek_v3_mtp", "transformers", written, tmp_path)
    change_tensors(encoded, change)
    with pytest.raises(error, match=message) as raised:
        fourfold.quantize(encoded, tmp_path / "out", W4A16, runtime=fourfold.Runtime(threads=1))
    assert not getattr(raised.value, "__notes__", [])  # nobody is told to run it again
    assert not (tmp_path / "out").exists()
