# SPDX-License-Identifier: Apache-2.0
"""The families: which class, which layout on disk, and how sure that layout is.

`source` says where the layout comes from: "known" (published checkpoints, or the
engines' loaders), "conversion_mapping" (the patterns that transformers' own loader expects of
upstream's files), or "assumed" (nothing says otherwise, so the names in memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from transformers import PreTrainedConfig

from . import edits as e
from . import mtp
from .configs import Overrides, tiny_config
from .layouts import (
    AS_IN_MEMORY,
    DENSE,
    FUSED,
    FUSED_TRANSPOSED,
    FUSED_TRANSPOSED_INTERLEAVED,
    PER_EXPERT,
    W1_W3_W2,
    Edit,
    ExpertsLayout,
    Tensors,
    fused,
    stacked_apart,
)

# From the tensors on disk, the configuration and a seed: what else the checkpoint holds.
ExtraTensors = Callable[[Tensors, PreTrainedConfig, int], Tensors]


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    `package` is the folder in `transformers/models`; `experts` and `edits` are the layout on
    disk; `extra` makes tensors that the module tree has no place for; `why_not` is the reason
    where the family cannot be built; `load_error` is why `from_pretrained` refuses upstream's
    layout (the checkpoint can be written all the same).
    """

    name: str
    package: str
    model_class: str
    build_config: Callable[[], PreTrainedConfig]
    experts: ExpertsLayout
    layout_source: str
    edits: tuple[Edit, ...] = ()
    extra: ExtraTensors | None = None
    names_architecture: bool = True
    why_not: str | None = None
    load_error: str | None = None

    @property
    def layout(self) -> str:
        return self.experts.name


FAMILIES: dict[str, Family] = {}


def _add(
    name: str,
    model_class: str,
    experts: ExpertsLayout = PER_EXPERT,
    source: str = "conversion_mapping",
    edits: Edit | Iterable[Edit] = (),
    *,
    model_type: str | None = None,
    package: str | None = None,
    overrides: Overrides | None = None,
    **more,
) -> None:
    edits = (edits,) if callable(edits) else tuple(edits)
    config = partial(tiny_config, model_type or name, overrides)
    package = package or (model_type or name).replace("-", "_")
    assert name not in FAMILIES
    FAMILIES[name] = Family(name, package, model_class, config, experts, source, edits, **more)


# mlp.experts.{e}.{gate,up,down}_proj.weight, all other names as in memory
for _name, _class, _source in (
    ("afmoe", "AfmoeForCausalLM", "known"),
    ("beam", "BeamForCausalLM", "conversion_mapping"),
    ("cohere2_moe", "Cohere2MoeForCausalLM", "conversion_mapping"),
    ("deepseek_v2", "DeepseekV2ForCausalLM", "known"),
    ("deepseek_v3", "DeepseekV3ForCausalLM", "known"),
    ("deepseek_v32", "DeepseekV32ForCausalLM", "known"),
    ("dots1", "Dots1ForCausalLM", "known"),
    ("flex_olmo", "FlexOlmoForCausalLM", "conversion_mapping"),
    ("glm4_moe", "Glm4MoeForCausalLM", "known"),
    ("glm4_moe_lite", "Glm4MoeLiteForCausalLM", "known"),
    ("glm4v_moe", "Glm4vMoeForConditionalGeneration", "known"),
    ("glm_moe_dsa", "GlmMoeDsaForCausalLM", "conversion_mapping"),
    ("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "known"),
    ("longcat_flash", "LongcatFlashForCausalLM", "known"),
    ("jamba", "JambaForCausalLM", "known"),  # feed_forward.experts
    ("mellum", "MellumForCausalLM", "conversion_mapping"),
    ("olmoe", "OlmoeForCausalLM", "known"),
    ("qwen2_moe", "Qwen2MoeForCausalLM", "known"),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "known"),
    ("qwen3_next", "Qwen3NextForCausalLM", "known"),
    ("solar_open", "SolarOpenForCausalLM", "known"),
):
    _add(_name, _class, source=_source)

