# SPDX-License-Identifier: Apache-2.0
"""What a plan notes of the inputs of quantized layers, and of the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fourfold.models.inventory import Inventory
from fourfold.models.roles import Role
from fourfold.planning.rows import ScaleGroup
from fourfold.recipes import Recipe

NVFP4_KV_CACHE = (
    "kv_cache nvfp4: vLLM 0.33 reads it, through FlashInfer, on GPUs since Ampere; SGLang 0.5.23 "
    "on Blackwell, if its option kv-cache-dtype says nvfp4; TensorRT-LLM on Blackwell"
)
"""vLLM takes it from `kv_cache_scheme` in config.json, TensorRT-LLM from hf_quant_config.json."""

_LATENT = frozenset({"wkv", "kv_proj"})
"""Layers that make keys and values in one, of families whose config.json states no rank."""

_HEAD_SIZES = (64, 128, 256, 512)
"""Those of vLLM's FlashInfer backend."""


def input_notes(groups: Iterable[ScaleGroup]) -> Iterator[str]:
    """Yield a note on inputs whose scale is not measured."""
    count = sum(
        len(group.linears)
        for group in groups
        if group.scheme.has_input_scale and not group.scheme.observes_inputs
    )
    if count:
        yield (
            f"the inputs of {count:,} linear weights get the scale 1 (amax: constant); no "
            "calibration measures them"
        )


def kv_cache_notes(
    recipe: Recipe, inventory: Inventory, config: Mapping[str, Any]
) -> Iterator[str]:
    """Yield notes on the engines that read an NVFP4 KV cache, and on what of this model keeps them
    from it."""
    if recipe.kv_format != "nvfp4":
        return
    yield NVFP4_KV_CACHE
    if is_latent(inventory, config):
        yield "kv_cache nvfp4: vLLM 0.33 refuses it for MLA's latent cache; choose fp8"
    size = head_size(config)
    if size is not None and size not in _HEAD_SIZES:
        yield f"kv_cache nvfp4: vLLM 0.33 has no kernels for it with heads of {size}; choose fp8"
    elif size == _HEAD_SIZES[0]:
        yield "kv_cache nvfp4: with heads of 64, vLLM 0.33 reads it on B200 and B300 alone"
    if any(key.endswith(".sinks") for key in inventory.tensors):
        yield "kv_cache nvfp4: with attention sinks, vLLM 0.33 reads it on B200 and B300 alone"


def head_size(config: Mapping[str, Any]) -> int | None:
    """Return the size of an attention head, as config.json states it; None if it does not."""
    text = _text(config)
    size, hidden, heads = (
        text.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads")
    )
    if size is None and isinstance(hidden, int) and isinstance(heads, int):
        size = hidden // heads
    return size if isinstance(size, int) else None


def is_latent(inventory: Inventory, config: Mapping[str, Any]) -> bool:
    """True if attention caches latent vectors, of which keys and values are made (MLA)."""
    if _text(config).get("kv_lora_rank") is not None:
        return True
    names = {x.name.rpartition(".")[2] for x in inventory.linears if x.role is Role.ATTENTION}
    return not names.isdisjoint(_LATENT)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
