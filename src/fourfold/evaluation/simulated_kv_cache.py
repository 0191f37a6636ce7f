# SPDX-License-Identifier: Apache-2.0
"""A quantized KV cache inside a transformers model: keys and values are rounded as they enter it.

Attention gives its cache the keys after rotary embedding, and the values, and computes with what
the cache returns. Here every call of the model has a cache that rounds what it is given, before it
stores it: the caller's own cache, or a new one. So the tokens of a prompt attend to rounded keys
and values, too, as in vLLM, which writes into its cache before it reads.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from fourfold.calibration.kv_cache import KVCache, record_updates, recording_cache, usual_cache
from fourfold.models.internals import runnable
from fourfold.models.inventory import Inventory
from fourfold.sources.decoded import DecodedSource


def find_kv_cache(checkpoint: DecodedSource, inventory: Inventory) -> KVCache | None:
    """Return the KV cache that a checkpoint asks engines for; None for one of 16 bits."""
    if checkpoint.kv_cache is None:
        return None
    layers = {x.name: x.layer for x in inventory.linears if x.layer is not None}
    layers |= {name.rpartition(".")[0]: layer for name, layer in layers.items()}
    stored: dict[str, dict[str, float]] = {}
    for name, scale in checkpoint.kv_scales.items():
        module, _, leaf = name.rpartition(".")
        if module in layers:
            stored.setdefault(inventory.layer_paths[layers[module]], {})[leaf] = scale
    scales = {path: (x.get("k_scale", 1.0), x.get("v_scale", 1.0)) for path, x in stored.items()}
    return KVCache(checkpoint.kv_cache, scales)


_LAYER: ContextVar[str] = ContextVar("layer")
"""The decoder layer that this thread, or greenlet, is in."""


class RoundedCaches(ExitStack):
    """Rounds what enters the caches of a model, until it is closed."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], kv_cache: KVCache,
        calls: Counter[str],
    ) -> None:  # fmt: skip
        """`calls` counts the keys and values that were rounded, as `<layer>.kv`."""
        super().__init__()
        self.model, self.kv_cache, self.calls = runnable(model), kv_cache, calls
        self.signature = inspect.signature(self.model.forward)
        for path, layer in layers.items():
            enter = partial(_enter, path)
            self.callback(layer.register_forward_pre_hook(enter).remove)
        for hook in (
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ):
            self.callback(hook.remove)

    def round(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what enters a cache for keys and values `[B, heads, S, head size]`."""
        layer = _LAYER.get()
        self.calls[f"{layer}.kv"] += 1
        return self.kv_cache.round(layer, keys, values)

    def _before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        arguments = self.signature.bind_partial(*args, **kwargs).arguments
        cache = arguments.get("past_key_values")
        if cache is None:
            wanted = arguments.get("use_cache")
            if wanted is None:
                wanted = getattr(self.model.config.get_text_config(), "use_cache", False)
            cache = usual_cache(self.model) if wanted else recording_cache(self.model, self.round)
            kwargs = kwargs | {"past_key_values": cache, "use_cache": True}
        if not hasattr(cache, "record"):
            record_updates(cache, self.round)
        return args, kwargs

    def _after(self, _: nn.Module, args: Any, kwargs: dict[str, Any], __: Any) -> None:
        """Leave the caller's cache as it was, with what it holds."""
        cache = self.signature.bind_partial(*args, **kwargs).arguments.get("past_key_values")
        vars(cache).pop("update", None)


def _enter(path: str, *_: Any) -> None:
    _LAYER.set(path)
