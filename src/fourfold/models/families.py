"""Families: how routed experts are named in the output, and what engines fuse or never quantize.

All of it is data, and nothing here decides. A family whose checkpoint holds one tensor per expert
keeps its names. A family whose checkpoint stacks the experts in 3-D tensors (a **stack**) gets
one linear each under `<experts module>.<expert>.<projection>`, with the projection names that the
engines' loaders of that family map. Where no loader takes one linear each, `readers` is empty:
the file would be right and no engine would read it, some without a word.

Read from vLLM 0.33.0, SGLang 0.5.23 and the public TensorRT-LLM source; `Proof` says how much of
it was tried. docs/support.md shows this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fourfold.models.experts import Projection


class Proof(StrEnum):
    """How we know that an engine reads a family's exported names."""

    RAN = "ran against a loader"
    READ = "read in a loader's code"
    ASSUMED = "assumed"


class Engine(StrEnum):
    """An inference engine that loads what we write."""

    VLLM = "vLLM"
    SGLANG = "SGLang"
    TRTLLM = "TensorRT-LLM"


@dataclass(frozen=True, slots=True)
class Stack:
    """A raw tensor that holds one or two projections of all experts of a layer."""

    key: str
    """Regex over the raw key, with a group `stem`."""
    holds: tuple[Projection, ...]
    experts: str = "{stem}"
    """Template of the experts module's name in the output."""
    suffix: str = "weight"
    """`weight` or `bias`: the tensor name of one expert's part."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a family's routed experts are named, one linear each, in the output."""

    gate: str | None
    """None: the family has no gate."""
    up: str
    down: str
    proof: Proof
    source: str
    """The file of an engine that says so."""
    export: str = "{experts}.{expert}.{projection}"


@dataclass(frozen=True, slots=True)
class Family:
    """What we know of a family beyond what its module tree says."""

    names: ExpertNames
    readers: tuple[Engine, ...]
    """Engines with a loader that takes these names, quantized."""
    stacks: tuple[Stack, ...] = ()
    """Empty: one tensor per expert on disk, and the raw names stay."""
    router: str = "gate"
    """The router, under the layer's MoE module (a bare weight or an nn.Linear)."""
    shared: str | None = None
    """The shared experts' module."""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class FusedModule:
    """Sibling linears that an engine loads into one module: one global scale, one decision."""

    parts: tuple[str, ...]
    names: tuple[str, ...]
    """What the engines call the module, in place of a part's name."""
    optional: tuple[str, ...] = ()
    """Parts that some layers lack (Gemma 4's full attention has k_proj stand for v_proj)."""
    elsewhere: Mapping[Engine, tuple[str, ...]] = field(default_factory=dict)
    """Engines that have names of their own."""

    def called(self, engine: Engine) -> tuple[str, ...]:
        """What `engine` may call the module."""
        return self.elsewhere.get(engine, self.names)


@dataclass(frozen=True, slots=True)
class KeepAlways:
    """Linear layers that engines build unquantized whatever the checkpoint says."""

    pattern: str
    """Regex over the raw module name."""
    reason: str


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

FUSED_SUFFIXES: tuple[tuple[str, ...], ...] = tuple(module.parts for module in FUSED_MODULES)
"""Scale groups: siblings that must share one global scale. Those inside one expert included."""

