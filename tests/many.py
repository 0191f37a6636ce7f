# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of very many small tensors: experts by the thousand, each in tensors of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from transformers import Qwen3MoeConfig

from fourfold.storage.safetensors_header import build_header, nbytes_of

Spec = tuple[str, tuple[int, ...]]

HIDDEN, WIDTH, HEAD, VOCABULARY = 32, 16, 16, 64


def write_many(folder: Path, *, layers: int, experts: int, per_shard: int = 8) -> int:
    """Write such a checkpoint, `per_shard` layers in a file; returns how many tensors it has."""
    folder.mkdir(parents=True, exist_ok=True)
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        num_experts=experts,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    shell: dict[str, Spec] = {
        "model.embed_tokens.weight": ("BF16", (VOCABULARY, HIDDEN)),
        "model.norm.weight": ("BF16", (HIDDEN,)),
        "lm_head.weight": ("BF16", (VOCABULARY, HIDDEN)),
    }
    parts = [shell]
    for begin in range(0, layers, per_shard):
        numbers = range(begin, min(begin + per_shard, layers))
        parts.append({name: spec for n in numbers for name, spec in _layer(n, experts).items()})
    weight_map = {}
    for number, tensors in enumerate(parts):
        name = f"model-{number:05d}.safetensors"
        _write_shard(folder / name, tensors, number)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(weight_map)


def _layer(number: int, experts: int) -> dict[str, Spec]:
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (2 * HEAD, HIDDEN),
        "self_attn.k_proj": (HEAD, HIDDEN),
        "self_attn.v_proj": (HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 2 * HEAD),
        "self_attn.q_norm": (HEAD,),
        "self_attn.k_norm": (HEAD,),
        "mlp.gate": (experts, HIDDEN),
    }
    for expert in range(experts):
        found[f"mlp.experts.{expert}.gate_proj"] = (WIDTH, HIDDEN)
        found[f"mlp.experts.{expert}.up_proj"] = (WIDTH, HIDDEN)
        found[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, WIDTH)
    return {f"model.layers.{number}.{name}.weight": ("BF16", s) for name, s in found.items()}


def _write_shard(file: Path, tensors: dict[str, Spec], seed: int) -> None:
    """Random values of magnitude 2⁻³…2¹: bfloat16 is written as its bits."""
    header, _ = build_header(tensors, {"format": "pt"})
    count = sum(nbytes_of(*spec) for spec in tensors.values()) // 2
    bits = np.random.default_rng(seed).integers(0, 1 << 16, count, dtype=np.uint16)
    bits = (bits & 0x81FF) | 0x3E00
    file.write_bytes(header + bits.tobytes())