# Per expert, other tensors renamed
_BAILING = (e.SPLIT_CONV, e.FORGET_GATE, e.BAILING)
_GLM5 = (e.SPLIT_CONV, e.FORGET_GATE, e.HYPER_CONNECTIONS)
_add("axk1", "AXK1ForCausalLM", edits=e.AXK1)
_add("axk2", "AXK2ForCausalLM", edits=e.AXK2)
_add("bailing_hybrid", "BailingHybridForCausalLM", edits=_BAILING)
_add("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", edits=e.DEEPSEEK_OCR2)
_add("dots3_note", "Dots3NoteForConditionalGeneration", edits=e.DOTS3_NOTE)
_add("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", PER_EXPERT, "known", e.ERNIE_STATICS)
_add("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", edits=e.ERNIE4_5_VL)
_add("exaone_moe", "ExaoneMoeForCausalLM", edits=e.BIAS_BESIDE_GATE)
_add("flint", "FlintForCausalLM", edits=e.SOFTMAX_OFFSET)
_add("glm5_next", "Glm5NextForConditionalGeneration", edits=_GLM5)
_add("hy_v3", "HYV3ForCausalLM", edits=e.HY_V3)
_add("kolibri1", "Kolibri1ForCausalLM", edits=e.KOLIBRI1)
_add("laguna", "LagunaForCausalLM", edits=e.LAGUNA)
_add("mimo_v2_flash", "MiMoV2FlashForCausalLM", PER_EXPERT, "known", e.SINKS_BIAS)
_add("nemotron_h", "NemotronHForCausalLM", PER_EXPERT, "known", e.NEMOTRON_H)
_add("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration", edits=e.QWEN3_OMNI)
_add("qwen4_exp", "Qwen4ExpForConditionalGeneration", edits=e.QWEN4_EXP)
_add("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", edits=e.UNLIMITED_OCR)

# {e}.w1 (gate), w3 (up), w2 (down)
_KIMI = (e.SPLIT_CONV, e.FORGET_GATE, e.BLOCK_SPARSE_MOE)
_M3_VL = "MiniMaxM3SparseForConditionalGeneration"
_add("mixtral", "MixtralForCausalLM", W1_W3_W2, "known", e.BLOCK_SPARSE_MOE)
_add("minimax", "MiniMaxForCausalLM", W1_W3_W2, "known", e.BLOCK_SPARSE_MOE)
_add("minimax_m2", "MiniMaxM2ForCausalLM", W1_W3_W2, "known", e.MINIMAX_M2)
_add("minimax_m3_vl", _M3_VL, W1_W3_W2, edits=e.MINIMAX_M3_VL)
_add("phimoe", "PhimoeForCausalLM", W1_W3_W2, "known", e.PHIMOE)
_add("kimi_linear", "KimiLinearForCausalLM", W1_W3_W2, "known", _KIMI)
_add("deepseek_v4", "DeepseekV4ForCausalLM", W1_W3_W2, "known", e.DEEPSEEK_V4)
_add("lfm2_moe", "Lfm2MoeForCausalLM", W1_W3_W2, "known")
_add("mistral_large4", "MistralLarge4ForConditionalGeneration", W1_W3_W2, edits=e.MISTRAL_LARGE4)

# Fused
_PRIVACY = "OpenAIPrivacyFilterForTokenClassification"
_add("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", FUSED, "assumed")
_add("gemma4", "Gemma4ForConditionalGeneration", FUSED, "known")
_add("granitemoe_swa", "GraniteMoeSWAForCausalLM", FUSED, "known")
_add("hy_v4", "HYV4ForCausalLM", FUSED, edits=e.HY_V4)
_add("mistral4", "Mistral4ForCausalLM", FUSED, "known")
_add("muse_spark", "MuseSparkForConditionalGeneration", FUSED, "known")
_add("zaya", "ZayaForCausalLM", FUSED, "assumed")
_add("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", FUSED, "known")
_add("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", FUSED_TRANSPOSED, "known")
_add("llama4", "Llama4ForConditionalGeneration", FUSED_TRANSPOSED, "known")
_add("openai_privacy_filter", _PRIVACY, FUSED_TRANSPOSED, "assumed")
_add("gpt_oss", "GptOssForCausalLM", FUSED_TRANSPOSED_INTERLEAVED, "known")