KEEP_ALWAYS: tuple[KeepAlways, ...] = (
    KeepAlways(
        r"\.indexer\.(wk|weights_proj|k_proj)$",
        "the sparse-attention indexer's key and weights are one unquantized linear in vLLM "
        "(DeepSeek-V3.2, GLM-MoE-DSA, HY-V4; weights_proj in DeepSeek-V4)",
    ),
    KeepAlways(
        r"\.compressor\.(wkv|wgate|kv_proj|gate_proj)$",
        "DeepSeek-V4's compressor is built unquantized in vLLM",
    ),
    KeepAlways(
        r"\.input_mix_weight_(down|up)$|\.block_inject_weight$",
        "Qwen4-Exp's residual mixing is built unquantized in vLLM",
    ),
    KeepAlways(
        r"\.(self_attention_res_proj|mlp_res_proj|output_attn_res_proj)$",
        "Kimi's residual projections are built unquantized in vLLM and SGLang",
    ),
    KeepAlways(
        r"\.shared_experts\.shared_w(13|2)(_weight)?$",
        "Inkling's shared sink experts run in BF16 in vLLM",
    ),
    KeepAlways(
        r"\.conv1d$|\.(q|k|v)_conv1d$",
        "a depthwise convolution, which engines load as a narrow linear",
    ),
    KeepAlways(
        r"\.(kv_b_proj|wkv_b)$",
        "MLA absorbs it into queries and outputs: vLLM needs its values, not NVFP4",
    ),
    KeepAlways(
        r"\.mamba\.dt_proj$",
        "Mamba's time step: its weight is used without its layer, so nothing rounds its inputs",
    ),
    KeepAlways(
        r"\.shared_expert_gate$",
        "a router with one output: vLLM and SGLang build it unquantized",
    ),
)


def fuse(lasts: Iterable[str]) -> list[tuple[FusedModule, tuple[str, ...]]]:
    """Which of sibling linears, given by their last names, engines load into one module."""
    left, found = set(lasts), []
    for module in FUSED_MODULES:
        if left.issuperset(set(module.parts) - set(module.optional)):
            parts = tuple(part for part in module.parts if part in left)
            left.difference_update(parts)
            found.append((module, parts))
    return found


def kept_because(name: str) -> str | None:
    """Why the linear layer `name` is never quantized; None where nothing speaks against it."""
    return next((entry.reason for entry in KEEP_ALWAYS if re.search(entry.pattern, name)), None)


_BOTH = (Projection.GATE, Projection.UP)
_ALL_ENGINES = (Engine.VLLM, Engine.SGLANG, Engine.TRTLLM)
_VLLM_SGLANG = (Engine.VLLM, Engine.SGLANG)
_VLLM = (Engine.VLLM,)

_IN_MEMORY = (
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.gate_up_proj$", _BOTH),
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.down_proj$", (Projection.DOWN,)),
)
_BIASED = (
    *_IN_MEMORY,
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.gate_up_proj_bias$", _BOTH, suffix="bias"),
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.down_proj_bias$", (Projection.DOWN,), suffix="bias"),
)
_GRANITE = (
    Stack(r"^(?P<stem>.*block_sparse_moe)\.input_linear\.weight$", _BOTH, "{stem}.experts"),
    Stack(
        r"^(?P<stem>.*block_sparse_moe)\.output_linear\.weight$",
        (Projection.DOWN,),
        "{stem}.experts",
    ),
    *_IN_MEMORY,
)
_INKLING = (
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.w13_weight$", _BOTH),
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.w2_weight$", (Projection.DOWN,)),
    *_IN_MEMORY,
)
_ARIA = (
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.fc1\.weight$", _BOTH),
    Stack(r"^(?P<stem>(?:.*\.)?experts)\.fc2\.weight$", (Projection.DOWN,)),
    *_IN_MEMORY,
)
_DBRX = (
    Stack(r"^(?P<stem>.*\.experts)\.mlp\.w1$", (Projection.GATE,)),
    Stack(r"^(?P<stem>.*\.experts)\.mlp\.v1$", (Projection.UP,)),
    Stack(r"^(?P<stem>.*\.experts)\.mlp\.w2$", (Projection.DOWN,)),
)
_JETMOE = (
    Stack(r"^(?P<stem>.*\.mlp)\.input_linear\.weight$", _BOTH, "{stem}.experts"),
    Stack(r"^(?P<stem>.*\.mlp)\.output_linear\.weight$", (Projection.DOWN,), "{stem}.experts"),
)
_STEP = (
    Stack(r"^(?P<stem>.*\.moe)\.gate_proj\.weight$", (Projection.GATE,), "{stem}.experts"),
    Stack(r"^(?P<stem>.*\.moe)\.up_proj\.weight$", (Projection.UP,), "{stem}.experts"),
    Stack(r"^(?P<stem>.*\.moe)\.down_proj\.weight$", (Projection.DOWN,), "{stem}.experts"),
)
_NEMO = (
    Stack(r"^(?P<stem>.*\.experts)\.gate_and_up_projs$", (Projection.UP,)),
    Stack(r"^(?P<stem>.*\.experts)\.down_projs$", (Projection.DOWN,)),
)


