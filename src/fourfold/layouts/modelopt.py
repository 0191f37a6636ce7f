"""The ModelOpt layout: tensor names and configuration that vLLM, SGLang and TensorRT-LLM read.

    <linear>.weight          U8       [out, in/2]   two E2M1 codes a byte, low nibble first
    <linear>.weight_scale    F8_E4M3  [out, in/16]  block scales
    <linear>.weight_scale_2  F32      []            global scale, a multiplier
    <linear>.input_scale     F32      []            W4A4 only: largest input / (6·448)
    <attention>.k_proj.k_scale, .v_proj.v_scale     calibrated FP8 KV cache: amax / 448

`config.json` gets one more key, `quantization_config`, and is otherwise the source's;
`hf_quant_config.json` says the same for TensorRT-LLM. Only this module knows these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fourfold._version import __version__

BLOCK_SIZE = 16
CODES = "weight"
BLOCK_SCALE = "weight_scale"
GLOBAL_SCALE = "weight_scale_2"

INPUT_SCALE = "input_scale"
K_SCALE, V_SCALE = "k_scale", "v_scale"
FP8_MAX = 448.0

PARTS = frozenset({BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE, K_SCALE, V_SCALE})
"""Last names of tensors that belong to a quantized layer or to its KV cache."""

LEFTOVER = re.compile(
    r"(_amax|_quantizer(\..*)?|\.weight_packed|\.weight_global_scale|\.input_global_scale"
    r"|\.pre_quant_scale|\.weight_zero_point)$"
)
"""Tensors of quantizers and of other layouts, which no loader of this one expects."""

QUANT_CONFIG = "hf_quant_config.json"


def tensors_of(
    linear: str, shape: tuple[int, int], *, activations: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What one quantized linear weight `[out, in]` becomes: name → dtype, shape."""
    rows, cols = shape
    made: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{linear}.{CODES}": ("U8", (rows, cols // 2)),
        f"{linear}.{BLOCK_SCALE}": ("F8_E4M3", (rows, cols // BLOCK_SIZE)),
        f"{linear}.{GLOBAL_SCALE}": ("F32", ()),
    }
    if activations:
        made[f"{linear}.{INPUT_SCALE}"] = ("F32", ())
    return made


def kv_scale_names(linears: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Names of `k_scale` and `v_scale` by attention module, among a model's linear layers.

    Where keys have no layer of their own (MLA's latent cache, DBRX's Wqkv), engines take 1.0. A
    `k_proj` beside which nothing makes values makes both (Gemma 4).
    """
    names, found = set(linears), {}
    of_values = {name.rpartition(".v_")[0] for name in names}
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        if leaf == "k_proj" and (f"{parent}.v_proj" in names or parent not in of_values):
            found[parent] = f"{name}.{K_SCALE}", f"{parent}.v_proj.{V_SCALE}"
        elif leaf == "qkv_proj":
            found[parent] = f"{name}.{K_SCALE}", f"{name}.{V_SCALE}"
    return found


def quantization_config(
    ignore: Sequence[str], *, activations: bool, kv_cache: bool
) -> dict[str, Any]:
    """The value of `quantization_config` in config.json.

    `activations`: whether inputs are quantized too (W4A4); else weights only (W4A16).
    """
    fp4 = {"num_bits": 4, "type": "float", "group_size": BLOCK_SIZE, "dynamic": False}
    group: dict[str, Any] = {"weights": fp4, "targets": ["Linear"]}
    if activations:
        group["input_activations"] = dict(fp4)
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": _algorithm(activations),
        "config_groups": {"group_0": group},
        "group_size": BLOCK_SIZE,
        "ignore": list(ignore),
        "producer": _PRODUCER,
    }
    if kv_cache:
        config["kv_cache_scheme"] = {"type": "float", "num_bits": 8, "dynamic": False}
    return config


def hf_quant_config(ignore: Sequence[str], *, activations: bool, kv_cache: bool) -> dict[str, Any]:
    """The contents of hf_quant_config.json, in agreement with `quantization_config`."""
    return {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": _algorithm(activations),
            "kv_cache_quant_algo": "FP8" if kv_cache else None,
            "group_size": BLOCK_SIZE,
            "exclude_modules": list(ignore),
        },
    }


def is_quantized(config: Mapping[str, Any]) -> str | None:
    """What a config.json says of quantization that was done already; None where nothing."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        if isinstance(found, dict) and found:
            return str(found.get("quant_algo") or found.get("quant_method") or "unknown")
    return None


def _algorithm(activations: bool) -> str:
    return "NVFP4" if activations else "W4A16_NVFP4"


_PRODUCER = {"name": "fourfold", "version": __version__}
