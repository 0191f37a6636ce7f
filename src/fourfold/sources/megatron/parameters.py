# SPDX-License-Identifier: Apache-2.0
"""Names of parameters: what a stored key stands for.

Megatron has saved the same weight under several names over the years: one parameter of one layer,
or of all layers and experts at once. Here each becomes the same **parameter name**, which has the
numbers of its layer and expert in it; rules know no other names.

    decoder.layers.mlp.experts.experts.linear_fc1.weight      [L, E, 2F, H]   axes for both
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight    [E, 2F, H]      layers that differ
    decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w   [F, H]       gate; up is `_v`
        ─▶ decoder.layers.3.mlp.experts.7.linear_fc1.weight   [2F, H]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from fourfold.errors import SourceError
from fourfold.sources.megatron.metadata import StoredTensor
from fourfold.storage.safetensors_header import shown

LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.([0-9]+)\.")
MTP_LAYER = re.compile(r"(?:.*\.)?mtp\.layers\.([0-9]+)\.")
EXPERT = re.compile(r".*\.mlp\.experts\.([0-9]+)\.")
"""Numbers in the name of a parameter."""

BOOKKEEPING = re.compile(
    r"(.*\.)?_extra_state(/shard_[0-9._]+)?"
    r"|(optimizer|chained_[0-9]+|opt_param_scheduler)([./].*)?"
    r"|(rng_state|rerun_state_machine_state)([./].*)?"
)
"""Keys that are not weights: extra states of modules, optimizers, random states. Only these may be
left out."""

_QUANTIZER = re.compile(
    r"(?:.*\.)?(?:\w*quantizer(?:\.[0-9]+)?\.(?P<state>\w+)|modelopt_state\b.*)(?:/.*)?"
)
"""Keys of ModelOpt's quantizers: `…linear_fc1.weight_quantizer._amax`."""

_NEEDED_STATES: Mapping[str, str] = {
    "_pre_quant_scale": "the weights beside it were smoothed with it (AWQ, SmoothQuant), and are "
    "not the model's own",
    "_scale": "the weight beside it is stored quantized",
    "_double_scale": "the weight beside it is stored quantized",
}
"""States of a quantizer without which the weights mean something else → why."""

_STORED_LAYERS = re.compile(
    r"(?P<head>(?:.*\.)?decoder\.layers)\.(?:(?P<number>[0-9]{1,6})\.)?(?P<tail>.+)"
)
_STORED_EXPERTS = re.compile(
    r"(?P<head>.*\.mlp\.experts)\.experts\.(?:(?P<number>[0-9]{1,6})\.)?(?P<tail>linear_fc[12]\..+)"
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
    """True if a key is known not to be a weight."""
    return BOOKKEEPING.fullmatch(key) is not None


def is_quantizer_state(key: str) -> bool:
    """True if a key is the state of one of ModelOpt's quantizers, which is not a weight.

    Raises:
        SourceError: Without it, the weights are not what they seem.
    """
    match = _QUANTIZER.fullmatch(key)
    if match is not None and match["state"] in _NEEDED_STATES:
        raise SourceError(
            f"{key}: the state of a quantizer of ModelOpt: {_NEEDED_STATES[match['state']]}. Give "
            "the checkpoint from before it was quantized, or export this one with ModelOpt."
        )
    return match is not None


def parameters_of(tensors: Mapping[str, StoredTensor]) -> Iterator[Parameter]:
    """Yield every parameter that stored tensors hold; bookkeeping must be left out before.

    Raises:
        SourceError: A key is not the name of a parameter, or its tensor lacks dimensions.
    """
    for key, tensor in tensors.items():
        if "*" in key:
            raise SourceError(f"{shown(key)}: an asterisk in a name. Which tool saved it?")
        pattern, axes = _pattern_of(key)
        if len(tensor.shape) < axes:
            raise SourceError(
                f"{key} {list(tensor.shape)}: too few dimensions for layers and experts of a "
                "torch_dist checkpoint. Which tool saved it?"
            )
        head, *parts = pattern.split("*")
        for index in product(*map(range, tensor.shape[:axes])):
            numbered = zip(index, parts, strict=True)
            name = head + "".join(f"{number}{part}" for number, part in numbered)
            yield Parameter(name, key, index, tensor.shape[axes:], tensor.dtype)


def _pattern_of(key: str) -> tuple[str, int]:
    """A parameter's name with `*` for each number that is an axis, and how many axes there are."""
    pattern, axes = key, 0
    for expression in (_STORED_LAYERS, _STORED_EXPERTS):
        match = expression.fullmatch(pattern)
        if match is not None:
            axes += match["number"] is None
            pattern = f"{match['head']}.{match['number'] or '*'}.{match['tail']}"
    return pattern, axes
