# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with the names and shapes of DeepSeek-V3, in a sparse file: a header and a hole."""

from __future__ import annotations

from pathlib import Path

from transformers import DeepseekV3Config

from fourfold.storage.safetensors_header import build_header, nbytes_of

Shapes = dict[str, tuple[int, ...]]


def config() -> DeepseekV3Config:
    return DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"])


def tensors(config: DeepseekV3Config) -> Shapes:
    hidden = config.hidden_size
    found: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in (_attention(config) | _mlp(config, layer)).items()
        }
        if layer >= config.first_k_dense_replace:
            bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            found[bias] = (config.n_routed_experts,)
    return found


def _attention(config: DeepseekV3Config) -> Shapes:
    hidden, heads = config.hidden_size, config.num_attention_heads
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    return {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_a_proj": (config.q_lora_rank, hidden),
        "self_attn.q_a_layernorm": (config.q_lora_rank,),
        "self_attn.q_b_proj": (heads * key, config.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        "self_attn.kv_a_layernorm": (config.kv_lora_rank,),
        "self_attn.kv_b_proj": (
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            config.kv_lora_rank,
        ),
        "self_attn.o_proj": (hidden, heads * config.v_head_dim),
    }


def _mlp(config: DeepseekV3Config, layer: int) -> Shapes:
    if layer < config.first_k_dense_replace:
        return _gated("mlp", config.intermediate_size, config.hidden_size)
    width = config.moe_intermediate_size
    found: Shapes = {"mlp.gate": (config.n_routed_experts, config.hidden_size)}
    found |= _gated("mlp.shared_experts", width * config.n_shared_experts, config.hidden_size)
    for expert in range(config.n_routed_experts):
        found |= _gated(f"mlp.experts.{expert}", width, config.hidden_size)
    return found


def _gated(name: str, width: int, hidden: int) -> Shapes:
    return {
        f"{name}.gate_proj": (width, hidden),
        f"{name}.up_proj": (width, hidden),
        f"{name}.down_proj": (hidden, width),
    }


def write_with_hole(file: Path, shapes: Shapes) -> None:
    specs = {name: ("BF16", shape) for name, shape in shapes.items()}
    header, _ = build_header(specs, {})
    with file.open("wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + sum(nbytes_of(*spec) for spec in specs.values()))