# Fused, renamed
_GRANITE = fused("input_linear.weight", "output_linear.weight")
_ARIA = fused("fc1.weight", "fc2.weight", transposed=True)
_W13 = fused("w13_weight", "w2_weight", interleaved=True)
_INKLING = {"model_type": "inkling_mm_model", "package": "inkling"}
_STEP = stacked_apart("gate_proj", "up_proj", "down_proj")
_add("granitemoe", "GraniteMoeForCausalLM", _GRANITE, "known", e.GRANITE)
_add("granitemoeshared", "GraniteMoeSharedForCausalLM", _GRANITE, "known", e.GRANITE)
_add("granitemoehybrid", "GraniteMoeHybridForCausalLM", _GRANITE, "known", e.GRANITE)
_add("aria", "AriaForConditionalGeneration", _ARIA, "known", e.ARIA)
_add("inkling", "InklingForConditionalGeneration", _W13, edits=e.INKLING, **_INKLING)
_add("inkling2", "Inkling2ForConditionalGeneration", _W13, edits=e.INKLING2)
_add("step3p7", "Step3p7ForConditionalGeneration", _STEP, edits=e.STEP3P7)

# As the modules keep them
_add("dbrx", "DbrxForCausalLM", AS_IN_MEMORY, "known")
_add("jetmoe", "JetMoeForCausalLM", AS_IN_MEMORY, "known")
_add("switch_transformers", "SwitchTransformersForConditionalGeneration", AS_IN_MEMORY, "known")
_add("nllb_moe", "NllbMoeForConditionalGeneration", AS_IN_MEMORY, "known", model_type="nllb-moe")

# No experts
_add("qwen3", "Qwen3ForCausalLM", DENSE, "known")
_add("llama", "LlamaForCausalLM", DENSE, "known")

# Variants
_ZERO_EXPERTS = (
    "transformers gives gate_up_proj a row for each zero expert too, which upstream does not store"
)
_VL = "Qwen3_5MoeForConditionalGeneration"
_LONGCAT = "LongcatFlashForCausalLM"
_add(
    "longcat_flash_zero",
    _LONGCAT,
    PER_EXPERT,
    "known",
    model_type="longcat_flash",
    load_error=_ZERO_EXPERTS,
    overrides={"zero_expert_num": 2},
)
_add(
    "deepseek_v3_mtp",
    "DeepseekV3ForCausalLM",
    PER_EXPERT,
    "known",
    model_type="deepseek_v3",
    extra=mtp.deepseek,
)
_add("qwen3_5_moe_vl", _VL, FUSED, "known", model_type="qwen3_5_moe", extra=mtp.qwen)
_add("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", FUSED, "assumed", package="qwen3_5_moe")
_add(
    "qwen3_next_mtp",
    "Qwen3NextForCausalLM",
    PER_EXPERT,
    "known",
    model_type="qwen3_next",
    extra=mtp.qwen,
)
for _name, _type, _class, _layout in (
    ("qwen3_tied", "qwen3", "Qwen3ForCausalLM", DENSE),
    ("qwen3_moe_tied", "qwen3_moe", "Qwen3MoeForCausalLM", PER_EXPERT),
):
    _tied = {"tie_word_embeddings": True}
    _add(_name, _class, _layout, "known", model_type=_type, overrides=_tied)
for _name, _type, _class, _layout in (
    ("llama_unnamed", "llama", "LlamaForCausalLM", DENSE),
    ("qwen3_moe_unnamed", "qwen3_moe", "Qwen3MoeForCausalLM", PER_EXPERT),
    ("qwen3_5_moe_unnamed", "qwen3_5_moe", _VL, FUSED),
):
    _add(_name, _class, _layout, "known", model_type=_type, names_architecture=False)

LAYOUTS = ("qwen3_moe", "qwen3_5_moe_vl", "gpt_oss", "llama4", "dbrx", "ernie4_5_vl_moe")
"""A family of each kind of layout on disk: one tensor per expert; stacked; interleaved with biases;
stacked transposed; 2-D; experts of several modules in one list. Every family goes through the whole
job in `test_every_family.py`; other tests take these six, and all others in the slow suite."""


def mostly_slow(names: Iterable[str], *more: str) -> list[Any]:
    """Parameters of a test: the families of `LAYOUTS` and `more`; the others in the slow suite."""
    usual = {*LAYOUTS, *more}
    return [pytest.param(name, marks=[] if name in usual else pytest.mark.slow) for name in names]
