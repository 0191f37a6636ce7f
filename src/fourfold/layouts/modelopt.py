# SPDX-License-Identifier: Apache-2.0
"""The ModelOpt layout: tensor names and configuration that vLLM, SGLang and TensorRT-LLM read.

    <linear>.weight          U8       [out, in/2]   two E2M1 codes a byte, low nibble first
    <linear>.weight_scale    F8_E4M3  [out, in/16]  block scales
    <linear>.weight_scale_2  F32      []            global scale, a multiplier
    <linear>.input_scale     F32      []            W4A4 only: largest input / (6·448)
    <attention>.k_proj.k_scale, .v_proj.v_scale     calibrated FP8 KV cache: amax / 448

`config.json` gets one more key, `quantization_config`, and is otherwise the source's;
`hf_quant_config.json` says the same to TensorRT-LLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fourfold._version import __version__
from fourfold.errors import PlanError
from fourfold.formats.base import FORMATS
from fourfold.formats.kv_cache import KVFormat
from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import CheckpointContents, Layout, layers_of_keys
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
_PRODUCER = {"name": "fourfold", "version": __version__}


class ModelOpt(Layout):
    """The layout that NVIDIA's Model Optimizer writes.

    A checkpoint has one algorithm (`quant_algo`) for all of its layers.
    """

    name = "modelopt"
    marker_files = (QUANT_CONFIG,)
    kv_formats = frozenset({"fp8", "nvfp4"})
    suffixes = {  # noqa: RUF012
        "nvfp4": {
            "codes": CODES,
            "block_scale": BLOCK_SCALE,
            "global_scale": GLOBAL_SCALE,
            "input_scale": INPUT_SCALE,
        }
    }

    def check(self, schemes: Mapping[str, Scheme]) -> None:
        kinds: dict[tuple[str, str | None], str] = {}
        for linear, scheme in schemes.items():
            if scheme.weights not in self.suffixes:
                raise PlanError(
                    f"{linear}: the ModelOpt layout has no names for {scheme.weights} weights. "
                    f"Choose weights: {{format: {' | '.join(self.suffixes)}}}."
                )
            if scheme.activations not in (None, scheme.weights):
                raise PlanError(
                    f"{linear}: the ModelOpt layout cannot say {scheme}. "
                    f"Choose activations: none, or {{format: {scheme.weights}}}."
                )
            kinds.setdefault((scheme.weights, scheme.activations), linear)
        if len(kinds) > 1:
            one, other = list(kinds.values())[:2]
            raise PlanError(
                f"{one} would be {schemes[one]} and {other} {schemes[other]}: the ModelOpt layout "
                "has one quant_algo for all layers. Give all rules of the recipe the same "
                "activations, or keep some of the layers."
            )

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
        algorithm, block, has_activations = _summary(contents)
        fp4 = {"num_bits": 4, "type": "float", "group_size": block, "dynamic": False}
        group: dict[str, Any] = {"weights": fp4, "targets": ["Linear"]}
        if has_activations:
            group["input_activations"] = dict(fp4)
        config: dict[str, Any] = {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "config_groups": {"group_0": group},
            "group_size": block,
            "ignore": list(contents.ignore),
            "producer": _PRODUCER,
        }
        if contents.kv_cache is not None:
            config["kv_cache_scheme"] = dict(_KV_SCHEMES[contents.kv_cache])
        return config

    def config_files(self, contents: CheckpointContents) -> dict[str, dict[str, Any]]:
        algorithm, block, _ = _summary(contents)
        return {
            QUANT_CONFIG: {
                "producer": _PRODUCER,
                "quantization": {
                    "quant_algo": algorithm,
                    "kv_cache_quant_algo": _kv_algorithm(contents),
                    "group_size": block,
                    "exclude_modules": list(contents.ignore),
                },
            }
        }

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        entry = config.get("quantization_config")
        if not isinstance(entry, Mapping):
            return False
        return str(entry.get("quant_method", "")).startswith("modelopt")


def _kv_algorithm(contents: CheckpointContents) -> str | None:
    return None if contents.kv_cache is None else contents.kv_cache.upper()


def _summary(contents: CheckpointContents) -> tuple[str, int, bool]:
    """The algorithm's name, the block size, and True if activations are quantized; all schemes
    agree on these, see `check`."""
    scheme = next(iter(contents.schemes.values()))
    algorithm = "NVFP4" if scheme.activations else "W4A16_NVFP4"
    return algorithm, FORMATS[scheme.weights].block, scheme.activations is not None
