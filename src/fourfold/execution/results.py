# SPDX-License-Identifier: Apache-2.0
"""The results of quantizing a linear weight: figures for the summary, and the single numbers that
are written beside its codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fourfold.algorithms.base import Figures
from fourfold.calibration.scales import CONSTANT_INPUT_SCALE
from fourfold.execution.context import ExecutionContext
from fourfold.execution.repairs import (
    FLOOR_SCALES,
    SCALE_OF_ONE,
    check_strict_input,
    lost_weights,
)
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import TensorSpec
from fourfold.models.inventory import LinearWeight
from fourfold.planning import ScaleGroup
from fourfold.storage.shard_file import ShardFile


@dataclass(frozen=True, slots=True)
class LinearResult:
    """The figures of one quantized linear weight."""

    name: str
    role: str
    shape: tuple[int, int]
    global_scale: float | None
    """The scale that the weight's scale group shares; None for a format without one."""
    amax: float
    layer: int | None
    expert: int | None
    input_amax: float | None
    """The largest input that this linear weight saw; None if it saw none."""
    input_scale: float | None
    tokens: int | None
    """The tokens routed to an expert, or the rows that a linear layer saw, in calibration."""
    sum_sq_err: float
    """Σ(w − ŵ)²."""
    sum_sq_w: float
    """Σw²."""
    repair: str | None = None
    """The repair of a weight or an input that its format cannot hold; see `repairs`."""
    exact: bool = False
    """True if the weight was cast without loss: the codes are those of the source."""
    asymmetric: float | None = None
    """The part of the change of its inputs that it makes up for; None if that is not known."""
    asymmetric_gain: float | None = None
    """The part of the squared change of its inputs that this takes away on held-out texts."""
    damping: float | None = None
    """The damping of its inputs' second moment, where it had to be more than the recipe's."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearResult:
        """Return the result that `dataclasses.asdict` turned into `values`."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    @property
    def relative_error(self) -> float:
        """The relative Frobenius error ‖w − ŵ‖/‖w‖; 0 for an all-zero weight."""
        return math.sqrt(self.sum_sq_err / self.sum_sq_w) if self.sum_sq_w else 0.0


def finish_group(
    context: ExecutionContext,
    file: ShardFile,
    group: ScaleGroup,
    group_scale: float | None,
    figures: Mapping[str, Figures],
    *,
    exact: bool = False,
) -> list[LinearResult]:
    """Write the single numbers of a scale group, whose codes are written, and check its errors.

    The results name what was repaired; see `repairs`.

    Args:
        context: The plan that is executed.
        file: The shard that the group belongs to.
        group: The scale group.
        group_scale: The scale that its weights share; None for a format without one.
        figures: Measurements by the names of the weights.
        exact: True if the source's own codes were written.

    Raises:
        WeightLostError: The format cannot hold a weight that may matter.
    """
    fmt, scheme, layout = FORMATS[group.scheme.weights], group.scheme, context.plan.layout
    lost = lost_weights(context, group, group_scale, figures)
    results = []
    for linear in group.linears:
        numbers: dict[str, float] = {}
        if fmt.group_part is not None:
            assert group_scale is not None
            numbers[fmt.group_part] = group_scale
        inputs = _inputs(context, linear, scheme, figures[linear.name])
        if scheme.activations is not None and inputs.scale is not None:
            numbers |= dict.fromkeys(FORMATS[scheme.activations].input_parts(), inputs.scale)
        tensors = layout.tensors(linear.name, linear.shape, scheme)
        for part, number in numbers.items():
            file.write(tensors[part].name, layout.encode(part, number, scheme))
        of_weight = figures[linear.name]
        if linear.name in lost:
            of_weight = of_weight.or_lost()
        results.append(
            LinearResult(
                name=linear.name,
                role=linear.role.value,
                shape=linear.shape,
                global_scale=group_scale,
                amax=of_weight.amax,
                layer=linear.layer,
                expert=linear.expert,
                input_amax=inputs.amax,
                input_scale=inputs.scale,
                tokens=inputs.tokens,
                sum_sq_err=of_weight.sum_sq_err,
                sum_sq_w=of_weight.sum_sq_w,
                repair=FLOOR_SCALES if linear.name in lost else inputs.repair,
                exact=exact,
                asymmetric=of_weight.asymmetric,
                asymmetric_gain=_gain(context, linear, of_weight),
                damping=of_weight.damping,
            )
        )
    return results


def _gain(context: ExecutionContext, linear: LinearWeight, figures: Figures) -> float | None:
    if not figures.asymmetric or context.scales is None:
        return None
    return context.scales.asymmetric_gain_of(linear)


class _Inputs(NamedTuple):
    """The scale of a weight's inputs, where one is stored, and what calibration saw of them."""

    scale: float | None = None
    amax: float | None = None
    tokens: int | None = None
    repair: str | None = None


def _inputs(
    context: ExecutionContext, linear: LinearWeight, scheme: Scheme, figures: Figures
) -> _Inputs:
    if not scheme.has_input_scale:
        return _Inputs()
    if not scheme.observes_inputs:
        return _Inputs(CONSTANT_INPUT_SCALE)
    scales = context.scales
    assert scales is not None
    is_zero = scales.amax(linear.input_site) == 0 < figures.amax
    if is_zero:
        check_strict_input(context, linear)
    return _Inputs(
        scales.input_scale(linear.input_site),
        scales.own_amax(linear),
        scales.tokens(linear),
        SCALE_OF_ONE if is_zero else None,
    )


def row_tensors(
    context: ExecutionContext, group: ScaleGroup, linear: LinearWeight
) -> list[TensorSpec]:
    """Return the tensors that hold a weight's row parts, in the order of the format."""
    tensors = context.plan.layout.tensors(linear.name, linear.shape, group.scheme)
    return [tensors[part] for part in FORMATS[group.scheme.weights].row_parts(linear.shape)]
