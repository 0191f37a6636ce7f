"""What a stored key stands for: one parameter of one layer, or of all layers and experts at once.

Megatron has saved the same weight under several names over the years. Here each becomes the same
**parameter name**, with the numbers of layer and expert in it; rules know no other.

    decoder.layers.mlp.experts.experts.linear_fc1.weight      [L, E, 2F, H]   axes for both
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight    [E, 2F, H]      layers that differ
    decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w   [F, H]       gate; up is `_v`
        ─▶ decoder.layers.3.mlp.experts.7.linear_fc1.weight   [2F, H]

A live model's names, of one rank, lead to the same: `…experts.linear_fc1.weight7` (grouped),
`…experts.local_experts.7.linear_fc1.weight` (sequential), with the rank's first layer and expert
added to the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fourfold.errors import SourceError
from fourfold.sources.megatron.metadata import StoredTensor
from fourfold.storage.safetensors_header import shown

BOOKKEEPING = re.compile(
    r"(.*\.)?_extra_state(/shard_[0-9._]+)?"
    r"|(optimizer|chained_[0-9]+|opt_param_scheduler)([./].*)?"
    r"|(rng_state|rerun_state_machine_state)([./].*)?"
)
"""Keys that are no weight of the model: what modules keep beside theirs, optimizers, random
numbers. Nothing else may be left out."""

_LAYERS = re.compile(
    r"(?P<head>(?:.*\.)?decoder\.layers)\.(?:(?P<layer>[0-9]{1,6})\.)?(?P<rest>.+)"
)
_EXPERTS = re.compile(
    r"(?P<head>.*\.mlp\.experts)\.experts\.(?:(?P<expert>[0-9]{1,6})\.)?(?P<rest>linear_fc[12]\..+)"
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the model: `index` picks it out of a stored tensor's first axes."""

    name: str
    stored: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


def is_bookkeeping(key: str) -> bool:
    """Whether a key is known to be no weight."""
    return BOOKKEEPING.fullmatch(key) is not None


def parameters_of(tensors: Mapping[str, StoredTensor]) -> Iterator[Parameter]:
    """Every parameter that stored tensors hold; bookkeeping must be left out before."""
    for key, tensor in tensors.items():
        if "*" in key:
            raise SourceError(
                f"{shown(key)}: no name of a parameter has an asterisk. Which tool has saved it?"
            )
        pattern, axes = _pattern_of(key)
        if len(tensor.shape) < axes:
            raise SourceError(
                f"{key} {list(tensor.shape)}: too few dimensions for layers and experts of a "
                "torch_dist checkpoint. Which tool has saved it?"
            )
        head, *parts = pattern.split("*")
        for index in _indices(tensor.shape[:axes]):
            numbered = zip(index, parts, strict=True)
            name = head + "".join(f"{number}{part}" for number, part in numbered)
            yield Parameter(name, key, index, tensor.shape[axes:], tensor.dtype)


def _pattern_of(key: str) -> tuple[str, int]:
    """A stored key as a parameter's name, with `*` for each number that is an axis; how many."""
    pattern, axes = key, 0
    found = _LAYERS.fullmatch(pattern)
    if found is not None:
        axes += found["layer"] is None
        pattern = f"{found['head']}.{found['layer'] or '*'}.{found['rest']}"
    found = _EXPERTS.fullmatch(pattern)
    if found is not None:
        axes += found["expert"] is None
        pattern = f"{found['head']}.{found['expert'] or '*'}.{found['rest']}"
    return pattern, axes


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (first, *rest)
