"""What quantizing a linear weight gave: figures for the journal and the summary, and scalars that
are written beside its codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourfold.calibration.scales import ActivationScales
from fourfold.errors import PlanError
from fourfold.layouts import modelopt
from fourfold.models.inventory import LinearWeight
from fourfold.storage.shard_file import ShardFile

WORST_ERROR = 0.35
"""Relative error of a weight that NVFP4 cannot hold; real ones have 0.1, and heavy tails 0.2."""

SMALLEST = 2.0**-10
"""Of what the smallest block scale, 2⁻⁹, leaves no code but 0 and ±0.5, in units of the global
scale. An error that small is no float32 in these units."""


@dataclass(frozen=True, slots=True)
class LinearResult:
    """What quantizing one linear weight gave."""

    name: str
    role: str
    shape: tuple[int, int]
    global_scale: float
    amax: float
    layer: int | None
    expert: int | None
    input_amax: float | None
    """The largest input that this linear weight saw; None where it saw none."""
    input_scale: float | None
    tokens: int | None
    """Tokens that were routed to an expert, or rows that a linear layer saw, in calibration."""
    sum_sq_err: float
    """Σ(w − q·s·S)²."""
    sum_sq_w: float
    """Σw²."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearResult:
        """What `asdict` gave, as a journal keeps it."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    @property
    def relative_error(self) -> float:
        """Relative Frobenius error ‖w − ŵ‖/‖w‖; 0 for an all-zero weight."""
        return math.sqrt(self.sum_sq_err / self.sum_sq_w) if self.sum_sq_w else 0.0


@dataclass(slots=True)
class Figures:
    """What was found of a linear weight while it was quantized."""

    amax: float = 0.0
    sum_sq_err: float = 0.0
    sum_sq_w: float = 0.0


def finish_group(
    file: ShardFile,
    scales: ActivationScales | None,
    linears: Sequence[LinearWeight],
    global_scale: float,
    figures: Mapping[str, Figures],
) -> list[LinearResult]:
    """Write the scalars of a scale group's weights, whose codes are written, and check them.

    scales: of activations, where they are quantized. figures: by the weights' names.

    Raises `PlanError` for a weight that is lost in NVFP4.
    """
    results = [
        _finish(file, scales, linear, global_scale, figures[linear.name]) for linear in linears
    ]
    _check_errors(results)
    return results


def scalar(value: float) -> np.ndarray[Any, Any]:
    """A float32, as a file has it."""
    return np.array([value], dtype=np.float32)


def _finish(
    file: ShardFile,
    scales: ActivationScales | None,
    linear: LinearWeight,
    global_scale: float,
    found: Figures,
) -> LinearResult:
    file.write(f"{linear.name}.{modelopt.GLOBAL_SCALE}", scalar(global_scale))
    input_amax = input_scale = tokens = None
    if scales is not None:
        input_scale = scales.input_scale(linear.input_site)
        input_amax, tokens = scales.own_amax(linear), scales.tokens(linear)
        file.write(f"{linear.name}.{modelopt.INPUT_SCALE}", scalar(input_scale))
    return LinearResult(
        name=linear.name,
        role=linear.role.value,
        shape=linear.shape,
        global_scale=global_scale,
        amax=found.amax,
        layer=linear.layer,
        expert=linear.expert,
        input_amax=input_amax,
        input_scale=input_scale,
        tokens=tokens,
        sum_sq_err=found.sum_sq_err,
        sum_sq_w=found.sum_sq_w,
    )


def _check_errors(results: Sequence[LinearResult]) -> None:
    """Refuse weights that no block scale serves: next to others of their scale group they are
    so small that hardly a code differs from 0."""
    for result in results:
        is_lost = 0 < result.amax < result.global_scale * SMALLEST
        if is_lost or result.relative_error > WORST_ERROR:
            largest = max(results, key=lambda result: result.amax)
            raise PlanError(
                f"{result.name}: lost in NVFP4: its weights reach {result.amax:.3g}, those of "
                f"{largest.name}, which share its global scale, {largest.amax:.3g}. "
                "Is the checkpoint damaged? If not, name it under keep."
            )
