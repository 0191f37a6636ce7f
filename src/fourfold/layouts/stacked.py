# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's layout with the experts of a layer stacked, for the families that engines read so.

    one by one   experts.E.gate_proj.weight U8 [out, in/2], .weight_scale, .weight_scale_2, …
    stacked      experts.gate_up_proj U8 [E, 2·out, in/2], experts.gate_up_proj_weight_scale, …

Codes and scales are the same bytes; a layer's experts lie in one tensor for each part. Everything
else, the configuration files included, is as in `modelopt`: engines see one experts module.

`STACKED` says how the tensors of each family are called. It was read in these loaders (vLLM 0.33.0,
SGLang 0.5.23, TensorRT-LLM's public source):

    inkling     vLLM    models/inkling/nvidia/moe.py, InklingMoE.load_expert_weight
    llama4      TRT-LLM _torch/modules/fused_moe/quantization.py, FUSED_GATE_UP_PROJ
    muse_spark  vLLM    models/muse_spark/common/moe.py, MuseSparkConsolidatedRoutedExperts
                SGLang  layers/muse_spark/muse_spark_nvfp4_moe.py, MuseSparkNvFp4FusedMoEMethod
    step3p7     SGLang  models/step3p5.py, Step3p5ForCausalLM.load_weights

They take W4A4: without input scales, some read memory that nothing was written to, others stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.errors import PlanError
from fourfold.formats.scheme import Scheme
from fourfold.layouts.modelopt import BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE, ModelOpt
from fourfold.layouts.stacks import Numbers, Stack
from fourfold.models.families import Engine, family_type
from fourfold.models.names import EXPERT_LINEAR
from fourfold.models.peculiarities import Peculiarities

INPUT_AMAX = 6.0 * 448.0
"""An input's largest magnitude over its `input_scale`."""


@dataclass(frozen=True, slots=True)
class StackedFamily:
    """How a family's experts are stacked, and the engines that read them so."""

    readers: tuple[Engine, ...]
    stacks: tuple[Stack, ...]


def _as_parameters(name: str, *projections: str) -> Stack:
    """Names with underscores, as transformers' parameter has them."""
    each = len(projections) > 1
    numbers = {
        "global_scale": Numbers(f"_{GLOBAL_SCALE}", per_projection=each),
        "input_scale": Numbers(f"_{INPUT_SCALE}", per_projection=each),
    }
    return Stack(name, projections, {"codes": "", "block_scale": f"_{BLOCK_SCALE}"}, numbers)


def _as_linear(projection: str) -> Stack:
    """Names of a linear layer."""
    numbers = {
        "global_scale": Numbers(f".{GLOBAL_SCALE}"),
        "input_scale": Numbers(f".{INPUT_SCALE}"),
    }
    parts = {"codes": ".weight", "block_scale": f".{BLOCK_SCALE}"}
    return Stack(projection, (projection,), parts, numbers, is_inside=False)


def _as_inkling(name: str, *projections: str) -> Stack:
    """Inkling's own names."""
    numbers = {
        "global_scale": Numbers(".scale2"),
        "input_scale": Numbers(".input_amax", per_layer=True, factor=INPUT_AMAX),
    }
    parts = {"codes": "", "block_scale": ".scale"}
    return Stack(name, projections, parts, numbers, is_interleaved=len(projections) > 1)


def _as_llama4(name: str, *projections: str) -> Stack:
    """As NVIDIA's own exports have it: transposed, and one number for the whole layer."""
    numbers = {
        "global_scale": Numbers(f"_{GLOBAL_SCALE}", per_layer=True),
        "input_scale": Numbers(f"_{INPUT_SCALE}", per_layer=True),
    }
    parts = {"codes": "", "block_scale": f"_{BLOCK_SCALE}"}
    return Stack(name, projections, parts, numbers, is_transposed=True)


_GATE, _UP, _DOWN = "gate_proj", "up_proj", "down_proj"

STACKED: Mapping[str, StackedFamily] = {
    "inkling": StackedFamily(
        (Engine.VLLM,), (_as_inkling("w13_weight", _GATE, _UP), _as_inkling("w2_weight", _DOWN))
    ),
    "llama4": StackedFamily(
        (Engine.TRTLLM,),
        (_as_llama4("gate_up_proj", _GATE, _UP), _as_llama4("down_proj", _DOWN)),
    ),
    "muse_spark": StackedFamily(
        (Engine.VLLM, Engine.SGLANG),
        (_as_parameters("gate_up_proj", _GATE, _UP), _as_parameters("down_proj", _DOWN)),
    ),
    "step3p7": StackedFamily(
        (Engine.SGLANG,), (_as_linear(_GATE), _as_linear(_UP), _as_linear(_DOWN))
    ),
}
"""By the family's name in `models.families`."""


def stacks_of(config: Mapping[str, Any]) -> tuple[Stack, ...]:
    """Return how the experts of a config.json's family are stacked; empty if it is not known."""
    family = STACKED.get(family_type(str(config.get("model_type"))))
    return () if family is None else family.stacks


class StackedModelOpt(ModelOpt):
    """ModelOpt's layout with stacked experts."""

    name = "modelopt-stacked"
    only_converts = True

    def stacks(self, config: Mapping[str, Any]) -> tuple[Stack, ...]:
        if not (stacks := stacks_of(config)):
            raise PlanError(
                f"the {self.name} layout: no engine is known to read stacked NVFP4 experts of "
                f"{config.get('model_type')}. It is for {', '.join(STACKED)}."
            )
        return stacks

    def check(self, schemes: Mapping[str, Scheme], peculiar: Peculiarities) -> None:
        super().check(schemes, peculiar)
        for linear, scheme in schemes.items():
            if EXPERT_LINEAR.match(linear) and not scheme.has_input_scale:
                raise PlanError(
                    f"{linear} is {scheme}, and engines read stacked experts in W4A4 alone. "
                    "Quantize the model with a recipe nvfp4_…, and convert that."
                )
