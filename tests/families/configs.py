# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations: sizes common to all families, and what each family needs besides.

A size in `TEXT` or `VISION` is passed only to configuration classes that have a field of that
name, so that one table serves all families. `OVERRIDES` holds the rest, nested like the
configuration itself. Every linear layer's input dimension is divisible by 16, and an expert's
gate/up and down differ in shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Overrides = Mapping[str, Any]

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    # multi-head latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 32,
    "index_n_heads": 2,
    # linear attention
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "moe_topk": 2,
}

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "mlp_dim": 48,
    "mlp_ratio": 2.0,
    "num_hidden_layers": 1,
    "depth": 1,
    "encoder_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "head_dim": 16,
    "image_size": 64,
    "patch_size": 16,
    "out_hidden_size": 64,
    "output_dim": 64,
    "text_hidden_size": 64,
    "adapter_in_dim": 32,
    "adapter_out_dim": 64,
    "adapter_input_size": 32,
    "downsample_hidden_size": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 64,
    "max_position_embeddings": 64,
    "max_source_positions": 64,
    "moe_intermediate_size": 32,
    "num_mel_bins": 16,
}

MLA = {"num_key_value_heads": 4}
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
HYBRID = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}

OVERRIDES: dict[str, Overrides] = {
    "aria": {
        "text_config": {"intermediate_size": 48, "moe_num_shared_experts": 1},
        "vision_config": {},
        "projector_patch_to_query_dict": {16: 4},
    },
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": {**MLA, **HYBRID, "head_dim": 16},
    "beam": {**DENSE_FIRST},
    "cohere2_moe": {"intermediate_size": 48, "mlp_layer_types": ["sparse"] * 3},
    "deepseek_ocr2": {
        "text_config": {**DENSE_FIRST, "num_key_value_heads": 4},
        "vision_config": {
            "sam_config": {
                "output_channels": 16,
                "downsample_channels": [16, 32],
                "global_attn_indexes": [0],
                "window_size": 2,
            },
            "encoder_config": {"vocab_size": 32},
        },
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 16,
        "hc_mult": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "sliding_attention",
        ],
    },
    "diffusion_gemma": {
        "text_config": {
            **SLIDING,
            "top_k_experts": 2,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
        },
        "canvas_length": 8,
    },
    "dots1": {"num_key_value_heads": 4},
    "dots3_note": {
        "text_config": {
            **MLA,
            **DENSE_FIRST,
            "head_dim": 32,
            "shared_experts_intermediate_size": 48,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 32,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        },
        "vision_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "num_hidden_layers": 2,
            "num_local_experts": 4,
        },
        "audio_config": {"feature_size": 16},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [48, 32],
            "moe_num_shared_experts": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [3, 3, 2],
            },
        },
    },
    "exaone_moe": {"sliding_window_pattern": 4},
    "flex_olmo": {"intermediate_size": 48},
    "gemma4": {
        "text_config": {
            **SLIDING,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
            "top_k_experts": 2,
            "global_head_dim": 32,
        },
    },
    "glm4_moe_lite": MLA,
    "glm4v_moe": {"text_config": MROPE, "vision_config": {"intermediate_size": 64}},
    "glm5_next": {
        "text_config": {
            **MLA,
            **DENSE_FIRST,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "index_kpool": 4,
            "hc_mult": 2,
            "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        },
        "vision_config": {"projection_intermediate_size": 48},
    },
    "glm_moe_dsa": MLA,
    "gpt_oss": {"intermediate_size": 48},
    "granitemoe": {"intermediate_size": 48},
    "granitemoe_swa": {"intermediate_size": 48},
    "granitemoehybrid": {
        "intermediate_size": 48,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "granitemoeshared": {"intermediate_size": 48, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"intermediate_size": 48, "moe_topk": 2, "num_shared_expert": 1},
    "inkling_mm_model": {
        "text_config": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 16,
            "d_rel": 16,
            "rel_extent": 32,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
            **DENSE_FIRST,
        },
        "vision_config": {"patch_size": 4, "num_hidden_layers": 5},
        "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16},
    },
    "inkling2": {
        "text_config": {
            "unpadded_vocab_size": 120,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "sliding_window_size": 16,
            "d_rel": 16,
            "rel_extent": 32,
            "n_layers_per_attn_res_block": 2,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
        },
        "vision_config": {"posemb_grid_size": 4, "projection_hidden_dim": 48},
    },
    "jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 16,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**MLA, **HYBRID, "q_lora_rank": None},
    "laguna": {},
    "lfm2_moe": {
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "minimax": {
        "intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "minimax_m2": {"intermediate_size": 48, "rotary_dim": 8},
    "minimax_m3_vl": {
        "text_config": {
            **DENSE_FIRST,
            "intermediate_size": 48,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "rotary_dim": 8,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        },
        "projector_hidden_size": 48,
    },
    "mistral4": MLA,
    "mistral_large4": {"text_config": MLA, "spatial_merge_size": 2},
    "mixtral": {"intermediate_size": 48},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 48, "sliding_window": 16},
        "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
        "audio_config": {
            "num_hidden_layers": 2,
            "patch_sizes": [16, 4],
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
        },
        "out_hidden_size": 32,
        "projector_hidden_size": 48,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 48,
        "use_mamba_kernels": False,
    },
    "olmoe": {"intermediate_size": 48},
    "openai_privacy_filter": {"intermediate_size": 48},
    "phimoe": {"intermediate_size": 48},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_5_moe": {"text_config": {**HYBRID, **MROPE}},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": HYBRID,
    "qwen3_omni_moe": {
        "thinker_config": {
            "vision_start_token_id": 126,
            "text_config": MROPE,
            "vision_config": {"deepstack_visual_indexes": [0]},
        },
        "talker_config": {
            "text_config": {**MROPE, "shared_expert_intermediate_size": 48},
            "thinker_hidden_size": 64,
            "spatial_merge_size": 2,
            "code_predictor_config": {"num_code_groups": 4},
            "num_code_groups": 4,
        },
        "code2wav_config": {
            "codebook_size": 16,
            "hidden_size": 32,
            "decoder_dim": 64,
            "num_quantizers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    },
    "qwen3_omni_moe_thinker": {
        "text_config": MROPE,
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": MROPE,
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "qwen4_exp": {
        "text_config": {
            **MROPE,
            "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
            "hc_count": 2,
            "hc_lowrank": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "ple_layer_ids": [1],
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 16,
            "heads_per_ngram": 2,
            "split_ngram_parts": 4,
        },
    },
    "unlimited_ocr": {
        "text_config": {**DENSE_FIRST, "num_key_value_heads": 4},
        "vision_config": {
            "sam_config": {
                "output_channels": 16,
                "downsample_channels": [16, 16],
                "global_attn_indexes": [0],
                "window_size": 2,
            },
        },
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "llama4": {
        "text_config": {
            "intermediate_size": 48,
            "intermediate_size_mlp": 96,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        },
        "vision_config": {
            "intermediate_size": 64,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"intermediate_size": 48, "kv_channels": 16},
    "longcat_flash": {
        **MLA,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 0,
        "head_dim": 16,
    },
    "step3p7": {
        "text_config": {**DENSE_FIRST, "share_expert_dim": 48},
        "vision_config": {"mlp_ratio": 1.5, "max_position_embeddings": 16},
    },
    "switch_transformers": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
    },
    "nllb-moe": {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
    "qwen3": {},
    "llama": {},
}


def tiny_config(model_type: str, overrides: Overrides | None = None) -> PreTrainedConfig:
    """A tiny configuration of a registered `model_type`; `overrides` win over the tables."""
    merged = _merge(OVERRIDES.get(model_type, {}), overrides or {})
    # Families share dictionaries in the table, and transformers writes into the ones it is given.
    return _tiny(CONFIG_MAPPING[model_type], deepcopy(merged))


def _merge(base: Overrides, more: Overrides) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _tiny(cls: type[PreTrainedConfig], overrides: Overrides) -> PreTrainedConfig:
    fields = _field_names(cls)
    common = TEXT if _is_text(cls) else VISION
    kwargs = {name: value for name, value in common.items() if name in fields}
    kwargs.update(overrides)
    for name, spec in cls.sub_configs_defaults.items():
        if spec.optional and overrides.get(name) is None and name == "audio_config":
            continue
        sub_cls = CONFIG_MAPPING[spec.model_type] if spec.model_type else spec.config_class
        kwargs[name] = _tiny(sub_cls, overrides.get(name) or {})
    return cls(**kwargs)


def _is_text(cls: type[PreTrainedConfig]) -> bool:
    towers = ("Vision", "Audio", "Sam", "Pixtral")
    return not any(word in cls.__name__ for word in towers)


def _field_names(cls: type[PreTrainedConfig]) -> set[str]:
    return {name for base in inspect.getmro(cls) for name in inspect.get_annotations(base)}
