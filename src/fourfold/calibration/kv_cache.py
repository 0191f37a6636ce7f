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
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fourfold.calibration.reading import reads_text_twice

States = tuple[torch.Tensor, torch.Tensor]
Record = Callable[[torch.Tensor, torch.Tensor], States | None]
"""Called with the keys and the values of one update; returns those that enter the cache instead, or
None for the same ones."""


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

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        states = self.record(key_states, value_states)
        key_states, value_states = states or (key_states, value_states)
        if self.remembers:
            cache: Any = super()
            return cache.update(key_states, value_states, *args, **kw)
        return key_states, value_states

    def update_indexer(self, indexer_key_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return indexer_key_states

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        cache: Any = super()
        states = cache.update_conv_state(conv_states, layer_idx, *args, **kw)
        _forget(self.layers[layer_idx].conv_states)
        return states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        cache: Any = super()
        states = cache.update_recurrent_state(recurrent_states, layer_idx, *args, **kw)
        _forget(self.layers[layer_idx].recurrent_states)
        return states

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        """Drop MiniMax's recurrent states, which are large and not read in a single pass."""
        cache: Any = super()
        cache.set_linear_cache(layer_idx, linear_cache.new_empty(0))


def _forget(states: Any) -> None:
    for index in states if isinstance(states, dict) else range(len(states)):
        if isinstance(states[index], torch.Tensor):
            states[index] = states[index].new_empty(0)


def record_updates(cache: Any, record: Record) -> Callable[[], None]:
    """Record the updates of a cache that stores; return a function that undoes it.

    What `record` returns is stored instead of the keys and values that it was given.
    """
    if "update" in vars(cache):
        return lambda: None
    update = cache.update

    def recorded(keys: torch.Tensor, values: torch.Tensor, *args: Any, **kw: Any) -> Any:
        keys, values = record(keys, values) or (keys, values)
        return update(keys, values, *args, **kw)

    cache.update = recorded
    return lambda: vars(cache).pop("update", None)
