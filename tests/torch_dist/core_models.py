# SPDX-License-Identifier: Apache-2.0
"""Builds, runs and saves megatron-core's models of a tiny Hugging Face configuration."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import core_hybrid as hybrid  # first: Megatron asks for CUDA when it is imported
from . import core_patches as patches

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


@dataclass(frozen=True)
class Ranks:
    """How a model is spread: tensor, pipeline, expert and experts' tensor parallel sizes, replicas
    and chunks of a stage."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    vp: int = 1

    @property
    def world(self) -> int:
        return max(self.tp, self.ep * self.etp) * self.pp * self.dp


def start(ranks: Ranks, rank: int, store: Path) -> None:
    """Join the other ranks."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks.world
    )
    parallel_state.initialize_model_parallel(
        ranks.tp,
        ranks.pp,
        ranks.vp if ranks.vp > 1 else None,
        expert_model_parallel_size=ranks.ep,
        expert_tensor_parallel_size=ranks.etp,
    )


def stop() -> None:
    """Leave the other ranks, so that another job can start."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def megatron_config(hf: dict[str, Any], ranks: Ranks, options: dict[str, Any]) -> Any:
    """Megatron's configuration of the model that `hf` configures."""
    family = hf["model_type"]
    heads = hf["num_attention_heads"]
    values: dict[str, Any] = {
        "num_layers": hf.get("num_hidden_layers") or len(hf["layers_block_type"]),
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf.get("intermediate_size") or 4 * hf["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads", heads),
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.get("rms_norm_eps"),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": ranks.tp,
        "pipeline_model_parallel_size": ranks.pp,
        "expert_model_parallel_size": ranks.ep,
        "expert_tensor_parallel_size": ranks.etp,
        "virtual_pipeline_model_parallel_size": ranks.vp if ranks.vp > 1 else None,
        "qk_layernorm": family != "mixtral",
    }
    if options.get("mtp"):
        values["mtp_num_layers"] = 1
    experts = hf.get("num_experts") or hf.get("n_routed_experts") or hf.get("num_local_experts")
    if experts:
        values |= _moe(hf, experts, options)
    if family == "qwen3_5_moe_text":
        values |= _hybrid(hf)
    if family == "nemotron_h":
        values |= hybrid.settings(hf)
    if family != "deepseek_v3":
        return TransformerConfig(**values)
    del values["num_query_groups"], values["kv_channels"]
    return MLATransformerConfig(**values, **_latent(hf))


def _moe(hf: dict[str, Any], experts: int, options: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_moe_experts": experts,
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf.get("moe_intermediate_size") or hf["intermediate_size"],
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": options.get("grouped", False),
    }
    values |= {
        name: options[name]
        for name in ("moe_layer_freq", "moe_router_pre_softmax")
        if name in options
    }
    if hf.get("n_shared_experts"):
        values["moe_shared_expert_intermediate_size"] = (
            hf["n_shared_experts"] * hf["moe_intermediate_size"]
        )
    if hf.get("shared_expert_intermediate_size"):
        values["moe_shared_expert_intermediate_size"] = hf["shared_expert_intermediate_size"]
        values["moe_shared_expert_gate"] = True
    return values


def _hybrid(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "layernorm_zero_centered_gamma": True,
        "attention_output_gate": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(x == "linear_attention") for x in hf["layer_types"]],
        "linear_conv_kernel_dim": hf["linear_conv_kernel_dim"],
        "linear_key_head_dim": hf["linear_key_head_dim"],
        "linear_value_head_dim": hf["linear_value_head_dim"],
        "linear_num_key_heads": hf["linear_num_key_heads"],
        "linear_num_value_heads": hf["linear_num_value_heads"],
        "deterministic_mode": True,
    }


def _latent(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "q_lora_rank": hf["q_lora_rank"],
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "rope_type": "rope",
        "rotary_base": hf["rope_parameters"]["rope_theta"],
        "multi_latent_attention": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": hf["n_group"],
        "moe_router_group_topk": hf["topk_group"],
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
    }


def build(hf: dict[str, Any], ranks: Ranks, options: dict[str, Any], stage: int = 0) -> Any:
    """This rank's part of the model, in evaluation mode. stage: which of its chunks."""
    config = megatron_config(hf, ranks, options)
    torch.manual_seed(0)
    if hf["model_type"] == "nemotron_h":
        return hybrid.build(config, hf, options)
    rope = hf["rope_parameters"]
    place = {"ignore_virtual": False, "vp_stage": stage}
    return GPTModel(
        config=config,
        transformer_layer_spec=_layers(config, stage),
        vocab_size=hf["vocab_size"] + options.get("padding", 0),
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        parallel_output=False,
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        mtp_block_spec=_mtp(config),
        vp_stage=stage if ranks.vp > 1 else None,
    ).eval()


def _mtp(config: Any) -> Any:
    """The spec of a layer that predicts one more token; on the last stage alone."""
    if not config.mtp_num_layers:
        return None
    is_moe = bool(config.num_moe_experts)
    spec = specs.get_gpt_mtp_block_spec(
        config, _layer(config, is_moe, is_linear=False), use_transformer_engine=False
    )
    for each in spec.layer_specs if spec is not None else ():
        parts = each.submodules
        parts.enorm = parts.hnorm = parts.layer_norm = patches.Norm
    return spec


