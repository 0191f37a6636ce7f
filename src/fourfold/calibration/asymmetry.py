# SPDX-License-Identifier: Apache-2.0
"""How much of the change of its inputs a weight makes up for: `asymmetric: auto`.

The change x − x̂ of the inputs of a site is predicted as K·x̂, with K = C·H⁻¹ of the training texts
(`algorithms.second_order`). On the rows of held-out texts the squared error of α·K·x̂ is smallest at

    α = Σ (x − x̂)·K·x̂ / Σ |K·x̂|².

The largest of 0, ¼, ½ and 1 that is not above it is taken: below it the error falls as α grows, so
the part is never worse than 0 there. What it gains is what that error lacks of Σ |x − x̂|².

Shapes: R rows, I input features, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.algorithms.second_order import prediction
from fourfold.statistics import State
from fourfold.statistics.second_moment import SecondMoment

PARTS = (0.0, 0.25, 0.5, 1.0)
"""The parts of the change that `auto` chooses from."""


class Energies(NamedTuple):
    """Sums over some rows."""

    confirmed: float
    """Σ (x − x̂)·K·x̂."""
    predicted: float
    """Σ |K·x̂|²."""
    moved: float
    """Σ |x − x̂|²."""


class Asymmetry(NamedTuple):
    """What the weights of a site make up for."""

    part: float
    """α."""
    gain: float
    """The part of the squared change of their inputs that α·K·x̂ takes away on held-out rows."""


def predictor(statistic: SecondMoment, state: State) -> Tensor:
    """Return K of a site, float32 `[I, I]` or `[E, I, I]`; zeros where no row was.

    Args:
        statistic: The second moment that is known of the site.
        state: Its sums over the training texts, with cross moments.
    """
    rows, total = state[f"{statistic.name}.rows"], state[statistic.name]
    k = torch.zeros(total.shape, device=total.device)
    pool = statistic.pool(state) if rows.ndim else {}
    for number in range(len(rows)) if rows.ndim else [...]:  # the means of all take much memory
        means = statistic.finish({name: x[number] for name, x in state.items()}) | pool
        k_II = prediction(means, statistic.name)
        if k_II is not None:
            k[number] = k_II
    return k


def energies(
    statistic: SecondMoment, k: Tensor, rows: Tensor, moved: Tensor, experts: Tensor | None
) -> Energies:
    """Return the sums over held-out rows.

    Args:
        statistic: The second moment that `k` was made of.
        k: What `predictor` returned.
        rows: The rows x̂ of the quantized stream, `[R, I]`.
        moved: x − x̂ of each, float32.
        experts: The experts of each row, as `statistic` is given them.
    """
    confirmed = predicted = 0.0
    changed = float(moved.double().square().sum())
    for part, chosen in statistic.parts(experts):
        predicted_RI = rows[chosen].float() @ k[part].mT
        confirmed += float((predicted_RI * moved[chosen]).sum(dtype=torch.float64))
        predicted += float(predicted_RI.double().square().sum())
    return Energies(confirmed, predicted, changed)


def confirmed_part(of_rows: Sequence[Energies]) -> Asymmetry:
    """Return the part that held-out rows confirm, given their sums, in any order."""
    columns = zip(*of_rows, strict=True) if of_rows else [(), (), ()]
    confirmed, predicted, moved = map(math.fsum, columns)
    best = confirmed / predicted if predicted > 0 else 0.0
    part = max(x for x in PARTS if x <= max(best, 0.0))
    gain = part * (2 * confirmed - part * predicted) / moved if part else 0.0
    return Asymmetry(part, gain)
