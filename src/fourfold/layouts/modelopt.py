# SPDX-License-Identifier: Apache-2.0
"""The ModelOpt layout: tensor names and configuration that vLLM, SGLang and TensorRT-LLM read.

    <linear>.weight          U8       [out, in/2]   two E2M1 codes a byte, low nibble first
    <linear>.weight_scale    F8_E4M3  [out, in/16]  block scales
    <linear>.weight_scale_2  F32      []            global scale, a multiplier
    <linear>.input_scale     F32      []            W4A4 only: largest input / (6·448)
    <attention>.k_proj.k_scale, .v_proj.v_scale     calibrated FP8 KV cache: amax / 448

    FP8   <linear>.weight F8_E4M3 [out, in], .weight_scale F32: [] with .input_scale F32 [],
          [out] for channels, [⌈out/128⌉, 1, in/128, 1] for blocks; U8 [out, in/32] for MXFP8

`config.json` gets one more key, `quantization_config`, and is otherwise the source's;
`hf_quant_config.json` says the same to TensorRT-LLM. Where weights differ in their formats,
`quant_algo` is MIXED_PRECISION, and `quantized_layers` has the algorithm of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fourfold._version import __version__
from fourfold.errors import PlanError
from fourfold.formats.base import FORMATS, Spec
from fourfold.formats.kv_cache import KVFormat
from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import CheckpointContents, Layout, check_some_nvfp4, layers_of_keys
from fourfold.models.engines import write_ignore
from fourfold.models.peculiarities import Peculiarities

CODES, BLOCK_SCALE, GLOBAL_SCALE = "weight", "weight_scale", "weight_scale_2"
INPUT_SCALE = "input_scale"
K_SCALE, V_SCALE = "k_scale", "v_scale"
QUANT_CONFIG = "hf_quant_config.json"

_LEFTOVER = re.compile(
    r"(_amax|_quantizer(\..*)?|\.weight_packed|\.weight_global_scale|\.input_global_scale"
    r"|\.pre_quant_scale|\.weight_zero_point)$"
)
_KV_SCHEMES: Mapping[KVFormat, Mapping[str, Any]] = {
    "fp8": {"type": "float", "num_bits": 8, "dynamic": False},
    "nvfp4": {"type": "float", "num_bits": 4, "dynamic": False, "group_size": 16},
}
"""vLLM knows NVFP4 by the bits and the type."""
_BLOCK = FORMATS["nvfp4"].block
_PRODUCER = {"name": "fourfold", "version": __version__}


ALGORITHMS: Mapping[tuple[str, str | None], str] = {
    ("nvfp4", "nvfp4"): "NVFP4",
    ("nvfp4", None): "W4A16_NVFP4",
    ("fp8", "fp8"): "FP8",
    ("fp8_channel", "fp8_channel"): "FP8_PER_CHANNEL_PER_TOKEN",
    ("fp8_block", "fp8_block"): "FP8_PB_WO",
    ("mxfp8", "mxfp8"): "MXFP8",
}
"""What `quant_algo` says of a linear weight, by the formats of weight and activations."""

MIXED = "MIXED_PRECISION"
"""`quant_algo` of a checkpoint whose `quantized_layers` have algorithms of their own."""

_SCALES = {"codes": CODES, "scale": BLOCK_SCALE}


class ModelOpt(Layout):
    """The layout that NVIDIA's Model Optimizer writes."""

    name = "modelopt"
    marker_files = (QUANT_CONFIG,)
    kv_formats = frozenset({"fp8", "nvfp4"})
    suffixes = {  # noqa: RUF012
        "nvfp4": {
            "codes": CODES,
            "block_scale": BLOCK_SCALE,
            "global_scale": GLOBAL_SCALE,
            "input_scale": INPUT_SCALE,
        },
        "fp8": {**_SCALES, "input_scale": INPUT_SCALE},
        "fp8_channel": _SCALES,
        "fp8_block": _SCALES,
        "mxfp8": {"codes": CODES, "exponents": BLOCK_SCALE},
    }

    def check(self, schemes: Mapping[str, Scheme], peculiar: Peculiarities) -> None:
        for linear, scheme in schemes.items():
            if scheme.weights not in self.suffixes:
                raise PlanError(
                    f"{linear}: the ModelOpt layout has no names for {scheme.weights} weights. "
                    f"Choose weights: {{format: {' | '.join(self.suffixes)}}}."
                )
            if (scheme.weights, scheme.activations) not in ALGORITHMS:
                none = "none, or " if (scheme.weights, None) in ALGORITHMS else ""
                raise PlanError(
                    f"{linear}: the ModelOpt layout cannot say {scheme}. "
                    f"Choose activations: {none}{{format: {scheme.weights}}}."
                )
        check_some_nvfp4(schemes)

    def encoded(self, part: str, spec: Spec) -> Spec:
        """As it is, but for the scales of 128×128 blocks, which have dimensions for the block."""
        dtype, shape = spec
        if part == "scale" and len(shape) == 2:
            return dtype, (shape[0], 1, shape[1], 1)
        return spec

    def is_leftover(self, name: str, dtype: str) -> bool:
        is_packed = name.rpartition(".")[2] == CODES and dtype == "U8"
        return is_packed or bool(_LEFTOVER.search(name))

    def kv_scale_names(self, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
        scales = {}
        for parent, name in layers_of_keys(linears).items():
            of_values = f"{parent}.v_proj" if name.endswith(".k_proj") else name
            scales[parent] = f"{name}.{self.k_scale}", f"{of_values}.{self.v_scale}"
        return scales

    def ignore(
        self, quantized: Sequence[str], kept: Sequence[str], peculiar: Peculiarities
    ) -> list[str]:
        return write_ignore(quantized, kept, peculiar)

    def quantization_config(self, contents: CheckpointContents) -> dict[str, Any]:
        config: dict[str, Any] = {"quant_method": "modelopt", **_algorithms(contents)}
        if config["quant_algo"] != MIXED:
            block, scheme = config.pop("group_size"), next(iter(contents.schemes.values()))
            fp4 = {"num_bits": 4, "type": "float", "group_size": block, "dynamic": False}
            group: dict[str, Any] = {"weights": fp4, "targets": ["Linear"]}
            if scheme.activations is not None:
                group["input_activations"] = dict(fp4)
            config |= {"config_groups": {"group_0": group}, "group_size": block}
        config |= {"ignore": list(contents.ignore), "producer": _PRODUCER}
        if contents.kv_cache is not None:
            config["kv_cache_scheme"] = dict(_KV_SCHEMES[contents.kv_cache])
        return config

    def config_files(self, contents: CheckpointContents) -> dict[str, dict[str, Any]]:
        algorithms = _algorithms(contents)
        body = {
            "quant_algo": algorithms.pop("quant_algo"),
            "kv_cache_quant_algo": _kv_algorithm(contents),
            **algorithms,
            "exclude_modules": list(contents.ignore),
        }
        return {QUANT_CONFIG: {"producer": _PRODUCER, "quantization": body}}

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        entry = config.get("quantization_config")
        if not isinstance(entry, Mapping):
            return False
        return str(entry.get("quant_method", "")).startswith("modelopt")


def _kv_algorithm(contents: CheckpointContents) -> str | None:
    return None if contents.kv_cache is None else contents.kv_cache.upper()


def _algorithms(contents: CheckpointContents) -> dict[str, Any]:
    """The algorithm of all linear weights and its group size, or the algorithm of each."""
    algorithms = {
        linear: ALGORITHMS[scheme.weights, scheme.activations]
        for linear, scheme in contents.schemes.items()
    }
    if len(set(algorithms.values())) == 1:
        return {"quant_algo": next(iter(algorithms.values())), "group_size": _BLOCK}
    layers = {
        linear: {"quant_algo": algorithm} | ({"group_size": _BLOCK} if "NVFP4" in algorithm else {})
        for linear, algorithm in algorithms.items()
    }
    return {"quant_algo": MIXED, "quantized_layers": layers}
