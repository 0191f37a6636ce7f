# SPDX-License-Identifier: Apache-2.0
"""Quantized tiny checkpoints for an engine to load, with what they predict by `fourfold.load`.

    python scripts/engines/vllm/checkpoints.py FOLDER [--families NAME ...] [--recipes NAME ...]

Runs in fourfold's environment. The checkpoints are random and have upstream's layout, as those of
the tests have, in sizes that vLLM's CPU kernels take. FOLDER/FAMILY/RECIPE is an output of
`fourfold quantize`; `reference.safetensors` in it has random tokens and the log-probabilities that
the dequantized model gives after each, in float32; for W4A4, with inputs rounded as engines round
them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import fourfold
from fourfold.config import CalibrationConfig, Runtime
from fourfold.models.families import FAMILIES as NAMED
from fourfold.models.families import Engine
from fourfold.recipes import builtin_names

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

from families import FAMILIES, configs, write_checkpoint
from families.layouts import rename

EXPERTS, DEFAULT, W4A4 = "w4a16_nvfp4_experts_only", "w4a16_nvfp4_default", "nvfp4_experts_only"
RECIPES = (EXPERTS, DEFAULT, W4A4)
MIXED = tuple(name for name in builtin_names() if name.endswith("_rest"))
MIXED_FAMILIES = ("qwen3_5_moe",)
REFUSED = ("afmoe", "aria", "exaone_moe", "gpt_oss", "minimax", "qwen3_omni_moe")
"""Families that vLLM has a model for, which cannot load an output."""

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 128,
    "head_dim": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 64,
    "index_head_dim": 128,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_head_dim": 64,
}
"""Sizes of text models, in place of the tests'."""

ROPE = {"rope_type": "default", "rope_theta": 1e4}
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
DENSE_FIRST = {"first_k_dense_replace": 1}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "axk1": DENSE_FIRST,
    "bailing_hybrid": {
        "architectures": ["BailingMoeV3ForCausalLM"],
        "head_dim": 64,
        "layer_group_size": 3,
        "moe_shared_expert_intermediate_size": 96,
        "no_kda_lora": True,
        "use_bias": False,
    },
    # vLLM's window is one token wider than transformers', and it always ties the embeddings.
    "cohere2_moe": {"sliding_window": 64, "tie_word_embeddings": True},
    "deepseek_v3": NOAUX,
    "deepseek_v32": NOAUX,
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 128},
        "audio_config": {"adapter_out_dim": 128},
    },
    "ernie4_5_vl_moe": {
        "pixel_hidden_size": 32,
        "text_config": {"rope_parameters": {**ROPE, "mrope_section": [6, 6, 4]}},
        "vision_config": {"text_hidden_size": 128, "embed_dim": 32, "mlp_ratio": 1.5},
    },
    "glm4_moe": {"head_dim": 64},
    "glm4_moe_lite": {**DENSE_FIRST, **NOAUX},
    "glm_moe_dsa": NOAUX,
    "glm4v_moe": {
        "text_config": {
            "head_dim": 64,
            "use_qk_norm": False,
            "rope_parameters": {**ROPE, "mrope_section": [8, 4, 4], "partial_rotary_factor": 0.5},
        }
    },
    "glm5_next": {
        "text_config": {
            **DENSE_FIRST,
            **NOAUX,
            "mhc": True,
            "mla_use_nope": True,
            "indexer_rope_interleave": True,
        }
    },
    "granitemoehybrid": {"mamba_n_heads": 16},
    "hy_v3": {**DENSE_FIRST, "expert_hidden_dim": 96, "route_norm": True, "qk_norm": True},
    "kimi_linear": {
        **DENSE_FIRST,
        "mla_use_nope": True,
        "moe_layer_freq": 1,
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3],
            "num_heads": 4,
            "head_dim": 64,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2_moe": {"tie_word_embeddings": True},  # vLLM ties them whatever the configuration says
    "llama4": {"text_config": {"attention_chunk_size": 128}},
    "longcat_flash": {
        "head_dim": 64,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_type": "identity",
    },
    "mellum": {"num_nextn_predict_layers": 0},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 1],
        "layernorm_epsilon": 1e-5,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,  # twice those of full attention
        "swa_head_dim": 64,
        "swa_v_head_dim": 64,
        "sliding_window": 64,  # as with cohere2_moe
        "sliding_window_size": 64,
        "add_swa_attention_sink_bias": True,
        "rope_theta": 5e6,
        "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {
            "full_attention": {**ROPE, "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {**ROPE, "partial_rotary_factor": 0.5},
        },
    },
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "minimax_m3_vl": {
        "text_config": {
            "hidden_act": "swigluoai",
            "shared_intermediate_size": 48,
            "index_head_dim": 64,
            "moe_layer_freq": [0, 1, 1],
            "sparse_attention_config": {
                "sparse_attention_freq": [0, 1, 1],
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 64,
                "sparse_block_size": 128,
                "sparse_topk_blocks": 16,
                "sparse_init_block": 0,
                "sparse_local_block": 1,
                "sparse_score_type": "max",
            },
        },
        "vision_config": {"img_token_compression_config": {}},
    },
    "mistral4": {"qk_nope_head_dim": 256},
    "nemotron_h": {"sliding_window": None},  # vLLM has none for it
    "phimoe": {
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,  # and no bias of the head, which vLLM leaves out
        "sliding_window": 64,
    },
    "qwen3_5_moe": {
        "text_config": {
            "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.25}
        }
    },
    "qwen3_omni_moe": {"thinker_config": {"vision_config": {"image_size": 64}}},
    "qwen3_vl_moe": {
        "text_config": {
            "norm_topk_prob": True,
            "rope_parameters": {**ROPE, "mrope_section": [16, 8, 8]},
        }
    },
    "qwen4_exp": {
        "vision_config": {"deepstack_visual_indexes": []},
        "text_config": {
            "indexer_head_dim": 64,
            "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.25},
        },
    },
}
"""What single families need besides, over the tests' table: sizes that go with the others, and
entries of published configurations that vLLM reads and transformers does not."""

