# SPDX-License-Identifier: Apache-2.0
"""Families: how routed experts are named in the output, and which engines read those names.

This is all data. A family whose checkpoint holds one tensor per expert keeps its names. A family
whose checkpoint stacks the experts in 3-D tensors (a **stack**) gets one linear layer per expert
under `<experts module>.<expert>.<projection>`, with the projection names that the engines' loaders
for that family map. `readers` is empty where no loader takes one linear layer per expert: such a
checkpoint is right, but no engine can read it, and some engines skip it without an error.

Read from vLLM 0.33.0, SGLang 0.5.23 and the public TensorRT-LLM source. docs/support.md shows this
table, with the file that each row was read in and whether it was tried.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from fourfold.models.names import EXPERT_LINEAR


class Engine(StrEnum):
    """An inference engine that loads the checkpoints we write."""

    VLLM = "vLLM"
    SGLANG = "SGLang"
    TRTLLM = "TensorRT-LLM"


@dataclass(frozen=True, slots=True)
class Stack:
    """A raw tensor that holds one or two projections of all experts of a layer."""

    key: str
    """Regex over the raw key, with a group `stem`."""
    experts: str = "{stem}"
    """Template of the experts module's name in the output."""


class ExpertNames(NamedTuple):
    """The names of an expert's linear layers in the output. `gate` is None without a gate."""

    gate: str | None
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about a family that its module tree does not state."""

    names: ExpertNames
    readers: tuple[Engine, ...]
    """Engines with a loader that takes these names, quantized."""
    stacks: tuple[Stack, ...] = ()
    """Empty: one tensor per expert on disk, and the raw names stay."""
    remark: str = ""
    """Shown in the plan's warning if no engine reads the output."""
    parent: str = "mlp"
    """Regex of the name of the module around `experts` in the output."""

    def maps(self, name: str) -> bool:
        """True if `name`, without `.weight`, is one expert's linear layer under this family's
        names; of a family that the table lacks, under any."""
        expert = EXPERT_LINEAR.match(name)
        if expert is None or self is DEFAULT:
            return expert is not None
        parent = expert["module"].rpartition(".")[0].rpartition(".")[2]
        return expert["projection"] in self.names and re.fullmatch(self.parent, parent) is not None

    @property
    def pattern(self) -> str:
        """The names of experts' linear layers, for people."""
        parent = "" if self.parent == _A_LAYER else f"{self.parent}."
        return f"{parent}experts.<number>.{'/'.join(name for name in self.names if name)}"


_ALL_ENGINES = (Engine.VLLM, Engine.SGLANG, Engine.TRTLLM)
_VLLM_SGLANG = (Engine.VLLM, Engine.SGLANG)
_SGLANG_TRTLLM = (Engine.SGLANG, Engine.TRTLLM)
_VLLM = (Engine.VLLM,)
_SGLANG = (Engine.SGLANG,)
_NO_ENGINE = ()

_A_LAYER = r"\d+"
_SPARSE = "block_sparse_moe"

_GATE_UP_DOWN = ExpertNames("gate_proj", "up_proj", "down_proj")
_W1_W3_W2 = ExpertNames("w1", "w3", "w2")


def _stacks(*keys: str, experts: str = "{stem}") -> tuple[Stack, ...]:
    """Stacks whose whole raw keys match these regexes."""
    return tuple(Stack(f"^{key}$", experts) for key in keys)


_EXPERTS = r"(?P<stem>(?:.*\.)?experts)"
_MOE = r"(?P<stem>.*block_sparse_moe)"
_MLP = r"(?P<stem>.*\.mlp)"
_STEP_MOE = r"(?P<stem>.*\.moe)"
_UNDER = "{stem}.experts"

_GATE_UP_STACK = _stacks(rf"{_EXPERTS}\.gate_up_proj", rf"{_EXPERTS}\.down_proj")
_BIASED = (
    *_GATE_UP_STACK,
    *_stacks(rf"{_EXPERTS}\.gate_up_proj_bias", rf"{_EXPERTS}\.down_proj_bias"),
)
_GRANITE = (
    *_stacks(rf"{_MOE}\.input_linear\.weight", rf"{_MOE}\.output_linear\.weight", experts=_UNDER),
    *_GATE_UP_STACK,
)
_INKLING = (*_stacks(rf"{_EXPERTS}\.w13_weight", rf"{_EXPERTS}\.w2_weight"), *_GATE_UP_STACK)
_ARIA = (*_stacks(rf"{_EXPERTS}\.fc1\.weight", rf"{_EXPERTS}\.fc2\.weight"), *_GATE_UP_STACK)
_DBRX = _stacks(*(rf"(?P<stem>.*\.experts)\.mlp\.{name}" for name in ("w1", "v1", "w2")))
_JETMOE = _stacks(
    rf"{_MLP}\.input_linear\.weight", rf"{_MLP}\.output_linear\.weight", experts=_UNDER
)
_STEP = _stacks(*(rf"{_STEP_MOE}\.{name}\.weight" for name in _GATE_UP_DOWN), experts=_UNDER)
_NEMO = _stacks(
    *(rf"(?P<stem>.*\.experts)\.{name}" for name in ("gate_and_up_projs", "down_projs"))
)

