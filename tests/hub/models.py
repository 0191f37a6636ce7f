# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of forty shards, cut as published ones are: layers in order, at any tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

HIDDEN, WIDTH, HEAD, VOCABULARY = 128, 64, 32, 512
SHARDS = 40


def write_forty(folder: Path, *, layers: int = 8, experts: int = 32, fp8: bool = False) -> None:
    """Write such a checkpoint: about 14 MB, with the embedding first and the head last.

    With `fp8`, linear weights are in FP8 with scales of blocks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD,
        num_experts=experts,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        shapes |= _layer(f"model.layers.{number}", experts)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) / 20 + (len(shape) == 1)).bfloat16()
        for name, shape in shapes.items()
    }
    if fp8:
        tensors = dict(pair for name, tensor in tensors.items() for pair in _in_fp8(name, tensor))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps(config))
    weight_map, position = {}, 0
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    total = sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        number = min(position * SHARDS // total, SHARDS - 1)
        shards[number][name] = tensor
        weight_map[name] = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        position += tensor.nbytes
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _in_fp8(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or what it is in FP8 if it is a linear layer's."""
    if not name.endswith("_proj.weight"):
        yield name, tensor
        return
    yield name, (tensor.float() * 64).to(torch.float8_e4m3fn)
    blocks = (-(-size // 128) for size in tensor.shape)
    yield f"{name}_scale_inv", torch.full(tuple(blocks), 1 / 64)


def _layer(layer: str, experts: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (4 * HEAD, HIDDEN),
        "self_attn.k_proj": (2 * HEAD, HIDDEN),
        "self_attn.v_proj": (2 * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 4 * HEAD),
        "self_attn.q_norm": (HEAD,),
        "self_attn.k_norm": (HEAD,),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate": (experts, HIDDEN),
    }
    for expert in range(experts):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (WIDTH, HIDDEN)
        shapes[f"mlp.experts.{expert}.up_proj"] = (WIDTH, HIDDEN)
        shapes[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, WIDTH)
    return {f"{layer}.{name}.weight": shape for name, shape in shapes.items()}