EDITS = {
    # Published linear attention ends in `o_proj`, and only latent attention in `dense`.
    "bailing_hybrid": rename((r"(layers\.[01]\.attention)\.dense\.", r"\1.o_proj.")),
}
"""Names in which the tests' checkpoints differ from published ones."""

PROMPTS, LENGTH = 4, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+", default=families())
    parser.add_argument("--recipes", nargs="+")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each family")
    options = parser.parse_args()
    for name in options.families:
        recipes = options.recipes or (*RECIPES, *(MIXED if name in MIXED_FAMILIES else ()))
        child = multiprocessing.get_context("fork").Process(
            target=write_family, args=(name, recipes, options.folder / name)
        )
        child.start()
        child.join(options.timeout)
        if child.is_alive():
            child.kill()
            print(f"{name}: no end after {options.timeout:g} s", flush=True)


def families() -> list[str]:
    """The families that vLLM has a model for, each once."""
    return [
        name
        for name, family in FAMILIES.items()
        if family.build_config.args[0] == name
        and name in NAMED
        and (Engine.VLLM in NAMED[name].readers or name in REFUSED)
    ]


def write_family(name: str, recipes: Sequence[str], folder: Path) -> None:
    """Write the family's checkpoint, and an output of each recipe with its reference."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    for recipe in recipes:
        out = folder / recipe
        try:
            if not source.exists():
                write_source(name, source)
            quantize(source, out, recipe)
            refer(out, recipe)
            print(f"{name} {recipe}: written", flush=True)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            print(f"{name} {recipe}: {cause}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{recipe}.json").write_text(json.dumps({"cause": cause}))


def write_source(name: str, folder: Path) -> None:
    """Write the family's checkpoint in the sizes of this script."""
    configs.TEXT |= SIZES
    family = FAMILIES[name]
    model_type = family.build_config.args[0]
    table = configs.OVERRIDES.get(model_type, {})
    configs.OVERRIDES[model_type] = configs._merge(table, OVERRIDES.get(name, {}))
    edits = (*family.edits, EDITS[name]) if name in EDITS else family.edits
    write_checkpoint(replace(family, edits=edits), folder)
    config = json.loads((folder / "config.json").read_text())
    config = configs._merge(config, OVERRIDES.get(name, {}))  # transformers drops what it ignores
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def quantize(source: Path, out: Path, recipe: str) -> None:
    """Quantize, calibrated on random tokens where the recipe observes activations."""
    calib = source / "calib.jsonl"
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 128, (16, LENGTH), generator=generator).tolist()
    calib.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    calibration = CalibrationConfig(calib=[calib], calib_size=16, calib_seq=LENGTH)
    observes = not recipe.startswith("w4a16") or recipe.endswith("-fp8_rest")
    result = fourfold.quantize(
        source,
        out,
        recipe,
        calibration=calibration if observes else None,
        runtime=Runtime(threads=1),
        progress=False,
    )
    assert result.clean, str(result.report)


def refer(out: Path, recipe: str) -> None:
    """Write random tokens, and the log-probabilities that the output gives after each."""
    simulate = not recipe.startswith("w4a16") and "_rest" not in recipe
    model = fourfold.load(out, dtype=torch.float32, simulate_activations=simulate)
    model = getattr(model, "thinker", model)  # the part of Qwen3-Omni that reads text
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 120, (PROMPTS, LENGTH), generator=generator)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None]).logits for row in tokens])
    save_file(
        {"tokens": tokens, "log_probs": logits.float().log_softmax(-1)},
        out / "reference.safetensors",
    )


if __name__ == "__main__":
    main()
