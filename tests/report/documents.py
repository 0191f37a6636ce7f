# SPDX-License-Identifier: Apache-2.0
"""Summary documents as fourfold writes them, of models that are not there."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT = ("gate_proj", "up_proj", "down_proj")
RECIPE = {
    "name": "nvfp4_default_mse-fp8_kv",
    "description": "NVFP4 W4A4 for all linear layers, calibrated FP8 KV cache",
    "weights": {"format": "nvfp4", "scale": "mse"},
    "activations": {"format": "nvfp4", "amax": "max"},
    "kv_cache": {"format": "fp8", "scale": "calibrated"},
    "quantize": ["experts"],
    "quantize_if_present": ["attention"],
    "keep": ["*.layers.0.self_attn.*"],
}


def document(
    layers: int = 4,
    experts: int = 16,
    *,
    hidden: int = 2048,
    inner: int = 768,
    tokens: int = 65_536,
    tokens_of: Mapping[tuple[int, int], int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A calibrated W4A4 document; `tokens_of` sets what (layer, expert) saw."""
    dice = random.Random(seed)
    seen = [_tokens(dice, experts, tokens) for _ in range(layers)]
    for (layer, expert), count in (tokens_of or {}).items():
        seen[layer][expert] = count
    linears = [
        each
        for layer in range(layers)
        for each in _layer(dice, layer, seen[layer], hidden, inner, tokens)
    ]
    linears.sort(key=lambda each: each["name"])
    return {
        "producer": "fourfold 0.2.0",
        "schema_version": 1,
        "versions": {"fourfold": "0.2.0", "torch": "2.13.0", "numpy": "2.4.0"},
        "model": "Folded-30B-A3B",
        "model_type": "qwen3_moe",
        "architecture": "Qwen3MoeForCausalLM",
        "recipe": RECIPE,
        "ledger": _ledger(linears),
        "roles": _roles(linears),
        "calibration": {
            "origin": "the embedded mixed text",
            "digest": "9f2c" * 16,
            "samples": tokens // 512,
            "seq": 512,
            "tokens": tokens,
            "all_experts": False,
            "unreached_experts": sum(row.count(0) for row in seen),
        },
        "experts": [
            {"module": f"model.layers.{layer}.mlp.experts", "layer": layer, "tokens": row}
            for layer, row in enumerate(seen)
        ],
        "kv_cache": [_kv_scale(dice, layer) for layer in range(layers)],
        "files": ["model-00001-of-00001.safetensors"],
        **{name: [] for name in ("shards", "raw_tensors", "biases")},
        "linears": linears,
    }


def with_budget(full: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with a budget that was spent on one of two components."""
    first = {"moved": {}, "bits": 4.5, "kl": 0.05, "other_kl": 0.06}
    last = {"moved": {"layers.<0>.o_proj": "fp8"}, "bits": 4.625, "kl": 0.0321, "other_kl": 0.0432}
    facts = {"role": "attention", "layer": 0, "weights": 4096}
    return {
        **full,
        "budget": {
            "recipe": RECIPE,
            "text": "mine.jsonl",
            "tokens": 8192,
            "other_tokens": 4096,
            "curve": [first, last],
            "components": [
                {"name": "layers.<0>.o_proj", "option": "fp8", "format": "FP8", **facts}
                | {"kl": {"fp8": 0.0321}},
                {"name": "layers.0.experts", "option": "recipe", "format": "NVFP4 W4A4", **facts}
                | {"kl": {"bf16": 0.04}},
            ],
        },
    }


def weights_only(full: Mapping[str, Any]) -> dict[str, Any]:
    """The same as W4A16: nothing was calibrated."""
    bare = {**full, "calibration": None, "experts": [], "kv_cache": []}
    bare["recipe"] = {**full["recipe"], "activations": "none", "kv_cache": "none"}
    nothing = {"input_amax": None, "input_scale": None, "tokens": None}
    bare["linears"] = [{**each, **nothing} for each in full["linears"]]
    return bare


def _tokens(dice: random.Random, experts: int, tokens: int) -> list[int]:
    weights = [dice.lognormvariate(0, 0.9) for _ in range(experts)]
    return [int(tokens * 8 * weight / sum(weights)) + 1 for weight in weights]


def _layer(
    dice: random.Random, layer: int, seen: list[int], hidden: int, inner: int, tokens: int
) -> list[dict[str, Any]]:
    at = f"model.layers.{layer}"
    found = [
        _linear(dice, f"{at}.self_attn.{name}", "attention", (hidden, hidden), layer, None, tokens)
        for name in ATTENTION
    ]
    for expert, count in enumerate(seen):
        for name in EXPERT:
            shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
            place = f"{at}.mlp.experts.{expert}.{name}"
            found.append(_linear(dice, place, "experts", shape, layer, expert, count))
    return found


def _linear(
    dice: random.Random,
    name: str,
    role: str,
    shape: tuple[int, int],
    layer: int,
    expert: int | None,
    tokens: int,
) -> dict[str, Any]:
    amax = 0.3 * dice.lognormvariate(0, 0.3)
    drift = 1 + 0.04 / (1 + layer) + (0.006 if role == "experts" else 0)
    input_amax = 6.0 * dice.lognormvariate(0.08 * layer, 0.25)
    return {
        "name": name,
        "role": role,
        "shape": list(shape),
        "format": "nvfp4",
        "layer": layer,
        "expert": expert,
        "global_scale": amax / 2688,
        "amax": amax,
        "input_amax": input_amax,
        "input_scale": input_amax / 2688,
        "tokens": tokens,
        "relative_error": float(f"{0.0945 * drift * dice.lognormvariate(0, 0.008):.4g}"),
    }


def _kv_scale(dice: random.Random, layer: int) -> dict[str, Any]:
    k, v = 0.03 * dice.lognormvariate(0, 0.2), 0.004 * dice.lognormvariate(0.03 * layer, 0.2)
    return {"name": f"model.layers.{layer}.self_attn", "k_scale": k, "v_scale": v}


def _numel(linears: list[dict[str, Any]], role: str) -> int:
    return sum(each["shape"][0] * each["shape"][1] for each in linears if each["role"] == role)


def _roles(linears: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [("embedding", 1, 311_164_928), ("lm_head", 1, 311_164_928), ("other", 9, 200_000)]
    found = [
        {
            "role": role,
            "what": "quantized",
            "tensors": sum(each["role"] == role for each in linears),
            "linear_weights": sum(each["role"] == role for each in linears),
            "bytes_before": 2 * _numel(linears, role),
            "bytes_after": _numel(linears, role) * 9 // 16,
            "numel": _numel(linears, role),
        }
        for role in ("experts", "attention")
    ]
    return found + [
        {
            "role": role,
            "what": "kept bit for bit",
            "tensors": tensors,
            "linear_weights": 0,
            "bytes_before": 2 * numel,
            "bytes_after": 2 * numel,
            "numel": numel,
        }
        for role, tensors, numel in kept
    ]


def _ledger(linears: list[dict[str, Any]]) -> dict[str, int]:
    roles = _roles(linears)
    return {
        "source_tensors": sum(role["tensors"] for role in roles),
        "linear_weights_planned": len(linears),
        "linear_weights_quantized": len(linears),
        "tensors_written": 4 * len(linears) + 11,
        "bytes_before": sum(role["bytes_before"] for role in roles),
        "bytes_after": sum(role["bytes_after"] for role in roles),
    }