_STACKED = "they are read stacked, in W4A4: convert OUT to the layout modelopt-stacked"

DEFAULT = Family(
    _GATE_UP_DOWN,
    _NO_ENGINE,
    (*_GATE_UP_STACK, *_stacks(rf"{_EXPERTS}\.up_proj")),
    remark="family not in the table",
)
"""For a family that the table lacks."""

_TABLE: dict[str, Family] = {
    # One tensor per expert on disk, named gate_proj / up_proj / down_proj.
    "afmoe": Family(_GATE_UP_DOWN, _SGLANG_TRTLLM),
    "axk1": Family(_GATE_UP_DOWN, _VLLM),
    "axk2": Family(_GATE_UP_DOWN, _VLLM),
    "bailing_hybrid": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "beam": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "cohere2_moe": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "deepseek_ocr2": Family(_GATE_UP_DOWN, _VLLM),
    "deepseek_v2": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "deepseek_v3": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "deepseek_v32": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "dots1": Family(_GATE_UP_DOWN, _VLLM),
    "dots3_note": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "ernie4_5_moe": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "ernie4_5_vl_moe": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "exaone_moe": Family(_GATE_UP_DOWN, _SGLANG_TRTLLM),
    "flex_olmo": Family(_GATE_UP_DOWN, _VLLM),
    "flint": Family(_GATE_UP_DOWN, _VLLM),
    "glm4_moe": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "glm4_moe_lite": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "glm4v_moe": Family(_GATE_UP_DOWN, _VLLM),
    "glm5_next": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "glm_moe_dsa": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "hunyuan_v1_moe": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "hy_v3": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "jamba": Family(_GATE_UP_DOWN, _VLLM, parent="feed_forward"),
    "kolibri1": Family(_GATE_UP_DOWN, _VLLM),
    "laguna": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "longcat_flash": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "mellum": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "mimo_v2_flash": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "olmoe": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    "qwen2_moe": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "qwen3_moe": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "qwen3_next": Family(_GATE_UP_DOWN, _ALL_ENGINES),
    "qwen3_omni_moe": Family(_GATE_UP_DOWN, _SGLANG),
    "solar_open": Family(_GATE_UP_DOWN, _VLLM),
    "unlimited_ocr": Family(_GATE_UP_DOWN, _VLLM_SGLANG),
    # One tensor per expert on disk, named w1 / w3 / w2.
    "deepseek_v4": Family(_W1_W3_W2, _ALL_ENGINES, parent="ffn"),
    "kimi_linear": Family(_W1_W3_W2, _ALL_ENGINES, parent=_SPARSE),
    "lfm2_moe": Family(_W1_W3_W2, _VLLM_SGLANG, parent="feed_forward"),
    "minimax": Family(
        _W1_W3_W2,
        _NO_ENGINE,
        remark="vLLM's Transformers backend, which alone has the family, has no linear attention",
        parent=_SPARSE,
    ),
    "minimax_m2": Family(_W1_W3_W2, _ALL_ENGINES, parent=_SPARSE),
    "minimax_m3_vl": Family(_W1_W3_W2, _ALL_ENGINES, parent=_SPARSE),
    "mistral_large4": Family(_W1_W3_W2, _NO_ENGINE, parent=_A_LAYER),
    "mixtral": Family(_W1_W3_W2, _ALL_ENGINES, parent=_SPARSE),
    "phimoe": Family(_W1_W3_W2, _VLLM_SGLANG, parent=_SPARSE),
    # One tensor per expert on disk, without a gate.
    "nemotron_h": Family(ExpertNames(None, "up_proj", "down_proj"), _ALL_ENGINES, parent="mixer"),
    # Stacked on disk, and read one by one.
    "diffusion_gemma": Family(_GATE_UP_DOWN, _VLLM, _GATE_UP_STACK, parent=_A_LAYER),
    "gemma4": Family(_GATE_UP_DOWN, _ALL_ENGINES, _GATE_UP_STACK, parent=_A_LAYER),
    "granitemoe": Family(_GATE_UP_DOWN, _VLLM_SGLANG, _GRANITE, parent=_SPARSE),
    "granitemoe_swa": Family(_GATE_UP_DOWN, _VLLM_SGLANG, _GRANITE, parent=_SPARSE),
    "granitemoehybrid": Family(_GATE_UP_DOWN, _VLLM, _GRANITE, parent=_SPARSE),
    "granitemoeshared": Family(_GATE_UP_DOWN, _VLLM_SGLANG, _GRANITE, parent=_SPARSE),
    "hy_v4": Family(_GATE_UP_DOWN, _VLLM_SGLANG, _GATE_UP_STACK),
    "llama4": Family(_GATE_UP_DOWN, _VLLM_SGLANG, _GATE_UP_STACK, parent="feed_forward"),
    "mistral4": Family(_GATE_UP_DOWN, _VLLM, _GATE_UP_STACK),
    "qwen3_5_moe": Family(_GATE_UP_DOWN, _ALL_ENGINES, _GATE_UP_STACK),
    "qwen3_vl_moe": Family(_GATE_UP_DOWN, _ALL_ENGINES, _GATE_UP_STACK),
    "qwen4_exp": Family(_GATE_UP_DOWN, _VLLM_SGLANG, _GATE_UP_STACK),
    "step3p7": Family(_GATE_UP_DOWN, _VLLM, _STEP, parent="moe"),
    "zaya": Family(_GATE_UP_DOWN, _VLLM, _GATE_UP_STACK),
    # Stacked on disk, and no engine reads NVFP4 experts one by one.
    "aria": Family(
        _GATE_UP_DOWN,
        _NO_ENGINE,
        _ARIA,
        remark="vLLM takes gate_proj and up_proj of one expert for stacked ones",
    ),
    "dbrx": Family(ExpertNames("w1", "v1", "w2"), _NO_ENGINE, _DBRX, parent="ffn"),
    "gpt_oss": Family(
        _GATE_UP_DOWN,
        _NO_ENGINE,
        _BIASED,
        remark="vLLM stops with a KeyError, SGLang skips the names; MXFP4 is this family's format",
    ),
    "inkling": Family(
        _GATE_UP_DOWN,
        _NO_ENGINE,
        _INKLING,
        remark=_STACKED,
    ),
    "inkling2": Family(_GATE_UP_DOWN, _NO_ENGINE, _INKLING),
    "jetmoe": Family(_GATE_UP_DOWN, _NO_ENGINE, _JETMOE),
    "muse_spark": Family(
        _GATE_UP_DOWN,
        _NO_ENGINE,
        _GATE_UP_STACK,
        remark=_STACKED,
    ),
    "nemo_speechlm": Family(
        ExpertNames(None, "up_proj", "down_proj"),
        _NO_ENGINE,
        _NEMO,
        remark="Nemotron 3.5 Transcribe: stacked transposed, no gate",
    ),
    "openai_privacy_filter": Family(_GATE_UP_DOWN, _NO_ENGINE, _BIASED),
    # No engine, and expert names of their own.
    "switch_transformers": Family(ExpertNames(None, "wi", "wo"), _NO_ENGINE),
    "nllb-moe": Family(ExpertNames(None, "fc1", "fc2"), _NO_ENGINE, parent="ffn"),
}

