# SPDX-License-Identifier: Apache-2.0
"""Linear layers that engines fuse into one module, and those that they never build quantized.

This is all data, read from vLLM 0.33.0, SGLang 0.5.23 and the public TensorRT-LLM source. Layers
that an engine fuses need one global scale and one decision: all are quantized, or none is. What
engines do in one family alone is in `peculiarities`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fourfold.models.families import Engine


@dataclass(frozen=True, slots=True)
class FusedModule:
    """Sibling linear layers that an engine loads into one module."""

    parts: tuple[str, ...]
    names: tuple[str, ...]
    """Last names of the module in the engines, in place of a part's name."""
    optional: tuple[str, ...] = ()
    """Parts that some layers lack (Gemma 4's full attention uses k_proj as v_proj)."""
    elsewhere: Mapping[Engine, tuple[str, ...]] = field(default_factory=dict)
    """Names in engines that do not use `names`."""

    def called(self, engine: Engine) -> tuple[str, ...]:
        """Return the last names that `engine` may give the module."""
        return self.elsewhere.get(engine, self.names)


FUSED_MODULES: tuple[FusedModule, ...] = (
    FusedModule(("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"), ("in_proj_qkvgfab",)),
    FusedModule(("wq_du", "wk_dv", "wv_dv", "wr_du"), ("qkvr",)),
    FusedModule(("q_proj", "k_proj", "v_proj"), ("qkv_proj",), optional=("v_proj",)),
    FusedModule(
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("fused_qkv_a_proj",),
        elsewhere={
            Engine.SGLANG: ("fused_qkv_a_proj_with_mqa",),
            Engine.TRTLLM: ("kv_a_proj_with_mqa",),
        },
    ),
    FusedModule(("in_proj_qkv", "in_proj_z"), ("in_proj_qkvz",)),
    FusedModule(("in_proj_b", "in_proj_a"), ("in_proj_ba",)),
    FusedModule(("wq_a", "wkv"), ("fused_wqa_wkv",)),
    FusedModule(("gate_proj", "up_proj"), ("gate_up_proj",)),
    FusedModule(("w1", "w3"), ("gate_up_proj", "w13")),
)
"""Applied to siblings, in this order; a linear belongs to the first that has all its parts."""

KEEP_ALWAYS: Mapping[str, str] = {
    r"\.indexer\.(wk|weights_proj|k_proj)$": (
        "the sparse-attention indexer's key and weights are one unquantized linear in vLLM "
        "(DeepSeek-V3.2, GLM-MoE-DSA, HY-V4; weights_proj in DeepSeek-V4)"
    ),
    r"\.compressor\.(wkv|wgate|kv_proj|gate_proj)$": (
        "DeepSeek-V4's compressor is built unquantized in vLLM"
    ),
    r"\.input_mix_weight_(down|up)$|\.block_inject_weight$": (
        "Qwen4-Exp's residual mixing is built unquantized in vLLM"
    ),
    r"\.(self_attention_res_proj|mlp_res_proj|output_attn_res_proj)$": (
        "Kimi's residual projections are built unquantized in vLLM and SGLang"
    ),
    r"\.shared_experts\.shared_w(13|2)(_weight)?$": (
        "Inkling's shared sink experts run in BF16 in vLLM"
    ),
    r"\.conv1d$|\.(q|k|v)_conv1d$": (
        "a depthwise convolution, which engines load as a narrow linear"
    ),
    r"\.(kv_b_proj|wkv_b)$": (
        "MLA absorbs it into queries and outputs: vLLM needs its values, not NVFP4"
    ),
    r"\.mamba\.dt_proj$": (
        "Mamba's time step: its weight is used without its layer, so nothing rounds its inputs"
    ),
    r"\.shared_expert_gate$": "a router with one output: vLLM and SGLang build it unquantized",
}
"""Regex over the raw module name → why engines build these layers unquantized whatever the
checkpoint says."""


def fuse(
    last_names: Iterable[str], of_family: Iterable[FusedModule] = ()
) -> list[tuple[FusedModule, tuple[str, ...]]]:
    """Group sibling linear layers, given by their last names, as engines fuse them.

    Each fused module comes with its siblings; siblings that are not fused are left out. The fused
    modules of a family go before those of all.
    """
    left, fused = set(last_names), []
    for module in (*of_family, *FUSED_MODULES):
        if left.issuperset(set(module.parts) - set(module.optional)):
            parts = tuple(part for part in module.parts if part in left)
            left.difference_update(parts)
            fused.append((module, parts))
    return fused


def kept_because(name: str) -> str | None:
    """Return why the linear layer `name` is never quantized, or None if it may be."""
    return next((why for pattern, why in KEEP_ALWAYS.items() if re.search(pattern, name)), None)
