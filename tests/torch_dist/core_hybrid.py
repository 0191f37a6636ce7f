# SPDX-License-Identifier: Apache-2.0
"""Builds megatron-core's Mamba hybrids, as Nemotron-H is one, of a tiny Hugging Face configuration.

Megatron's own modules hold, compute and save the weights. Only the kernels that no CPU has are
written here by their definitions (`core_patches.py`), and norms that Transformer Engine fuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import core_patches as patches  # first: Megatron asks for CUDA when it is imported

# isort: split
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm import mamba_block
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}

mamba_block.TENorm = patches.Norm
moe_layer.HAVE_TE = True
moe_layer.TELinear = patches.Duplicated


class NormColumn(ColumnParallelLinear):
    """A linear layer with the norm before it inside, named as Transformer Engine's."""

    def __init__(self, input_size: int, *args: Any, config: Any, **options: Any) -> None:
        super().__init__(input_size, *args, config=config, **options)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        normed = nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **options)


def settings(hf: dict[str, Any]) -> dict[str, Any]:
    """What Megatron's configuration says of a hybrid beyond what it says of any model."""
    return {
        "layernorm_epsilon": hf["layer_norm_epsilon"],
        "gated_linear_unit": False,
        "activation_func": squared_relu,
        "qk_layernorm": False,
        "mamba_state_dim": hf["ssm_state_size"],
        "mamba_head_dim": hf["mamba_head_dim"],
        "mamba_num_groups": hf["n_groups"],
        "mamba_num_heads": hf["mamba_num_heads"],
        "use_mamba_mem_eff_path": False,
        "is_hybrid_model": True,
        "moe_latent_size": hf["moe_latent_size"],
        "moe_shared_expert_intermediate_size": hf["moe_shared_expert_intermediate_size"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
    }


def build(config: Any, hf: dict[str, Any], options: dict[str, Any]) -> Any:
    """This rank's part of the model, in evaluation mode."""
    return MambaModel(
        config=config,
        mamba_stack_spec=ModuleSpec(
            module=MambaStack, submodules=_layers(config, fused=options.get("fused", False))
        ),
        vocab_size=hf["vocab_size"] + options.get("padding", 0),
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        hybrid_override_pattern="".join(LETTERS[kind] for kind in hf["layers_block_type"]),
        parallel_output=False,
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    ).eval()


def _layers(config: Any, *, fused: bool) -> MambaStackSubmodules:
    """The specs of the four kinds of layers. fused: norms are inside of the linear layers."""
    norm = IdentityOp if fused else patches.Norm
    column = NormColumn if fused else ColumnParallelLinear
    mixer = MambaMixerSubmodules(in_proj=column, out_proj=RowParallelLinear)
    attention = SelfAttentionSubmodules(
        linear_qkv=column, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=column, linear_fc2=RowParallelLinear)
    moe = get_moe_module_spec(
        use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False
    )
    if config.moe_grouped_gemm:
        grouped = MLPSubmodules(linear_fc1=patches.GroupedColumn, linear_fc2=patches.GroupedRow)
        moe.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
    mamba_layer = MambaLayerSubmodules(
        norm=norm,
        mixer=ModuleSpec(module=MambaMixer, submodules=mixer),
        mamba_bda=get_bias_dropout_add,
    )
    attention_layer = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=attention,
        ),
        self_attn_bda=get_bias_dropout_add,
    )
    mlp_layer = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
    )
    moe_parts = TransformerLayerSubmodules(
        pre_mlp_layernorm=patches.Norm, mlp=moe, mlp_bda=get_bias_dropout_add
    )
    return MambaStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba_layer),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention_layer),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp_layer),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=moe_parts),
    )