def _llama(proof: Proof, source: str) -> ExpertNames:
    return ExpertNames("gate_proj", "up_proj", "down_proj", proof, source)


def _mixtral(proof: Proof, source: str) -> ExpertNames:
    return ExpertNames("w1", "w3", "w2", proof, source)


_RAN, _READ, _ASSUMED = Proof.RAN, Proof.READ, Proof.ASSUMED
_BACKEND = "vLLM transformers/moe.py"

DEFAULT = Family(
    _llama(_ASSUMED, "the names most loaders map"), (), _IN_MEMORY, remark="family not in the table"
)
"""For a family that the table lacks."""

_TABLE: dict[str, Family] = {
    # One tensor per expert on disk, gate_proj / up_proj / down_proj.
    "afmoe": Family(
        _llama(_READ, "vLLM afmoe.py"), _ALL_ENGINES, router="router.gate", shared="shared_experts"
    ),
    "axk1": Family(_llama(_READ, "vLLM AXK1.py"), _VLLM, shared="shared_experts"),
    "axk2": Family(_llama(_ASSUMED, _BACKEND), _VLLM, shared="shared_experts"),
    "bailing_hybrid": Family(
        _llama(_READ, "vLLM bailing_moe_v3.py"), _VLLM_SGLANG, shared="shared_experts"
    ),
    "beam": Family(_llama(_READ, "vLLM beam/nvidia/moe.py"), _VLLM_SGLANG),
    "cohere2_moe": Family(
        _llama(_READ, "vLLM cohere2_moe.py"), _VLLM_SGLANG, shared="shared_experts"
    ),
    "deepseek_ocr2": Family(_llama(_READ, "vLLM deepseek_ocr2.py"), _VLLM, shared="shared_experts"),
    "deepseek_v2": Family(
        _llama(_READ, "vLLM deepseek_v2.py"), _VLLM_SGLANG, shared="shared_experts"
    ),
    "deepseek_v3": Family(
        _llama(_RAN, "vLLM deepseek_v2.py"), _ALL_ENGINES, shared="shared_experts"
    ),
    "deepseek_v32": Family(
        _llama(_READ, "vLLM deepseek_v32/nvidia/model.py"),
        _ALL_ENGINES,
        shared="shared_experts",
        remark="the indexer stays unquantized",
    ),
    "dots1": Family(_llama(_ASSUMED, _BACKEND), _VLLM, shared="shared_experts"),
    "dots3_note": Family(
        _llama(_READ, "vLLM dots3_note"),
        _VLLM_SGLANG,
        shared="shared_experts",
        remark="the vision encoder has experts too (fc1, fc3, fc2): kept",
    ),
    "ernie4_5_moe": Family(
        _llama(_READ, "vLLM ernie45_moe.py"), _VLLM_SGLANG, shared="shared_experts"
    ),
    "ernie4_5_vl_moe": Family(
        _llama(_READ, "vLLM ernie45_vl_moe.py"),
        _VLLM_SGLANG,
        shared="shared_experts",
        remark="text and vision experts in one list on disk, of different widths",
    ),
    "exaone_moe": Family(
        _llama(_READ, "vLLM exaone_moe.py"), _ALL_ENGINES, shared="shared_experts"
    ),
    "flex_olmo": Family(_llama(_READ, _BACKEND), _VLLM),
    "flint": Family(_llama(_READ, "vLLM flint/model.py"), _VLLM, shared="shared_expert"),
    "glm4_moe": Family(_llama(_RAN, "vLLM glm4_moe.py"), _ALL_ENGINES, shared="shared_experts"),
    "glm4_moe_lite": Family(
        _llama(_READ, "vLLM glm4_moe_lite.py"), _VLLM_SGLANG, shared="shared_experts"
    ),
    "glm4v_moe": Family(
        _llama(_READ, "vLLM glm4_1v.py"),
        _VLLM,
        shared="shared_experts",
        remark="SGLang drops `model.` from module names, and not from the ignore list",
    ),
    "glm5_next": Family(_llama(_READ, "vLLM glm5next"), _VLLM_SGLANG, shared="shared_experts"),
    "glm_moe_dsa": Family(
        _llama(_READ, "vLLM deepseek_v32/nvidia/model.py"),
        _ALL_ENGINES,
        shared="shared_experts",
        remark="the indexer stays unquantized",
    ),
    "hunyuan_v1_moe": Family(
        _llama(_READ, _BACKEND), _ALL_ENGINES, router="gate.wg", shared="shared_mlp"
    ),
    "hy_v3": Family(
        _llama(_READ, "vLLM hy_v3.py"), _VLLM_SGLANG, router="router.gate", shared="shared_mlp"
    ),
    "jamba": Family(_llama(_READ, "vLLM jamba.py"), _VLLM, router="router"),
    "kolibri1": Family(_llama(_READ, _BACKEND), _VLLM, shared="shared_experts"),
    "laguna": Family(_llama(_READ, "vLLM laguna.py"), _ALL_ENGINES, shared="shared_expert"),
    "longcat_flash": Family(
        _llama(_READ, "vLLM longcat_flash.py"), _VLLM_SGLANG, router="router.classifier"
    ),
    "mellum": Family(_llama(_READ, _BACKEND), _VLLM_SGLANG),
    "mimo_v2_flash": Family(_llama(_READ, "vLLM mimo_v2.py"), _VLLM_SGLANG),
    "olmoe": Family(_llama(_RAN, "vLLM olmoe.py"), _VLLM_SGLANG),
    "qwen2_moe": Family(_llama(_RAN, "vLLM qwen2_moe.py"), _ALL_ENGINES, shared="shared_expert"),
    "qwen3_moe": Family(_llama(_RAN, "vLLM qwen3_moe.py"), _ALL_ENGINES),
    "qwen3_next": Family(_llama(_READ, "vLLM qwen3_next.py"), _ALL_ENGINES, shared="shared_expert"),
    "qwen3_omni_moe": Family(
        _llama(_READ, "vLLM qwen3_omni_moe_thinker.py"),
        _VLLM_SGLANG,
        remark="vLLM loads the thinker only",
    ),
    "solar_open": Family(_llama(_ASSUMED, _BACKEND), _VLLM, shared="shared_experts"),
    "unlimited_ocr": Family(
        _llama(_READ, "vLLM unlimited_ocr.py"), _VLLM_SGLANG, shared="shared_experts"
    ),
    # One tensor per expert on disk, w1 / w3 / w2.
    "deepseek_v4": Family(
        _mixtral(_READ, "vLLM deepseek_v4/nvidia/model.py"), _ALL_ENGINES, shared="shared_experts"
    ),
    "kimi_linear": Family(
        _mixtral(_READ, "vLLM kimi_k3/nvidia/model.py"), _ALL_ENGINES, shared="shared_experts"
    ),
    "lfm2_moe": Family(_mixtral(_READ, "vLLM lfm2_moe.py"), _VLLM_SGLANG),
    "minimax": Family(_mixtral(_ASSUMED, _BACKEND), _VLLM),
    "minimax_m2": Family(_mixtral(_RAN, "vLLM minimax_m2.py"), _ALL_ENGINES),
    "minimax_m3_vl": Family(
        _mixtral(_READ, "vLLM minimax_m3/nvidia/model.py"), _ALL_ENGINES, shared="shared_experts"
    ),
    "mistral_large4": Family(_mixtral(_ASSUMED, _BACKEND), (), shared="shared_experts"),
    "mixtral": Family(_mixtral(_RAN, "vLLM mixtral.py"), _ALL_ENGINES),
    "phimoe": Family(_mixtral(_RAN, "vLLM phimoe.py"), _VLLM_SGLANG),
    # One tensor per expert on disk, no gate.
    "nemotron_h": Family(
        ExpertNames(None, "up_proj", "down_proj", _READ, "vLLM nemotron_h.py"),
        _ALL_ENGINES,
        shared="shared_experts",
        remark="no gate",
    ),
    # Stacked on disk, and read one by one.
    "aria": Family(_llama(_READ, "vLLM aria.py"), _VLLM, _ARIA, "router", "shared_experts"),
    "diffusion_gemma": Family(
        _llama(_READ, "vLLM diffusion_gemma.py"), _VLLM, _IN_MEMORY, "router.proj"
    ),
    "gemma4": Family(
        _llama(_READ, "SGLang gemma4_causal.py"),
        _ALL_ENGINES,
        _IN_MEMORY,
        "router.proj",
        remark="full-attention layers may lack v_proj; q and k still share a scale",
    ),
    "granitemoe": Family(
        _llama(_READ, "SGLang granitemoe.py"), _VLLM_SGLANG, _GRANITE, "router.layer"
    ),
    "granitemoe_swa": Family(
        _llama(_READ, "SGLang granitemoe.py"), _VLLM_SGLANG, _GRANITE, "router", "shared_mlp"
    ),
    "granitemoehybrid": Family(
        _llama(_READ, "vLLM granitemoehybrid.py"),
        _VLLM_SGLANG,
        _GRANITE,
        "router.layer",
        "shared_mlp",
    ),
    "granitemoeshared": Family(
        _llama(_READ, "SGLang granitemoe.py"), _VLLM_SGLANG, _GRANITE, "router.layer", "shared_mlp"
    ),
    "hy_v4": Family(
        _llama(_READ, "vLLM hy_v4/nvidia/model.py"),
        _VLLM_SGLANG,
        _IN_MEMORY,
        "gate",
        "shared_experts",
        "the indexer stays unquantized",
    ),
    "llama4": Family(
        _llama(_READ, "vLLM llama4.py"), _VLLM_SGLANG, _IN_MEMORY, "router", "shared_expert"
    ),
    "mistral4": Family(_llama(_ASSUMED, _BACKEND), _VLLM, _IN_MEMORY, "gate", "shared_experts"),
    "qwen3_5_moe": Family(
        _llama(_RAN, "vLLM qwen3_5.py"),
        _ALL_ENGINES,
        _IN_MEMORY,
        "gate",
        "shared_expert",
        "stacked upstream; checkpoints with one tensor per expert exist too",
    ),
    "qwen3_vl_moe": Family(
        _llama(_READ, "SGLang qwen3_vl_moe.py"),
        _ALL_ENGINES,
        _IN_MEMORY,
        remark="stacked transposed, [E, in, out]",
    ),
    "qwen4_exp": Family(
        _llama(_READ, "vLLM qwen4_exp"), _VLLM_SGLANG, _IN_MEMORY, "gate", "shared_expert"
    ),
    "step3p7": Family(
        _llama(_READ, "vLLM step3p5.py"),
        _VLLM,
        _STEP,
        "gate",
        "share_expert",
        "SGLang reads stacked NVFP4 only",
    ),
    # Stacked on disk, and no engine reads NVFP4 experts one by one.
    "dbrx": Family(
        ExpertNames("w1", "v1", "w2", _ASSUMED, "vLLM dbrx.py maps stacked names only"),
        (),
        _DBRX,
        "router.layer",
    ),
    "gpt_oss": Family(
        _llama(_ASSUMED, "vLLM gpt_oss.py skips such names"),
        (),
        _BIASED,
        "router",
        remark="vLLM and SGLang skip these names without a word; MXFP4 is this family's format",
    ),
    "inkling": Family(
        _llama(_ASSUMED, "vLLM inkling/nvidia/moe.py takes stacked tensors only"),
        (),
        _INKLING,
        "gate",
        "shared_experts",
        "NVFP4 is read stacked: w13_weight, .scale, .scale2, .input_amax",
    ),
    "inkling2": Family(_llama(_ASSUMED, "no engine"), (), _INKLING),
    "jetmoe": Family(
        _llama(_ASSUMED, "no engine"),
        (),
        _JETMOE,
        "router.layer",
        remark="attention has experts; `plan` refuses it",
    ),
    "muse_spark": Family(
        _llama(_ASSUMED, "vLLM muse_spark/common/moe.py takes stacked tensors only"),
        (),
        _IN_MEMORY,
        remark="NVFP4 is read stacked: w13_weight, w13_weight_scale, w13_weight_scale_2 [E, 2]",
    ),
    "nemo_speechlm": Family(
        ExpertNames(None, "up_proj", "down_proj", _ASSUMED, "no engine"),
        (),
        _NEMO,
        remark="Nemotron 3.5 Transcribe: stacked transposed, no gate",
    ),
    "openai_privacy_filter": Family(
        _llama(_ASSUMED, "vLLM openai_privacy_filter.py is gpt_oss.py"), (), _BIASED, "router"
    ),
    "zaya": Family(
        _llama(_ASSUMED, "SGLang zaya.py reads linear_fc1, linear_fc2"), (), _IN_MEMORY, "gate"
    ),
    # Neither engine nor expert names.
    "switch_transformers": Family(
        ExpertNames(None, "wi", "wo", _ASSUMED, "no engine"), (), router="router.classifier"
    ),
    "nllb-moe": Family(
        ExpertNames(None, "fc1", "fc2", _ASSUMED, "no engine"), (), router="router.classifier"
    ),
}

