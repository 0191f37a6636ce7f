# SPDX-License-Identifier: Apache-2.0
"""Which engine serves a checkpoint, on which hardware, with which command. All of it is data.

The model card, the closing lines of `quantize` and docs/serving.md say what stands here.

Versions: vLLM 0.33.0, SGLang 0.5.23, TensorRT-LLM's public source, llama.cpp as of October 2026
(`scripts/engines/llama_cpp.py` runs it).
Their loaders have taken fourfold's outputs on a CPU (docs/support.md says which); what they do on
each GPU was read in their source and issues, and not run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from fourfold.formats.kv_cache import KVFormat
from fourfold.models.config_groups import LIBRARY as COMPRESSED_TENSORS
from fourfold.models.config_groups import READERS
from fourfold.models.families import Engine, family_of, family_type
from fourfold.models.roles import Role
from fourfold.planning import Plan
from fourfold.recipes import DEFAULT_LAYOUT
from fourfold.storage.quant_summary import QuantSummary

LLAMA_CPP = "llama.cpp"

NVFP4 = "nvfp4"


class Hardware(StrEnum):
    """Machines that differ in what they do with NVFP4."""

    ADA = "Ampere, Ada"
    HOPPER = "Hopper"
    BLACKWELL = "Blackwell"
    RTX = "RTX Blackwell"
    SPARK = "DGX Spark"
    CPU = "CPU"


EXAMPLES: Mapping[Hardware, str] = {
    Hardware.ADA: "A100, RTX 30 and 40, L40S",
    Hardware.HOPPER: "H100, H200, GH200",
    Hardware.BLACKWELL: "B200, B300, GB200, GB300",
    Hardware.RTX: "RTX 50, RTX PRO 6000",
    Hardware.SPARK: "GB10",
    Hardware.CPU: "also Apple's, and GPUs of others",
}


class Use(NamedTuple):
    """An engine's support of a checkpoint on some hardware; None where it does not run it."""

    w4a16: str | None
    w4a4: str | None


_MARLIN = "16-bit activations (Marlin)"
_WEIGHTS_ONLY = "weights alone in 4 bits, 16-bit activations (Marlin)"
_FP4 = "4-bit activations (FP4 kernels)"
_FP4_IN_SOME = "4-bit activations where the build has FP4 kernels for this GPU, otherwise Marlin"
_NOT_YET = "only in versions since August 2026"
_OPT_IN = "16-bit activations, if Marlin is chosen in the options"
_EIGHT_BITS = "8-bit activations"
_WITHOUT_FP4 = "16-bit activations (FlashInfer or Marlin)"
_SCALES_OF_ONE = (
    "0.5.23 rounds activations all the same, with scales of 1: take W4A4 or vLLM (later versions "
    "may take Marlin)"
)

USES: Mapping[str, Mapping[Hardware, Use]] = {
    Engine.VLLM: {
        Hardware.ADA: Use(_MARLIN, _WEIGHTS_ONLY),
        Hardware.HOPPER: Use(_MARLIN, _WEIGHTS_ONLY),
        Hardware.BLACKWELL: Use(_MARLIN, _FP4),
        Hardware.RTX: Use(_MARLIN, _FP4_IN_SOME),
        Hardware.SPARK: Use(_MARLIN, _FP4_IN_SOME),
    },
    Engine.SGLANG: {
        Hardware.ADA: Use(_MARLIN, _WEIGHTS_ONLY),
        Hardware.HOPPER: Use(_MARLIN, _WEIGHTS_ONLY),
        Hardware.BLACKWELL: Use(_SCALES_OF_ONE, _FP4),
        Hardware.RTX: Use(_SCALES_OF_ONE, _FP4_IN_SOME),
        Hardware.SPARK: Use(_SCALES_OF_ONE, _FP4_IN_SOME),
    },
    Engine.TRTLLM: {
        Hardware.HOPPER: Use(None, _OPT_IN),
        Hardware.BLACKWELL: Use(None, _FP4),
        Hardware.RTX: Use(_NOT_YET, _FP4),
        Hardware.SPARK: Use(None, _FP4),
    },
    LLAMA_CPP: {Hardware.CPU: Use(_EIGHT_BITS, _EIGHT_BITS)},
}
"""By engine and hardware. What is missing is not known to run."""


class Experts(StrEnum):
    """llama.cpp's treatment of the global scales of a family's NVFP4 experts."""

    USED = "used"
    IGNORED = "loaded and ignored: the text is noise, or NaN"
    UNKNOWN = "not known to be used"


_USED = (
    "qwen3_moe", "qwen3_next", "qwen3_5_moe", "gemma4", "nemotron_h", "hy_v3", "cohere2_moe",
    "deepseek_v32", "glm_moe_dsa",
)  # fmt: skip
_IGNORED = (
    "glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3", "qwen2_moe", "olmoe", "minimax_m2",
    "granitemoe", "ernie4_5_moe", "exaone_moe", "afmoe", "laguna", "solar_open",
)  # fmt: skip
EXPERTS_IN_LLAMA_CPP: Mapping[str, Experts] = {
    **dict.fromkeys(_USED, Experts.USED),
    **dict.fromkeys(_IGNORED, Experts.IGNORED),
}
"""By family. All others: not known."""

LLAMA_CPP_WIDTH = 64
"""llama.cpp stores 64 values a block: every input width must be a multiple of that."""


