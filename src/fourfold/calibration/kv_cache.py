# SPDX-License-Identifier: Apache-2.0
"""A cache that shows the keys and values it is given, and stores nothing.

Attention gives its cache the keys after rotary embedding, and the values: what an engine with an
FP8 KV cache would store. A single pass over a text reads nothing from the cache again, so it
returns its inputs and takes no memory. It stores them only if a decoder reads what an encoder put
there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from fourfold.calibration.reading import reads_text_twice
from fourfold.formats.kv_cache import KVFormat, round_states
from fourfold.models.internals import runnable
from fourfold.models.inventory import Inventory
from fourfold.planning.activations import is_latent

States = tuple[Tensor, Tensor]
Record = Callable[[Tensor, Tensor], States | None]
"""Called with the keys and the values of one update; returns those that enter the cache instead, or
None for the same ones."""


@dataclass(frozen=True)
class KVCache:
    """The format of a KV cache, and its scales."""

    format: KVFormat
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The scales of keys and values by path of the decoder layer; 1 where there are none."""

    def round(self, layer: str, keys: Tensor, values: Tensor) -> States:
        """Return keys and values `[B, heads, S, head size]` of a layer as they are read again."""
        k_scale, v_scale = self.scales.get(layer, (1.0, 1.0))
        return round_states(keys, self.format, k_scale), round_states(values, self.format, v_scale)


def why_exact(
    model: Any, kv_cache: KVCache, inventory: Inventory, config: Mapping[str, Any]
) -> str | None:
    """Return why a model's KV cache keeps its precision; None if it can be rounded.

    MLA caches latent vectors where transformers caches the keys and values made of them, and models
    with an encoder have caches of two kinds.
    """
    if kv_cache.format == "nvfp4" and any(x != (1.0, 1.0) for x in kv_cache.scales.values()):
        return "engines disagree about the scales of its NVFP4 KV cache, which is not simulated"
    part = runnable(model)
    if is_latent(inventory, config):
        return "the latent cache of MLA is not simulated"
    if part.config.is_encoder_decoder:
        return "the KV cache of a model with an encoder is not simulated"
    if "past_key_values" not in inspect.signature(part.forward).parameters:
        return f"{type(part).__name__} has no KV cache that could be simulated"
    return None


def recording_cache(model: Any, record: Record) -> Any:
    """Return a cache for one call: `model(…, past_key_values=cache, use_cache=True)`."""
    recording = _new_cache(_recording(_cache_class(model)), model)
    recording.record = record
    # A decoder may attend to keys that an encoder has put into their common cache.
    recording.remembers = reads_text_twice(model) and not model.config.is_encoder_decoder
    return recording


def usual_cache(model: Any) -> Any:
    """Return the cache that the model would make for itself; a later call may read it."""
    return _new_cache(_cache_class(model), model)


def _new_cache(cache_class: type, model: Any) -> Any:
    takes_config = "config" in inspect.signature(cache_class).parameters
    return cache_class(config=model.config) if takes_config else cache_class()


def _cache_class(model: Any) -> type:
    """The class of the cache that the model makes for itself: its module's own, or the default."""
    from transformers import DynamicCache

    module = sys.modules[type(model).__module__]
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, DynamicCache)
        and value.__module__ == module.__name__
    ]
    return own[0] if own else DynamicCache


@cache
def _recording(base: type) -> type:
    return type(f"Recording{base.__name__}", (_Recording, base), {})


class _Recording:
    """A mixin before a cache class: it records updates and drops states."""

    record: Record
    remembers: bool
    layers: Any  # of the cache class

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any) -> Any:
        states = self.record(key_states, value_states)
        key_states, value_states = states or (key_states, value_states)
        if self.remembers:
            cache: Any = super()
            return cache.update(key_states, value_states, *args, **kw)
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return indexer_key_states

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        cache: Any = super()
        states = cache.update_conv_state(conv_states, layer_idx, *args, **kw)
        _forget(self.layers[layer_idx].conv_states)
        return states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        cache: Any = super()
        states = cache.update_recurrent_state(recurrent_states, layer_idx, *args, **kw)
        _forget(self.layers[layer_idx].recurrent_states)
        return states

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Drop MiniMax's recurrent states, which are large and not read in a single pass."""
        cache: Any = super()
        cache.set_linear_cache(layer_idx, linear_cache.new_empty(0))


def _forget(states: Any) -> None:
    for index in states if isinstance(states, dict) else range(len(states)):
        if isinstance(states[index], Tensor):
            states[index] = states[index].new_empty(0)


def record_updates(cache: Any, record: Record) -> Callable[[], None]:
    """Record the updates of a cache that stores; return a function that undoes it.

    What `record` returns is stored instead of the keys and values that it was given.
    """
    if "update" in vars(cache):
        return lambda: None
    update = cache.update

    def recorded(keys: Tensor, values: Tensor, *args: Any, **kw: Any) -> Any:
        keys, values = record(keys, values) or (keys, values)
        return update(keys, values, *args, **kw)

    cache.update = recorded
    return lambda: vars(cache).pop("update", None)
