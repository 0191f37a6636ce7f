"""A cache that records the largest keys and values, and stores nothing.

Attention gives its cache the keys after rotary embedding, and the values: what an engine with an
FP8 KV cache would store. In a single pass over a text nothing has to be remembered, so the cache
gives back what it was given, and takes no memory. Only where a decoder reads what an encoder left
in the cache does it remember.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

Record = Callable[[torch.Tensor, torch.Tensor], None]
"""Is shown the keys and the values of one update."""


def recording_cache(model: Any, record: Record) -> Any:
    """A cache to give to one call of `model`: `model(…, past_key_values=cache, use_cache=True)`."""
    made = _made(_recording(_cache_class(model)), model)
    made.record = record
    made.remembers = _reads_the_encoders(model)
    return made


def usual_cache(model: Any) -> Any:
    """The cache that the model would make for itself: it stores, and a later call may read it."""
    return _made(_cache_class(model), model)


def _made(cache_class: type, model: Any) -> Any:
    takes_config = "config" in inspect.signature(cache_class).parameters
    return cache_class(config=model.config) if takes_config else cache_class()


def _reads_the_encoders(model: Any) -> bool:
    """Whether a decoder attends to keys that an encoder left in the cache that both are given."""
    has_decoder = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return has_decoder and not model.config.is_encoder_decoder


def _cache_class(model: Any) -> type:
    """The cache that this model makes for itself: its module's own, or transformers' usual one."""
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
    """Goes before a cache class: records, and forgets."""

    record: Record
    remembers: bool
    layers: Any  # of the cache class

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        self.record(key_states, value_states)
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
        """MiniMax's recurrent states: large, and nobody reads them in a single pass."""
        cache: Any = super()
        cache.set_linear_cache(layer_idx, linear_cache.new_empty(0))


def _forget(states: Any) -> None:
    for index in states if isinstance(states, dict) else range(len(states)):
        if isinstance(states[index], torch.Tensor):
            states[index] = states[index].new_empty(0)


def record_updates(cache: Any, record: Record) -> Callable[[], None]:
    """Let a cache that stores be recorded too; what is returned undoes it."""
    if "update" in vars(cache):
        return lambda: None
    update = cache.update

    def recorded(keys: torch.Tensor, values: torch.Tensor, *args: Any, **kw: Any) -> Any:
        record(keys, values)
        return update(keys, values, *args, **kw)

    cache.update = recorded
    return lambda: vars(cache).pop("update", None)
