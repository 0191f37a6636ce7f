# SPDX-License-Identifier: Apache-2.0
"""How the weight g of a norm scales its outputs, which is found by trying and not by a name.

    plain    y = g · x̄         Llama, Qwen3, DeepSeek
    offset   y = (1 + g) · x̄   Gemma, Qwen3-Next
    other    anything else: a norm that also reads a gate, or has a weight for all channels

A norm of each class is built with a few channels and run on random numbers. Its outputs must follow
the weight **bit for bit** when that is divided by powers of two: this is what a fold into the norm
relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 64
"""Channels of a norm that is tried."""


class Gain(Enum):
    """How a norm's outputs follow its weight."""

    PLAIN = "plain"
    OFFSET = "offset"
    OTHER = "other"


def gains_of(modules: Mapping[str, Any]) -> dict[str, Gain]:
    """Return how each norm with a weight of its own follows it, by the module's path.

    Args:
        modules: The modules of a model, whose parameters may be on the meta device.
    """
    gains: dict[str, Gain] = {}
    by_class: dict[tuple[type, tuple[str, ...]], Gain] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if "norm" not in type(module).__name__.lower() or weight is None or weight.ndim != 1:
            continue
        own = tuple(name for name, value in module._parameters.items() if value is not None)
        key = type(module), own
        if key not in by_class:
            by_class[key] = _gain_of(module, own)
        gains[path] = by_class[key]
    return gains


def _gain_of(module: nn.Module, parameters: tuple[str, ...]) -> Gain:
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float32) + 0.5

    values = {name: draw(CHANNELS) for name in parameters}
    factors = torch.exp2(torch.randint(-3, 4, (CHANNELS,), generator=random).float())
    x = draw(3, CHANNELS) - 1.0
    try:
        y = _run(module, values, x)
        if torch.equal(_run(module, {k: v / factors for k, v in values.items()}, x), y / factors):
            return Gain.PLAIN
        zero = dict.fromkeys(parameters, torch.zeros(CHANNELS))
        ones = dict.fromkeys(parameters, torch.ones(CHANNELS))
        if torch.equal(_run(module, ones, x), 2 * _run(module, zero, x)):
            return Gain.OFFSET
    except (RuntimeError, TypeError, ValueError, AttributeError):
        pass  # its call takes more than hidden states
    return Gain.OTHER


def _run(module: nn.Module, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Run a copy of a norm with other parameters, whatever device its own are on."""
    twin = copy(module)
    absent = dict.fromkeys(module._parameters)  # such as the bias of a LayerNorm without one
    twin._parameters = absent | {name: nn.Parameter(value) for name, value in values.items()}
    if isinstance(twin, nn.LayerNorm):
        twin.normalized_shape = (CHANNELS,)
    with torch.no_grad():
        result = twin(x)
    if not isinstance(result, Tensor):
        raise TypeError("returns more than hidden states")
    return result
