# SPDX-License-Identifier: Apache-2.0
"""Experts modules: how routed experts lie in the parameters that transformers holds in memory.

transformers keeps a layer's experts as fused parameters. Its decorated classes describe them with
`has_gate`, `is_transposed`, `is_concatenated` and `has_bias`; the few classes without these flags
are in the table `UNDECORATED`. Both become `Part`s, one for each projection, each of which slices
any tensor of the parameter's shape (`part_of`).

Axes: e expert, o out, i in; `(eo)i` is a 2-D parameter with experts one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch


class Projection(StrEnum):
    """The matrices of an expert: down(act(gate x) · up x), or down(act(up x))."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"


class Half(StrEnum):
    """The rows that a projection takes of a parameter shared by gate and up."""

    FIRST = "first half"
    SECOND = "second half"
    EVEN = "every second, from 0"
    ODD = "every second, from 1"


@dataclass(frozen=True, slots=True)
class Part:
    """One projection, as a part of an experts parameter in memory."""

    projection: Projection
    parameter: str
    axes: str
    """Axes of the parameter, in order; see the legend of this module."""
    half: Half | None = None

    @property
    def is_bias(self) -> bool:
        return self.axes == "eo"


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One layer's routed experts: the module's path in memory, and its projections."""

    path: str
    class_name: str
    num_experts: int
    parts: tuple[Part, ...]


def decorated_parts(
    *,
    has_gate: bool = True,
    has_bias: bool = False,
    is_transposed: bool = False,
    is_concatenated: bool = True,
) -> tuple[Part, ...]:
    """Return the parts of an experts class that carries transformers' experts flags."""
    axes = "eio" if is_transposed else "eoi"
    first: list[tuple[Projection, str, Half | None]] = [(Projection.UP, "up_proj", None)]
    if has_gate:
        halves = (Half.FIRST, Half.SECOND) if is_concatenated else (Half.EVEN, Half.ODD)
        projections = (Projection.GATE, Projection.UP)
        first = [(x, "gate_up_proj", half) for x, half in zip(projections, halves, strict=True)]
    places = [*first, (Projection.DOWN, "down_proj", None)]
    weights = [Part(projection, name, axes, half) for projection, name, half in places]
    biases = [Part(projection, f"{name}_bias", "eo", half) for projection, name, half in places]
    return (*weights, *(biases if has_bias else ()))


UNDECORATED: Mapping[str, tuple[Part, ...]] = {
    "Llama4TextExperts": decorated_parts(is_transposed=True),
    "DbrxExpertGLU": (
        Part(Projection.GATE, "w1", "(eo)i"),
        Part(Projection.UP, "v1", "(eo)i"),
        Part(Projection.DOWN, "w2", "(ei)o"),
    ),
    "LongcatFlashExperts": decorated_parts(),
    "Step3p7Experts": decorated_parts(),
}
"""Experts classes without transformers' experts flags, whose layout is known."""


def part_of(parameter: torch.Tensor, part: Part, expert: int, num_experts: int) -> torch.Tensor:
    """Return one expert's projection `[out, in]` (bias: `[out]`), a view of the parameter."""
    if part.axes.startswith("("):
        parameter = parameter.reshape(num_experts, -1, parameter.shape[-1])
    matrix = parameter[expert]
    if part.axes in {"eio", "(ei)o"}:
        matrix = matrix.T
    middle = matrix.shape[0] // 2
    rows = {
        None: slice(None),
        Half.FIRST: slice(middle),
        Half.SECOND: slice(middle, None),
        Half.EVEN: slice(0, None, 2),
        Half.ODD: slice(1, None, 2),
    }
    return matrix[rows[part.half]]