def _layers(config: Any, stage: int) -> TransformerBlockSubmodules:
    """The specs of this stage's layers, those of one chunk."""
    pattern = [1] * config.num_layers
    if isinstance(config.moe_layer_freq, list):
        pattern = config.moe_layer_freq
    linear = config.linear_attention_freq or [0] * config.num_layers
    chunk = stage if config.virtual_pipeline_model_parallel_size else None
    first = specs.get_transformer_layer_offset(config, vp_stage=chunk)
    count = specs.get_num_layers_to_build(config, vp_stage=chunk)
    found = [
        _layer(config, bool(config.num_moe_experts) and bool(pattern[n]), bool(linear[n]))
        for n in range(first, first + count)
    ]
    return TransformerBlockSubmodules(layer_specs=found, layer_norm=patches.Norm)


def _layer(config: Any, is_moe: bool, is_linear: bool) -> ModuleSpec:
    spec = specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = patches.Norm
    attention = parts.self_attention.submodules
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if config.qk_layernorm and hasattr(attention, name):
            setattr(attention, name, patches.Norm)
    if config.multi_latent_attention:
        attention.core_attention = patches.CoreAttention
    if is_linear:
        parts.self_attention = ModuleSpec(
            module=GatedDeltaNet,
            submodules=GatedDeltaNetSubmodules(
                in_proj=ColumnParallelLinear, out_norm=patches.Norm, out_proj=RowParallelLinear
            ),
        )
    if is_moe and config.moe_grouped_gemm:
        parts.mlp.submodules.experts = ModuleSpec(
            module=TEGroupedMLP,
            submodules=MLPSubmodules(
                linear_fc1=patches.GroupedColumn, linear_fc2=patches.GroupedRow
            ),
        )
    return spec


@torch.no_grad()
def randomize(model: Any) -> None:
    """Draw values for every parameter and router bias of a model on one rank."""
    for number, (name, value) in enumerate(sorted(model.named_parameters())):
        draw = torch.Generator().manual_seed(number)
        noise = torch.randn(value.shape, generator=draw)
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1
        middle = value if "norm" in name or name.endswith(".D") else torch.zeros(())
        value.copy_(middle + scale * noise)
    for name, value in model.named_buffers():
        if name.endswith("expert_bias"):
            value.copy_(torch.linspace(-0.2, 0.2, value.numel()))


RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
}
"""Fields of Megatron's configuration that have other names in its training script."""


def training_arguments(model: Any, hf: dict[str, Any]) -> Namespace:
    """What Megatron's training script would keep of a model: the model's own configuration, under
    the script's names, and what it gives to `GPTModel` beside that."""
    config, rope = model.config, hf.get("rope_parameters", {})
    named = {RENAMED.get(each.name, each.name): each.name for each in fields(config)}
    plain = (int, float, str, list, type(None), torch.dtype)
    values = {name: getattr(config, field) for name, field in named.items()}
    values = {name: value for name, value in values.items() if isinstance(value, plain)}
    beside = {
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "position_embedding_type": model.position_embedding_type,
        "rotary_base": int(rope.get("rope_theta", 10000)),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "max_position_embeddings": hf["max_position_embeddings"],
        "untie_embeddings_and_output_weights": not model.share_embeddings_and_output_weights,
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": model.vocab_size,
        "squared_relu": config.activation_func is squared_relu,
        "hybrid_override_pattern": getattr(model, "hybrid_override_pattern", None),
    }
    return Namespace(**(values | beside))


METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


def save(model: Any, folder: Path, options: dict[str, Any], args: Any = None) -> None:
    """Save this rank's part, beside the others'."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.sharded_state_dict(metadata=_metadata(options))
    if args is not None:
        state = {**state, "args": args, "iteration": 7}
    dist_checkpointing.save(state, str(folder))


def load(model: Any, folder: Path, options: dict[str, Any]) -> None:
    """Fill this rank's part, or its chunks, from a checkpoint of any sharding."""
    chunks = model if isinstance(model, list) else [model]
    metadata = _metadata(options)
    state = {str(n): chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(state, str(folder))
    for number, chunk in enumerate(chunks):
        values = loaded[str(number)].items()
        missing, unexpected = chunk.load_state_dict(
            {key: value for key, value in values if "_extra_state" not in key}, strict=False
        )
        wrong = [key for key in (*missing, *unexpected) if "_extra_state" not in key]
        assert not wrong, wrong


def _metadata(options: dict[str, Any]) -> dict[str, Any]:
    found = {}
    if options.get("singleton"):
        found["singleton_local_shards"] = True
    return found


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, hidden: int) -> torch.Tensor | None:
    """The model's logits of a batch, on the last stage; None on the others."""
    count, has_mtp = model.config.mtp_num_layers, getattr(model, "mtp_process", False)
    model.config.mtp_num_layers, model.mtp_process = None, False
    out = _forward(model, ids, hidden)
    model.config.mtp_num_layers, model.mtp_process = count, has_mtp
    return out


@torch.no_grad()
def mtp_states(model: Any, ids: torch.Tensor, hidden: int) -> torch.Tensor | None:
    """The MTP layer's output for a batch, [batch, length, hidden], on the rank that has it."""
    found: list[torch.Tensor] = []
    if model.mtp_process:
        model.mtp.register_forward_hook(lambda _, __, out: found.append(out.chunk(2)[1]))
    _forward(model, ids, hidden, labels=ids)
    return found[0].transpose(0, 1) if found else None


def _forward(model: Any, ids: torch.Tensor, hidden: int, **options: Any) -> torch.Tensor | None:
    """Run a batch through all stages; return the last one's output, None on the others."""
    length = ids.shape[1]
    positions = torch.arange(length).expand_as(ids)
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    if not model.pre_process:
        before = torch.empty(length, ids.shape[0], hidden)
        dist.recv(before, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(before)
    out = model(ids, positions, mask, **options)
    if not model.post_process:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return out