@dataclass(frozen=True)
class Served:
    """The facts of a checkpoint that the commands to serve it depend on."""

    model_type: str
    has_experts: bool
    """True if routed experts are quantized."""
    is_w4a4: bool
    kv_cache: KVFormat | None
    """The format of the KV cache that the configuration states."""
    widths: frozenset[int]
    """Input widths of the quantized weights."""
    is_mixed: bool = False
    """True if weights of another format lie beside those in NVFP4."""
    layout: str = DEFAULT_LAYOUT
    """The name of the checkpoint's layout."""

    @classmethod
    def of_plan(cls, plan: Plan) -> Served:
        return cls(
            plan.inventory.model_types[0],
            any(linear.role is Role.EXPERTS for linear in plan.linears),
            any(x.weights == x.activations == NVFP4 for x in plan.schemes.values()),
            plan.recipe.kv_format,
            frozenset(linear.shape[1] for linear in plan.linears),
            any(scheme.weights != NVFP4 for scheme in plan.schemes.values()),
            plan.recipe.layout,
        )

    @classmethod
    def of_summary(cls, summary: QuantSummary) -> Served:
        return cls(
            summary.model_type,
            any(linear.role == Role.EXPERTS for linear in summary.linears),
            any(x.input_scale is not None and x.format == NVFP4 for x in summary.linears),
            _kv_cache(summary.recipe),
            frozenset(linear.shape[1] for linear in summary.linears),
            any(linear.format != NVFP4 for linear in summary.linears),
            summary.recipe.get("layout", DEFAULT_LAYOUT),
        )

    @property
    def engines(self) -> Sequence[Engine]:
        """The engines whose loaders take the layout, and the family's names; of a dense model, any.

        Mixed precision was read in vLLM's loader alone.
        """
        engines = family_of(self.model_type).readers if self.has_experts else tuple(Engine)
        if self.is_compressed_tensors:
            engines = tuple(engine for engine in engines if engine in READERS)
        return [x for x in engines if x is Engine.VLLM] if self.is_mixed else engines

    @property
    def is_compressed_tensors(self) -> bool:
        """True if the layout is that of compressed-tensors, which fewer engines read."""
        return self.layout == COMPRESSED_TENSORS


def _kv_cache(recipe: Mapping[str, Any]) -> KVFormat | None:
    entry = recipe.get("kv_cache", "none")
    return entry.get("format", "fp8") if isinstance(entry, Mapping) else None


def serve_commands(engine: str, folder: str, served: Served) -> list[str]:
    """Return the lines to type into a shell to serve the checkpoint in `folder`."""
    name = shlex.quote(folder)
    match engine:
        case Engine.VLLM:
            return [f"vllm serve {name}"]
        case Engine.SGLANG:
            dtype = {None: "", "fp8": "fp8_e4m3", "nvfp4": "nvfp4"}[served.kv_cache]
            method = "" if served.is_compressed_tensors else " --quantization modelopt_fp4"
            kv_cache = f" --kv-cache-dtype {dtype}" if dtype else ""
            return [f"python -m sglang.launch_server --model-path {name}{method}{kv_cache}"]
        case Engine.TRTLLM:
            return [f"trtllm-serve {name}"]
        case _:
            return [
                f"python llama.cpp/convert_hf_to_gguf.py {name} --outfile model.gguf",
                "llama-server -m model.gguf",
            ]


def obstacle_in_llama_cpp(served: Served) -> str:
    """Return why llama.cpp cannot run a checkpoint, or is not known to; empty if it can."""
    if served.is_compressed_tensors:
        return f"nobody has tried its converter on fourfold's {COMPRESSED_TENSORS} layout"
    if served.is_mixed:
        return "nobody has tried its converter on FP8 beside NVFP4"
    if odd := sorted(width for width in served.widths if width % LLAMA_CPP_WIDTH):
        return (
            f"its converter refuses input widths that {LLAMA_CPP_WIDTH} does not divide ({odd[0]})"
        )
    if not served.has_experts:
        return ""
    names = family_of(served.model_type).names
    if "proj" not in names.down:
        return f"its converter does not know experts named {names.up} and {names.down}"
    use = EXPERTS_IN_LLAMA_CPP.get(family_type(served.model_type), Experts.UNKNOWN)
    return "" if use is Experts.USED else f"the experts' global scales are {use}"


def closing_line(folder: str, served: Served) -> str:
    """Return the line with which `quantize` says how to serve what it wrote."""
    if not served.engines:
        return "serve it: no engine is known to read this family's experts in NVFP4"
    command = serve_commands(served.engines[0], folder, served)[0]
    return f"serve it: {command}    (other engines and GPUs: README.md beside it)"


def _use(engine: str, hardware: Hardware, served: Served) -> str | None:
    use = USES[engine].get(hardware, Use(None, None))
    if served.is_compressed_tensors and use.w4a16 == _SCALES_OF_ONE:
        use = use._replace(w4a16=_WITHOUT_FP4)
    return use.w4a4 if served.is_w4a4 else use.w4a16


def uses(served: Served) -> list[tuple[str, ...]]:
    """Return a table of what each engine does with a checkpoint on each hardware, with heads."""
    engines = list(served.engines)
    rows = [
        (
            f"{hardware} ({EXAMPLES[hardware]})",
            *(_use(engine, hardware, served) or "not known to run" for engine in engines),
        )
        for hardware in Hardware
        if hardware is not Hardware.CPU
    ]
    return [("hardware", *engines), *rows]