_OTHER_TYPES: Mapping[str, str] = {
    "inkling_mm_model": "inkling",
    "kimi_k25": "deepseek_v3",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
    "step3p5": "step3p7",
}
"""Further model types of the families above, besides the text models' (`gemma4_text`)."""

FAMILIES: Mapping[str, Family] = {
    **_TABLE,
    **{f"{name}_text": family for name, family in _TABLE.items()},
    **{model_type: _TABLE[name] for model_type, name in _OTHER_TYPES.items()},
}
"""By `model_type`, of the text model and of its wrapper."""


def family_of(*model_types: str | None) -> Family:
    """Return the family of the first of a wrapper's and its text model's types, or `DEFAULT`."""
    return next((FAMILIES[name] for name in model_types if name and name in FAMILIES), DEFAULT)


def family_type(model_type: str) -> str:
    """Return the name in the table of a model type's family; the type itself if it has none."""
    name = _OTHER_TYPES.get(model_type, model_type)
    return name if name in _TABLE else name.removesuffix("_text")


def _stacks_by_last_name() -> Mapping[str, list[Stack]]:
    """The stacks of all families, by the last name of the raw key without `.weight`."""
    stacks = dict.fromkeys(stack for family in FAMILIES.values() for stack in family.stacks)
    by_last: Mapping[str, list[Stack]] = defaultdict(list)
    for stack in stacks:
        key = stack.key.removesuffix("$").removesuffix(r"\.weight")
        by_last[key.rpartition(r"\.")[2]].append(stack)
    return by_last


_STACKS = _stacks_by_last_name()


def experts_module(name: str) -> str | None:
    """Return the name in the output of the experts module that a raw linear belongs to.

    `name`, without `.weight`, may be a stack's; None if it is not that of an expert.
    """
    if expert := EXPERT_LINEAR.match(name):
        return expert["module"]
    for stack in _STACKS.get(name.rpartition(".")[2], ()):
        for key in (name, f"{name}.weight"):
            if match := re.match(stack.key, key):
                return stack.experts.format(stem=match["stem"])
    return None


def is_stack(name: str) -> bool:
    """True if `name`, without `.weight`, is a tensor of all experts of a layer."""
    if EXPERT_LINEAR.match(name) or name.endswith("bias"):
        return False
    return experts_module(name) is not None
