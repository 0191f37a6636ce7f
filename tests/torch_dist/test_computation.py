# SPDX-License-Identifier: Apache-2.0
"""Training arguments that say how a model computes are compared with the configuration."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourfold

from .conftest import FAMILY
from .test_source import W4A16, refused

YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }
}
LATENT = {"multi_latent_attention": True, "rope_type": "yarn", "rotary_scaling_factor": 4.0}
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
GROUPED = {
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_topk_scaling_factor": 2.5,
}
HYBRID = "nemotron_h"
MAMBA = {
    "hybrid_override_pattern": "ME*-",
    "position_embedding_type": "none",
    "rotary_base": 77,  # of no use without rotary embeddings
    "mamba_state_dim": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_num_heads": 8,
    "moe_latent_size": None,
    "norm_epsilon": 1e-5,
    "swiglu": False,
    "squared_relu": True,
    "num_experts": 4,
    "moe_router_score_function": "sigmoid",
}
OLDER = {"layers_block_type": None, "hybrid_override_pattern": "ME*-", "num_hidden_layers": 4}
"""The layers of Nemotron-H as published configurations have them."""


def configured(hf: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """The Hugging Face folder, with changes in its configuration."""
    folder.mkdir()
    config = json.loads((hf / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "arguments", "words"),
    [
        (FAMILY, {}, {"swiglu": True}, None),
        (FAMILY, {}, {"swiglu": False}, "swiglu is False"),
        (FAMILY, {"hidden_act": "gelu"}, {"swiglu": True}, "hidden_act gelu"),
        ("deepseek_v3", {}, {"squared_relu": True}, "squared_relu is True"),
        (FAMILY, {}, {"window_size": None}, None),
        (FAMILY, {}, {"window_size": (128, 0)}, "window_size is (128, 0)"),
        ("mixtral", {"sliding_window": 16}, {"window_size": None}, "sliding_window 16"),
        ("mixtral", {"sliding_window": 16}, {"window_size": (15, 0)}, None),
        ("mixtral", {"sliding_window": 16}, {"window_size": (16, 0)}, None),
        ("mixtral", {"sliding_window": 16}, {"window_size": (32, 0)}, "sliding_window 16"),
        ("deepseek_v3", YARN, LATENT | {"mscale": 1.0}, None),
        ("deepseek_v3", YARN, LATENT | {"rotary_scaling_factor": 40}, "factor 4.0"),
        ("deepseek_v3", YARN, LATENT | {"beta_fast": 16}, "beta_fast 32"),
        ("deepseek_v3", YARN, LATENT | {"mscale_all_dim": 0.707}, "mscale_all_dim 1.0"),
        ("deepseek_v3", YARN, LATENT | {"rope_type": "rope"}, "rope_type yarn"),
        ("deepseek_v3", YARN, LATENT | {"rotary_scaling_factor": 1.0}, "rope_type yarn"),
        ("deepseek_v3", {}, LATENT, "rope_type default"),
        ("deepseek_v3", {}, LATENT | {"rotary_scaling_factor": 1.0}, None),
        (FAMILY, {}, {"position_embedding_type": "rope", "use_rope_scaling": True}, "default"),
        ("deepseek_v3", GROUPS, GROUPED, None),
        ("deepseek_v3", GROUPS, GROUPED | {"moe_router_num_groups": None}, "n_group 2"),
        ("deepseek_v3", GROUPS, GROUPED | {"moe_router_group_topk": 2}, "topk_group 1"),
        (
            "deepseek_v3",
            GROUPS,
            GROUPED | {"moe_router_topk_scaling_factor": None},
            "routed_scaling_factor 2.5",
        ),
        (
            "deepseek_v3",
            GROUPS,
            GROUPED | {"moe_router_score_function": "softmax"},
            "moe_router_score_function is 'softmax'",
        ),
        ("deepseek_v3", {"norm_topk_prob": False}, GROUPED, "norm_topk_prob False"),
        (HYBRID, {}, MAMBA, None),
        (HYBRID, {}, MAMBA | {"hybrid_override_pattern": "MEM-"}, "ME*- (layers_block_type)"),
        (HYBRID, {}, MAMBA | {"hybrid_layer_pattern": "ME|*-/*E"}, None),
        (HYBRID, OLDER, MAMBA, None),
        (HYBRID, OLDER, MAMBA | {"hybrid_override_pattern": "MEM-"}, "ME*- (layers_block_type)"),
        (HYBRID, {}, MAMBA | {"position_embedding_type": "rope"}, "a family without them"),
        (HYBRID, {}, MAMBA | {"mamba_state_dim": 128}, "ssm_state_size 16"),
        (HYBRID, {}, MAMBA | {"mamba_head_dim": 32}, "mamba_head_dim 16"),
        (HYBRID, {}, MAMBA | {"mamba_num_groups": 8}, "n_groups 2"),
        (HYBRID, {}, MAMBA | {"mamba_num_heads": 4}, "mamba_num_heads 8"),
        (HYBRID, {}, MAMBA | {"moe_latent_size": 32}, "moe_latent_size 0"),
        (HYBRID, {}, MAMBA | {"norm_epsilon": 1e-6}, "norm_epsilon is 1e-06"),
        (HYBRID, {}, MAMBA | {"squared_relu": False}, "mlp_hidden_act relu2"),
        (HYBRID, {}, MAMBA | {"moe_router_score_function": "softmax"}, "is 'softmax'"),
        (HYBRID, {}, MAMBA | {"moe_router_topk_scaling_factor": 2.5}, "routed_scaling_factor 1.0"),
    ],
)
def test_how_a_model_computes_is_compared(
    family: str,
    changes: dict[str, Any],
    arguments: dict[str, Any],
    words: str | None,
    made: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    checkpoint, hf = made(family, common={"args": argparse.Namespace(**arguments)})
    folder = configured(hf, tmp_path / "hf", changes)
    if words is None:
        assert fourfold.plan(checkpoint, W4A16, hf_config=folder)
    else:
        refused(checkpoint, folder, "common.pt", words)
