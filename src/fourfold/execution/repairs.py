# SPDX-License-Identifier: Apache-2.0
"""Weights that are lost beside others of their scale group: repaired if they cannot matter, refused
if they may.

    repaired if  n·amax² ≤ 2⁻²⁰ · E_g  or  amax ≤ `WeightFormat.negligible`

    E_g = Σ max(0, Σw² − k·amax²)  over the weights of the group;  k = max(4, n / 2¹⁴)

n·amax² bounds the energy Σw² of a weight of n elements from above; Σw² itself may underflow there.
Σw² − k·amax² bounds from below the energy of a weight without its k largest elements: a few
outliers do not make what lies beside them small. docs/numerics.md has the reasons.

A repaired weight keeps the codes and block scales that its algorithm chose, which are the smallest
that the format has: they are valid, and their sum is nearly 0, as the weight's is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fourfold.algorithms.base import Figures
from fourfold.errors import ObservationError, WeightLostError
from fourfold.execution.context import ExecutionContext
from fourfold.formats.base import FORMATS
from fourfold.models.inventory import Inventory, LinearWeight
from fourfold.planning import ScaleGroup

NEGLIGIBLE_SHARE = 2.0**-20
"""A weight with less than this part of its group's energy cannot matter."""

OUTLIERS, OUTLIER_PART = 4, 1 << 14
"""Elements of a matrix that count as outliers: so many, or one of so many if that is more."""

FLOOR_SCALES = "floor scales"
"""The repair of a weight that is lost beside its scale group."""

SCALE_OF_ONE = "input scale 1"
"""The repair of a weight whose inputs were all 0 in calibration."""


def lost_weights(
    context: ExecutionContext,
    group: ScaleGroup,
    group_scale: float | None,
    figures: Mapping[str, Figures],
) -> frozenset[str]:
    """Return the names of the weights of a group that its format cannot hold, and need not.

    Raises:
        WeightLostError: One of them may matter, or the caller wants no repairs.
    """
    fmt = FORMATS[group.scheme.weights]
    names = set()
    for linear in group.linears:
        weight = figures[linear.name]
        is_lost = fmt.is_lost(weight.amax, group_scale)
        if not is_lost and weight.relative_error <= fmt.worst_error:
            continue
        most = math.prod(linear.shape) * weight.amax**2
        energy = sum(_energy_without_outliers(x, figures[x.name]) for x in group.linears)
        matters = weight.amax > fmt.negligible and most > NEGLIGIBLE_SHARE * energy
        if matters or context.strict:
            raise _lost(context.plan.inventory, group, linear, figures)
        names.add(linear.name)
    return frozenset(names)


def check_strict_input(context: ExecutionContext, linear: LinearWeight) -> None:
    """Raise `ObservationError` for an input that was always 0, if the caller wants no repairs."""
    if context.strict:
        raise ObservationError(
            f"{linear.input_site}: its inputs were all 0 in calibration, and `strict=True` refuses "
            "a scale of 1 for them. Use other or more calibration data, or a keep pattern."
        )


def _energy_without_outliers(linear: LinearWeight, weight: Figures) -> float:
    outliers = max(OUTLIERS, math.prod(linear.shape) // OUTLIER_PART)
    return max(0.0, weight.sum_sq_w - outliers * weight.amax**2)


def _lost(
    inventory: Inventory, group: ScaleGroup, linear: LinearWeight, figures: Mapping[str, Figures]
) -> WeightLostError:
    largest = max(group.linears, key=lambda other: figures[other.name].amax)
    patterns = ", ".join(f'"{pattern}"' for pattern in fused_with(inventory, linear))
    return WeightLostError(
        f"{linear.name}: lost in {FORMATS[group.scheme.weights].title}: its weights reach "
        f"{figures[linear.name].amax:.3g}, those of {largest.name}, which share its global scale, "
        f"{figures[largest.name].amax:.3g}. Is the checkpoint damaged? If not, keep all that "
        f"engines fuse with it: keep: [{patterns}] in the recipe."
    )


def fused_with(inventory: Inventory, linear: LinearWeight) -> list[str]:
    """Return patterns of the weights that must be quantized if `linear` is: the experts of its
    layer, or the other weights of its scale group."""
    if linear.expert is not None:
        return [f"{linear.name.rpartition(f'.{linear.expert}.')[0]}.*"]
    return [other.name for other in inventory.linears if other.scale_group == linear.scale_group]