_OTHER_TYPES: Mapping[str, str] = {
    "aria_text": "aria",
    "deepseek_ocr2_text": "deepseek_ocr2",
    "diffusion_gemma_text": "diffusion_gemma",
    "dots3_note_text": "dots3_note",
    "ernie4_5_vl_moe_text": "ernie4_5_vl_moe",
    "gemma4_text": "gemma4",
    "glm4v_moe_text": "glm4v_moe",
    "glm5_next_text": "glm5_next",
    "inkling_text": "inkling",
    "inkling_mm_model": "inkling",
    "inkling2_text": "inkling2",
    "kimi_k25": "deepseek_v3",
    "llama4_text": "llama4",
    "minimax_m3_vl_text": "minimax_m3_vl",
    "mistral_large4_text": "mistral_large4",
    "muse_spark_text": "muse_spark",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_omni_moe_text": "qwen3_omni_moe",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
    "qwen4_exp_text": "qwen4_exp",
    "step3p5": "step3p7",
    "unlimited_ocr_text": "unlimited_ocr",
}
"""Text and wrapper model types of the families above."""

FAMILIES: Mapping[str, Family] = {
    **_TABLE,
    **{model_type: _TABLE[name] for model_type, name in _OTHER_TYPES.items()},
}
"""By `model_type`, of the text model and of its wrapper."""


def family_of(*model_types: str | None) -> Family:
    """The first of `model_types` that the table knows (wrapper first, then text), or DEFAULT."""
    return next((FAMILIES[name] for name in model_types if name and name in FAMILIES), DEFAULT)


def fused_module_name(name: str) -> tuple[str, ...]:
    """What the engines may call the module that the linear `name` is fused into; often empty."""
    parent, dot, last = name.rpartition(".")
    fused = (
        called
        for module in FUSED_MODULES
        if last in module.parts
        for engine in Engine
        for called in module.called(engine)
    )
    return tuple(dict.fromkeys(parent + dot + called for called in fused))
