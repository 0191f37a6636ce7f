# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3-MoE and its NVFP4 checkpoint, written with plain code of our own.

Nothing of fourfold is used here: formulas, names and files follow the published layouts alone,
so that what `verify` says is not judged by the code that it judges.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, VOCAB = 128, 64, 4, 2, 96
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32

ATTENTION = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
}
EXPERT = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def source_config() -> dict[str, Any]:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    return json.loads(config.to_json_string())


def source_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    tensors = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": 1 + random(HIDDEN),
        "lm_head.weight": random(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + random(HIDDEN)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + random(HIDDEN)
        tensors[f"{prefix}.self_attn.q_norm.weight"] = 1 + random(HEAD_DIM)
        tensors[f"{prefix}.self_attn.k_norm.weight"] = 1 + random(HEAD_DIM)
        for name, shape in ATTENTION.items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = random(*shape)
        tensors[f"{prefix}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in EXPERT.items():
                tensors[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = random(*shape)
    return tensors


def quantize(weight: Tensor, global_scale: float) -> tuple[Tensor, Tensor]:
    """Codes [out, in/2] and block scales [out, in/16] by the plain formula, scale = amax/6."""
    blocks = weight.float().reshape(weight.shape[0], -1, 16)
    scale = blocks.abs().amax(-1) / (6 * global_scale)
    scale = scale.clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    x = (blocks / (scale.float() * global_scale).unsqueeze(-1)).reshape(weight.shape)
    code = sum((x.abs() > t).int() for t in (0.25, 1.25, 2.5, 5.0))
    code = code + sum((x.abs() >= t).int() for t in (0.75, 1.75, 3.5))
    code = (code + 8 * torch.signbit(x)).to(torch.uint8)
    return code[:, 0::2] | code[:, 1::2] << 4, scale


def group_of(name: str) -> list[str]:
    parent, _, last = name.rpartition(".")
    group = next((group for group in FUSED if last in group), (last,))
    return [f"{parent}.{part}" for part in group]


def pack(name: str, source: dict[str, Tensor], algo: str = "NVFP4") -> dict[str, Tensor]:
    """The tensors of one quantized linear."""
    amax = max(float(source[f"{member}.weight"].abs().max()) for member in group_of(name))
    global_scale = torch.tensor(amax / (6 * 448))
    codes, scale = quantize(source[f"{name}.weight"], float(global_scale))
    tensors = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.weight_scale_2": global_scale,
    }
    if algo == "NVFP4":
        tensors[f"{name}.input_scale"] = torch.tensor(0.25)
    return tensors


def pack_fp8(name: str, source: dict[str, Tensor], algo: str) -> dict[str, Tensor]:
    """The tensors of one FP8 linear."""
    weight = source[f"{name}.weight"].float()
    rows = len(weight)
    if algo == "FP8":
        amax = max(source[f"{member}.weight"].float().abs().max() for member in group_of(name))
        scale = (amax / 448).reshape(())
        spread: Tensor = scale
    elif algo == "FP8_PER_CHANNEL_PER_TOKEN":
        scale = weight.abs().amax(1) / 448
        spread = scale.unsqueeze(1)
    elif algo == "FP8_PB_WO":
        blocks = weight.unflatten(1, (-1, 128)).abs().amax(-1).split(128)
        scale = torch.stack([block.amax(0) for block in blocks]) / 448
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
        scale = scale[:, None, :, None]
    else:
        power = (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 448).log2().ceil()
        scale = (power + 127).to(torch.uint8)
        spread = power.exp2().repeat_interleave(32, 1)
    tensors = {f"{name}.weight": (weight / spread).to(torch.float8_e4m3fn)}
    tensors[f"{name}.weight_scale"] = scale.contiguous()
    if algo == "FP8":
        tensors[f"{name}.input_scale"] = torch.tensor(0.01)
    return tensors


@dataclass
class Draft:
    """A checkpoint before it is written; tests damage it, here or after writing."""

    source: dict[str, Tensor]
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    hf_config: dict[str, Any] | None
    shards: int = 2
    weight_map: dict[str, str] = field(default_factory=dict)
    total_size: int | None = None
    tokenizer: bool = True

    def copy(self) -> Draft:
        return Draft(
            dict(self.source),
            dict(self.tensors),
            copy.deepcopy(self.config),
            copy.deepcopy(self.hf_config),
        )

    @property
    def quant(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    def set_ignore(self, names: list[str]) -> None:
        self.quant["ignore"] = names
        self.hf_config["quantization"]["exclude_modules"] = names

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.hf_config is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps(self.hf_config))
        if self.tokenizer:
            (folder / "tokenizer.json").write_text("{}")
        write_tensors(folder, self.tensors, self.shards)

    def edit_index(self, folder: Path, change) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_source(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(source_config()))
    (folder / "tokenizer.json").write_text("{}")
    write_tensors(folder, source_tensors() if tensors is None else tensors, 1)
    return folder


ROUTERS = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]


def draft(
    algo: str = "NVFP4",
    *,
    kv: bool = False,
    source: dict[str, Tensor] | None = None,
    rest: str = "",
) -> Draft:
    """A clean checkpoint: attention and experts quantized, router and head left as they are.

    rest: the algorithm of attention under MIXED_PRECISION, if it is not that of the experts.
    """
    source = source_tensors() if source is None else source
    tensors: dict[str, Tensor] = {}
    linears = {}
    for name, tensor in source.items():
        stem = name.removesuffix(".weight")
        if ".experts." in name or (".self_attn." in name and stem.endswith("_proj")):
            is_rest = bool(rest) and ".self_attn." in name
            tensors.update(pack_fp8(stem, source, rest) if is_rest else pack(stem, source, algo))
            linears[stem] = rest if is_rest else "W4A16_NVFP4"
        else:
            tensors[name] = tensor
        if kv and stem.endswith(("k_proj", "v_proj")):
            tensors[f"{stem}.{stem[-6]}_scale"] = torch.tensor(0.02)
    ignore = ["lm_head", *ROUTERS]
    config = {**source_config(), "quantization_config": flat_config(algo, ignore, kv, linears)}
    return Draft(source, tensors, config, nested_config(algo, ignore, kv, linears))


def flat_config(algo: str, ignore: list[str], kv: bool, linears: dict[str, str]) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    group = {"weights": scheme, "targets": ["Linear"]}
    if algo == "NVFP4":
        group["input_activations"] = dict(scheme)
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algo,
        "config_groups": {"group_0": group},
        "group_size": 16,
        "ignore": ignore,
        "producer": {"name": "test", "version": "1"},
    }
    if kv:
        config["kv_cache_scheme"] = {"type": "float", "num_bits": 8, "dynamic": False}
    if algo == "MIXED_PRECISION":
        del config["config_groups"], config["group_size"]
        config["quantized_layers"] = mixed_layers(linears)
    return config


def nested_config(
    algo: str, ignore: list[str], kv: bool, linears: dict[str, str]
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "quant_algo": algo,
        "group_size": 16,
        "kv_cache_quant_algo": "FP8" if kv else None,
        "exclude_modules": ignore,
    }
    if algo == "MIXED_PRECISION":
        body["quantized_layers"] = mixed_layers(linears)
    return {"producer": {"name": "test", "version": "1"}, "quantization": body}


def mixed_layers(linears: dict[str, str]) -> dict[str, Any]:
    return {
        name: {"quant_algo": algo} | ({"group_size": 16} if "NVFP4" in algo else {})
        for name, algo in linears.items()
    }
