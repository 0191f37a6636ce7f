# SPDX-License-Identifier: Apache-2.0
"""From the names of the module tree to the published names, family by family."""

from __future__ import annotations

from .layouts import (
    append_experts,
    change,
    interleave_rotary,
    join,
    rename,
    split,
)

BLOCK_SPARSE_MOE = rename((r"\.mlp\.(experts|gate|shared_experts)\.", r".block_sparse_moe.\1."))
MINIMAX_M2 = rename((r"\.mlp\.", ".block_sparse_moe."))
PHIMOE = rename((r"\.mlp\.router\.", ".block_sparse_moe.gate."), (r"\.mlp\.", ".block_sparse_moe."))
NEMOTRON_H = rename((r"^model\.", "backbone."))
GRANITE = rename(
    (r"(block_sparse_moe)\.experts\.(input|output)_linear", r"\1.\2_linear"),
    (r"(block_sparse_moe\.router)\.weight", r"\1.layer.weight"),
)
ARIA = rename(
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.", ""),
    (r"^lm_head", "language_model.lm_head"),
)
SPLIT_CONV = split(r"\.conv1d\.", ".q_conv1d.", ".k_conv1d.", ".v_conv1d.")
FORGET_GATE = rename((r"\.forget_gate\.", "."))
HYPER_CONNECTIONS = rename((r"(attn|ffn)_hc\.(fn|base|scale)$", r"hc_\1_\2"))
BAILING = rename(
    (r"^model\.embed_tokens\.", "model.word_embeddings."),
    (r"\.o_proj\.", ".dense."),
    (r"\.self_attn\.", ".attention."),
    (r"\.e_score_correction_bias", ".expert_bias"),
)
ERNIE_STATICS = rename((r"mlp\.gate\.moe_statics", "mlp.moe_statics"))
BIAS_BESIDE_GATE = rename((r"mlp\.gate\.(e_score_correction_bias)", r"mlp.\1"))
SINKS_BIAS = rename((r"self_attn\.sinks", "self_attn.attention_sink_bias"))
SOFTMAX_OFFSET = rename((r"self_attn\.sinks", "self_attn.softmax_offset"))
HY_V3 = rename(
    (r"mlp\.gate\.weight", "mlp.router.gate.weight"),
    (r"mlp\.e_score_correction_bias", "mlp.expert_bias"),
    (r"mlp\.shared_experts\.", "mlp.shared_mlp."),
)
HY_V4 = rename(
    (r"self_attn\.sinks", "self_attn.learnable_sink_param"),
    (r"self_attn\.gate_proj", "self_attn.linear_gate"),
    (r"\.attn_hc\.", ".hc_attn_layer.hc_pre.hc_"),
    (r"\.ffn_hc\.", ".hc_mlp_layer.hc_pre.hc_"),
    (r"hc_head\.hc_(fn|base|scale)", r"hc_head.hc_head_\1"),
)
KOLIBRI1 = rename(
    (r"mlp\.gate\.e_score_correction_bias", "moe.router.expert_bias"),
    (r"post_self_attn_layernorm", "post_attn_norm"),
    (r"post_mlp_layernorm", "post_ffn_norm"),
)
LAGUNA = rename(
    (r"mlp\.gate\.e_score_correction_bias", "mlp.experts.e_score_correction_bias"),
    (r"mlp\.shared_experts\.", "mlp.shared_expert."),
)
AXK1 = rename((r"mlp\.post_mlp_layernorm", "post_mlp_layernorm"))
AXK2 = rename(
    (r"layernorm\.mlp\.fc1", "layernorm.W_down"),
    (r"layernorm\.mlp\.fc2", "layernorm.W_up"),
    (r"self_attn\.q_gate_proj\.", "self_attn.q_b_proj."),
)
DEEPSEEK_V4 = rename(
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"compressor\.indexer\.scorer\.weights_proj", "indexer.weights_proj"),
    (r"compressor\.indexer\.q_b_proj", "indexer.wq_b"),
    (r"compressor\.indexer\.", "indexer.compressor."),
    (r"compressor\.kv_norm\.", "compressor.norm."),
    (r"position_bias", "ape"),
    (r"(compressor)\.gate_proj\.", r"\1.wgate."),
    (r"kv_proj\.", "wkv."),
    (r"self_attn\.q_a_proj", "self_attn.wq_a"),
    (r"self_attn\.q_b_proj", "self_attn.wq_b"),
    (r"self_attn\.o_([ab])_proj", r"self_attn.wo_\1"),
    (r"q_a_norm", "q_norm"),
    (r"self_attn\.sinks", "self_attn.attn_sink"),
    (r"shared_experts\.gate_proj", "shared_experts.w1"),
    (r"shared_experts\.up_proj", "shared_experts.w3"),
    (r"shared_experts\.down_proj", "shared_experts.w2"),
    (r"gate\.e_score_correction_bias", "gate.bias"),
    (r"(attn|ffn)_hc\.(fn|base|scale)$", r"hc_\1_\2"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
)
MINIMAX_M3_VL = (
    split(r"\.gate_up_proj\.weight", ".gate_proj.weight", ".up_proj.weight"),
    rename(
        (r"^lm_head", "language_model.lm_head"),
        (r"^model\.language_model\.", "language_model.model."),
        (
            r"^model\.vision_tower\.embeddings\.proj\.",
            "vision_tower.vision_model.embeddings.patch_embedding.",
        ),
        (r"^model\.vision_tower\.layers\.", "vision_tower.vision_model.encoder.layers."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.merge_linear_", "patch_merge_mlp.linear_"),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        (
            r"\.mlp\.gate\.e_score_correction_bias",
            ".block_sparse_moe.e_score_correction_bias",
        ),
        (r"\.mlp\.(experts|gate|shared_experts)\.", r".block_sparse_moe.\1."),
        (r"\.self_attn\.indexer\.([qk])_(proj|norm)\.", r".self_attn.index_\1_\2."),
    ),
)
STEP3P7 = (
    change(r"vision_model\..*\.[qk]_proj\.", interleave_rotary(heads=2)),
    *(
        join(
            [f"self_attn.{p}_proj.{kind}" for p in "qkv"],
            f"self_attn.in_proj_{kind}",
            dim=0,
            within="vision_model",
        )
        for kind in ("weight", "bias")
    ),
    rename(
        (r"(vision_model\.layers\.\d+)\.self_attn\.", r"\1.attn."),
        (r"(vision_model\.layers\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
        (r"(vision_model\.layers\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
        (r"(vision_model\.layers\.\d+)\.layernorm_before\.", r"\1.ln_1."),
        (r"(vision_model\.layers\.\d+)\.layernorm_after\.", r"\1.ln_2."),
        (r"(vision_model\.layers\.\d+)\.lambda_([12])", r"\1.ls_\2.gamma"),
        (r"vision_model\.layers\.", "vision_model.transformer.resblocks."),
        (r"vision_model\.embeddings\.patch_embedding\.", "vision_model.conv1."),
        (
            r"vision_model\.embeddings\.position_embedding\.weight",
            "vision_model.positional_embedding",
        ),
        (r"vision_model\.pre_layernorm\.", "vision_model.ln_pre."),
        (r"vision_model\.downsampler", "vision_model.vit_downsampler"),
        (r"^model\.vision_model\.", "vision_model."),
        (r"^model\.multi_modal_projector\.", "vit_large_projector."),
        (r"^model\.language_model\.", "model."),
        (r"\.mlp\.gate\.e_score_correction_bias", ".moe.router_bias"),
        (r"\.mlp\.gate\.weight", ".moe.gate.weight"),
        (r"\.mlp\.experts\.", ".moe."),
        (r"\.mlp\.shared_experts\.", ".share_expert."),
    ),
)
SAM = (
    (r"(?<=sam_model\.)layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"(?<=sam_model\.)layers\.", "blocks."),
    (r"(?<=sam_model\.)patch_embed\.projection\.", "patch_embed.proj."),
    (r"(?<=sam_model\.)neck\.conv1\.", "neck.0."),
    (r"(?<=sam_model\.)neck\.layer_norm1\.", "neck.1."),
    (r"(?<=sam_model\.)neck\.conv2\.", "neck.2."),
    (r"(?<=sam_model\.)neck\.layer_norm2\.", "neck.3."),
    (r"(?<=sam_model\.)proj\.conv1\.", "net_2."),
    (r"(?<=sam_model\.)proj\.conv2\.", "net_3."),
)
OCR = rename(
    (r"^model\.language_model\.", "model."),
    (r"vision_tower\.sam_encoder\.", "sam_model."),
    *SAM,
    (r"multi_modal_projector\.", "projector.layers."),
    (r"view_separator", "view_seperator"),
)
DEEPSEEK_OCR2 = (
    OCR,
    rename(
        (r"vision_tower\.vision_encoder\.", "qwen2_model.model.model."),
        (r"vision_tower\.query_(\d+)_resolution\.", r"qwen2_model.query_\1."),
    ),
)
UNLIMITED_OCR = (
    OCR,
    *(
        join(
            [f"self_attn.{p}_proj.{kind}" for p in "qkv"],
            f"self_attn.qkv_proj.{kind}",
            dim=0,
            within="vision_encoder",
        )
        for kind in ("weight", "bias")
    ),
    rename(
        (r"vision_tower\.vision_encoder\.encoder\.", "vision_model.transformer."),
        (r"vision_tower\.vision_encoder\.", "vision_model."),
    ),
)
ERNIE4_5_VL = (
    append_experts("mlp.text_moe.experts", "mlp.vision_moe.experts"),
    join(
        [f"{kind}_moe.gate.moe_statics.e_score_correction_bias" for kind in ("text", "vision")],
        "moe_statics.e_score_correction_bias",
        dim=0,
    ),
    change(r"_moe\.gate\.weight", lambda weight: weight.mT),
    rename(
        (r"mlp\.text_moe\.gate\.weight", "mlp.gate.weight"),
        (r"mlp\.vision_moe\.gate\.weight", "mlp.gate.weight_1"),
        (r"mlp\.text_moe\.", "mlp."),
        (r"^model\.language_model\.", "model."),
        (r"^model\.vision_tower\.", "vision_model."),
        (r"_linear\.fc1\.", "_linear.0."),
        (r"_linear\.fc2\.", "_linear.2."),
        (r"_linear\.ln\.", "_linear.3."),
    ),
)
MISTRAL_LARGE4 = (
    change(r"vision_tower.*\.[qk]_proj\.", interleave_rotary(heads=2)),
    rename(
        (r"shared_experts\.gate_proj", "shared_experts.w1"),
        (r"shared_experts\.up_proj", "shared_experts.w3"),
        (r"shared_experts\.down_proj", "shared_experts.w2"),
        (r"\.mlp\.(gate|experts|shared_experts)\.", r".\1."),
        (r"\.mlp\.", ".feed_forward."),
        (r"feed_forward\.gate_proj", "feed_forward.w1"),
        (r"feed_forward\.up_proj", "feed_forward.w3"),
        (r"feed_forward\.down_proj", "feed_forward.w2"),
        (r"\.self_attn\.", ".attention."),
        (r"\.([qkvo])_proj\.", r".w\1."),
        (r"\.kv_a_proj_with_mqa\.", ".wkv_a_with_mqa."),
        (r"\.kv_b_proj\.", ".wkv_b."),
        (r"language_model(.*)\.input_layernorm\.", r"language_model\1.attention_norm."),
        (r"language_model(.*)\.post_attention_layernorm\.", r"language_model\1.ffn_norm."),
        (r"\.kv_a_layernorm\.", ".kv_a_norm."),
        (r"softmax_scaling\.scale", "ssmax_scaling.s"),
        (r"softmax_scaling\.bias", "ssmax_scaling.b"),
        (r"^model\.vision_tower\.", "vision_encoder."),
        (r"^model\.language_model\.embed_tokens\.", "tok_embeddings."),
        (r"^model\.language_model\.rotary_emb\.", "lerope."),
        (r"^model\.language_model\.", ""),
        (r"^lm_head\.", "output."),
        (r"^model\.multi_modal_projector\.norm\.", "pre_mm_projector_norm."),
        (r"^model\.multi_modal_projector\.patch_merger\.", "patch_merger."),
        (r"^model\.multi_modal_projector\.linear_1\.", "vision_language_adapter.w_in."),
        (r"^model\.multi_modal_projector\.linear_2\.", "vision_language_adapter.w_out."),
    ),
)
INKLING_TEXT = (
    (r"(language_model.*)\.self_attn\.q_proj", r"\1.attn.wq_du"),
    (r"(language_model.*)\.self_attn\.k_proj", r"\1.attn.wk_dv"),
    (r"(language_model.*)\.self_attn\.v_proj", r"\1.attn.wv_dv"),
    (r"(language_model.*)\.self_attn\.r_proj", r"\1.attn.wr_du"),
    (r"(language_model.*)\.self_attn\.o_proj", r"\1.attn.wo_ud"),
    (r"\.post_attention_layernorm", ".mlp_norm"),
    (r"\.input_layernorm", ".attn_norm"),
    (r"mlp\.gate\.e_score_correction_bias", "mlp.gate.bias"),
    (r"\.conv1d\.weight", ".weight"),
    (r"^model\.language_model\.embed_tokens\.embed_norm\.", "model.llm.embed_norm."),
    (r"^model\.language_model\.embed_tokens\.", "model.llm.embed."),
    (r"^lm_head\.", "model.llm.unembed."),
)
INKLING = (
    join(
        ["shared_experts.gate_proj", "shared_experts.up_proj"],
        "shared_experts.shared_w13_weight",
        dim=1,
        interleaved=True,
    ),
    join(
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "mlp.w13_dn.weight",
        dim=0,
        interleaved=True,
    ),
    rename(
        (r"shared_experts\.down_proj", "shared_experts.shared_w2_weight"),
        (r"mlp\.down_proj\.weight", "mlp.w2_md.weight"),
        *INKLING_TEXT,
        (r"\.self_attn\.", ".attn."),
        (r"^model\.language_model\.", "model.llm."),
        (r"^model\.audio_tower\.(embed_audio_tokens\.)+", "model.audio.encoder."),
        (r"^model\.audio_tower\.norm\.", "model.audio.final_norm."),
        (r"(?<=vision_tower\.)encoder_layers\.(\d+)\.projection", r"layers.linear_\1"),
        (r"(?<=vision_tower\.)encoder_layers\.(\d+)\.layer_norm", r"layers.norm_\1"),
        (r"^model\.vision_tower\.", "model.visual."),
    ),
)
QWEN3_OMNI = rename(
    (r"^thinker\.model\.language_model\.", "thinker.model."),
    (r"^thinker\.model\.(visual|audio_tower)\.", r"thinker.\1."),
)
NGRAM_SHARDS = [f"ngram_embedding.shard_{index}.weight" for index in range(4)]
QWEN4_EXP = split(r"ngram_embedding\.weight", *NGRAM_SHARDS)
DOTS3_NOTE = rename(
    (r"(vision_tower.*\.mlp\.experts\.\d+)\.gate_proj", r"\1.fc1"),
    (r"(vision_tower.*\.mlp\.experts\.\d+)\.down_proj", r"\1.fc2"),
    (r"(vision_tower.*\.mlp\.experts\.\d+)\.up_proj", r"\1.fc3"),
    (r"(vision_tower.*\.mlp)\.gate_proj", r"\1.fc1"),
    (r"(vision_tower.*\.mlp)\.down_proj", r"\1.fc2"),
    (r"(vision_tower.*\.mlp)\.up_proj", r"\1.fc3"),
    (r"(vision_tower.*\.mlp)\.gate\.weight", r"\1.gate_weight"),
    (r"(vision_tower.*\.mlp)\.e_score_correction_bias", r"\1.router_bias"),
    (r"(vision_tower\.blocks\.\d+)\.norm([12])", r"\1.norm_\2"),
    (r"vision_tower\.norm\.", "vision_tower.post_trunk_norm."),
    (r"vision_tower\.merger\.", "vision_tower.adapter."),
    (r"^model\.vision_tower\.", "vision_encoder."),
    (r"audio_tower\.conv_stem\.convs\.0\.", "audio_tower.conv_stem.conv2d1."),
    (r"audio_tower\.conv_stem\.convs\.1\.", "audio_tower.conv_stem.conv2d2."),
    (r"audio_tower\.conv_stem\.convs\.2\.", "audio_tower.conv_stem.conv2d3."),
    (r"audio_tower\.conv_stem\.", "audio_tower."),
    (r"(audio_tower\.layers\.\d+\.self_attn)\.o_proj", r"\1.out_proj"),
    (r"(audio_tower\.layers\.\d+)\.input_layernorm", r"\1.self_attn_layer_norm"),
    (r"(audio_tower\.layers\.\d+)\.post_attention_layernorm", r"\1.final_layer_norm"),
    (r"(audio_tower\.layers\.\d+)\.mlp\.gate_up_proj", r"\1.fc1"),
    (r"(audio_tower\.layers\.\d+)\.mlp\.down_proj", r"\1.fc2"),
    (r"audio_tower\.adapter\.norm", "audio_encoder.audio_adapter.proj.0"),
    (r"audio_tower\.adapter\.fc1", "audio_encoder.audio_adapter.proj.1"),
    (r"audio_tower\.adapter\.fc2", "audio_encoder.audio_adapter.proj.3"),
    (r"audio_tower\.", "audio_encoder.dots_encoder.speech_encoder."),
    (r"^model\.audio_encoder\.", "audio_encoder."),
    (r"^model\.language_model\.", "model."),
)
# One query fewer than layers: the list on disk starts with the second layer's.
QUERIES = tuple(
    (rf"layers\.{index + 1}\.attention_input\.query", f"attn_res.attn_queries.{index}")
    for index in range(2)
)
INKLING2 = rename(
    (r"self_attn\.gate_proj", "attn.gate_attn"),
    (r"self_attn\.sink_proj", "attn.attn_sink_proj"),
    *INKLING_TEXT,
    (r"\.post_attention_convolution\.", ".attn_sconv."),
    (r"\.post_mlp_convolution\.", ".mlp_sconv."),
    (r"sconv\.static_weight", "sconv.static_w"),
    (r"sconv\.weight_proj\.weight", "sconv.weight_proj"),
    (r"([qkv])_input_layernorm", r"\1_input_norm"),
    (r"(language_model.*)\.self_attn\.", r"\1.attn."),
    *QUERIES,
    (r"layers\.(\d+)\.mlp_input\.query", r"attn_res.mlp_queries.\1"),
    (r"final_input\.query", "attn_res.output_query"),
    (r"^model\.language_model\.", "model.llm."),
    (
        r"vision_tower\.embeddings\.position_embedding\.weight",
        "vision_tower.embeddings.position_embedding",
    ),
    (r"vision_tower\.(embeddings|layers)\.", r"visual.backbone.\1."),
    (r"vision_tower\.pre_layernorm\.", "visual.backbone.ln_pre."),
    (r"vision_tower\.merger\.linear_1\.", "visual.proj_in."),
    (r"vision_tower\.merger\.linear_2\.", "visual.proj_out."),
    (r"(visual.*)\.layernorm_before\.", r"\1.ln_1."),
    (r"(visual.*)\.layernorm_after\.", r"\1.ln_2."),
    (r"(visual.*)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(visual.*)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
    (r"(visual.*)\.lambda_([12])", r"\1.ls_\2.gamma"),
)
