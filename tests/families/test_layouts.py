# SPDX-License-Identifier: Apache-2.0
"""Proves that the checkpoints have upstream's names, and the truth the right matrices.

Every pattern by which transformers' loader recognizes upstream's keys is used by the family's
checkpoint (so no key merely repeats a name in memory); one expert's key of each layout is pinned;
and the experts' outputs follow from the logical matrices.
"""

from __future__ import annotations

import pytest
import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from . import FAMILIES, build_model, mostly_slow, quiet, read_back
from .truth import experts_of

LOADABLE = [f.name for f in FAMILIES.values() if f.why_not is None and f.load_error is None]

# Patterns for other checkpoints: per expert where upstream is fused, FP8 scales, other prefixes.
OTHER_LAYOUTS = {
    "qwen3_5_moe": {"mlp.experts.*.down_proj.weight", "mlp.experts.*.gate_proj.weight"},
    "qwen3_5_moe_vl": {"mlp.experts.*.down_proj.weight", "mlp.experts.*.gate_proj.weight"},
    "qwen3_5_moe_text": {"mlp.experts.*.down_proj.weight", "mlp.experts.*.gate_proj.weight"},
    "qwen3_5_moe_unnamed": {"mlp.experts.*.down_proj.weight", "mlp.experts.*.gate_proj.weight"},
    "inkling2": {r"mlp\.experts\.w13_weight_scale", r"mlp\.experts\.w2_weight_scale"},
    "step3p7": {r"\.moe\.down_proj\.weight_scale_inv"},
    "minimax_m2": {".block_sparse_moe.e_score_correction_bias"},  # a rule before it has the same
}

# Projection -> key of expert 1 in layer 1 or 2 (or of all experts, where they are stacked).
KEYS = {
    "deepseek_v3": "model.layers.2.mlp.experts.1.up_proj.weight",
    "deepseek_v3_mtp": "model.layers.3.mlp.experts.1.up_proj.weight",
    "deepseek_v4": "layers.2.ffn.experts.1.w3.weight",
    "dots3_note": "model.layers.2.mlp.experts.1.up_proj.weight",
    "ernie4_5_vl_moe": "model.layers.2.mlp.experts.7.up_proj.weight",
    "gemma4": "model.language_model.layers.2.experts.gate_up_proj",
    "glm4v_moe": "model.language_model.layers.2.mlp.experts.1.up_proj.weight",
    "gpt_oss": "model.layers.2.mlp.experts.gate_up_proj",
    "granitemoe": "model.layers.2.block_sparse_moe.input_linear.weight",
    "aria": "language_model.model.layers.2.mlp.experts.fc1.weight",
    "inkling": "model.llm.layers.2.mlp.experts.w13_weight",
    "jamba": "model.layers.1.feed_forward.experts.1.up_proj.weight",
    "kimi_linear": "model.layers.2.block_sparse_moe.experts.1.w3.weight",
    "lfm2_moe": "model.layers.2.feed_forward.experts.1.w3.weight",
    "llama4": "language_model.model.layers.1.feed_forward.experts.gate_up_proj",
    "minimax_m3_vl": "language_model.model.layers.2.block_sparse_moe.experts.1.w3.weight",
    "mixtral": "model.layers.2.block_sparse_moe.experts.1.w3.weight",
    "nemotron_h": "backbone.layers.1.mixer.experts.1.up_proj.weight",
    "qwen3_5_moe_vl": "model.language_model.layers.2.mlp.experts.gate_up_proj",
    "qwen3_moe": "model.layers.2.mlp.experts.1.up_proj.weight",
    "qwen3_omni_moe": "thinker.model.layers.2.mlp.experts.1.up_proj.weight",
    "qwen3_vl_moe": "model.language_model.layers.2.mlp.experts.gate_up_proj",
    "step3p7": "model.layers.2.moe.up_proj.weight",
}


@pytest.mark.parametrize("name", mostly_slow(LOADABLE, *OTHER_LAYOUTS))
def test_every_upstream_pattern_is_used(name, written):
    model, _ = read_back(FAMILIES[name], written(name)[0])
    used = {tuple(rule.source_patterns) for rule in model._weight_conversions or []}
    with quiet():
        rules = get_model_conversion_mapping(model, add_legacy=False)
    unused = {
        rule.source_patterns[0]
        for rule in rules
        if tuple(rule.source_patterns) not in used and type(rule).__name__ != "PrefixChange"
    }
    assert unused == OTHER_LAYOUTS.get(name, set())


@pytest.mark.parametrize("name", mostly_slow(KEYS))
def test_expert_key(name, written):
    _, truth = written(name)
    assert KEYS[name] in truth.raw


@pytest.mark.parametrize("name", mostly_slow(LOADABLE))
def test_experts_output_follows_from_the_matrices(name):
    model = build_model(FAMILIES[name], dtype=torch.float32)
    for path, matrices in experts_of(model).items():
        module = model.get_submodule(path)
        if not hasattr(module, "has_post_expert_norm"):
            continue  # not decorated: called in other ways
        expert = {projection: stack[2] for projection, stack in matrices.items()}
        shape = (3, expert["up"].shape[1])
        x_TH = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = module(x_TH, torch.full((3, 1), 2), torch.ones(3, 1))
            expected = _one_expert(module, expert, x_TH)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _one_expert(module, expert, x_TH):
    """The output of expert 2 by its matrices, the module's own gate and its biases."""
    up = x_TH @ expert["up"].T
    if module.has_gate:
        gate = x_TH @ expert["gate"].T
        pair = (gate, up)
        both = torch.cat(pair, -1) if module.is_concatenated else torch.stack(pair, -1).flatten(-2)
        inner = module._apply_gate(both + (module.gate_up_proj_bias[2] if module.has_bias else 0))
    else:
        inner = module.act_fn(up)
    out = inner @ expert["down"].T + (module.down_proj_bias[2] if module.has_bias else 0)
    return module.post_expert_norm(out) if module.has_post_expert_norm else out
