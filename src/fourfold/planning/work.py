# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic calibration takes, counted from the shapes of a plan.

Operations are those of matrix products: two for a multiplication and an addition. They are

- the runs of the decoder layers: two for each weight that a token meets;
- the second moments of inputs of width n: about 1.5·n² a row, since half of a product is computed,
  at less than a product's speed; cross moments of two streams 2·n²;
- what is made of each moment: a factor, (2/3)·n³ at half a product's speed, and in sequential
  calibration predictions of how inputs have moved.

Attention over a text, the head and everything that is not a matrix product are left out.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict

from fourfold.models.inventory import LinearWeight
from fourfold.models.names import SINGLE_EXPERT
from fourfold.models.roles import Role
from fourfold.planning.plan import Plan
from fourfold.statistics import STATISTICS
from fourfold.statistics.second_moment import PooledMoment, SecondMoment

USUAL_EXPERTS_PER_TOKEN = 8
"""Where the configuration does not say how many experts a token is routed to."""


def calibration_operations(plan: Plan, tokens: int) -> float:
    """Return the operations of calibrating a plan on so many tokens.

    The rounding of weights is not among them.
    """
    if not plan.needs_calibration:
        return 0.0
    shares, asymmetric = _Shares(plan), plan.recipe.calibration.asymmetric
    runs = 1.0 if not plan.is_sequential else 4.0 if asymmetric else 2.5
    total = 2 * runs * tokens * math.fsum(active_weights(plan).values())
    moments = {}
    for linear in plan.observed:
        for name in plan.algorithm_needs(linear):
            moments[plan.site(linear, name), name] = linear
    for (site, name), linear in moments.items():
        statistic = STATISTICS[name]
        if not isinstance(statistic, SecondMoment):
            continue
        is_pooled = isinstance(statistic, PooledMoment)
        count = 1 if is_pooled else site.experts or 1
        rows = tokens if is_pooled else tokens * count * shares.of(linear)
        squares, cubes = 1.5, 4 / 3
        if plan.is_sequential and asymmetric:
            squares += 2
            cubes += 10 if asymmetric == "auto" else 4
        total += squares * rows * site.width**2 + cubes * count * site.width**3
    return total


def active_weights(plan: Plan) -> dict[int, float]:
    """Return the number of weights that a token is multiplied by, by decoder layer."""
    shares = _Shares(plan)
    weights: dict[int, float] = defaultdict(float)
    for key, raw in plan.inventory.tensors.items():
        is_run = raw.layer is not None and raw.role not in {Role.VISION, Role.MTP}
        if is_run and len(raw.info.shape) > 1:
            assert raw.layer is not None
            linears = plan.inventory.linears_by_key.get(key)
            weights[raw.layer] += raw.info.numel * (shares.of(linears[0]) if linears else 1.0)
    return weights


class _Shares:
    """The part of the tokens that reach a linear weight."""

    def __init__(self, plan: Plan) -> None:
        self.inventory = plan.inventory
        experts = {  # those that are modules of their own
            (linear.layer, match.group())
            for linear in plan.inventory.linears
            if linear.expert is None and (match := SINGLE_EXPERT.search(linear.name))
        }
        self.single = Counter(layer for layer, _ in experts)

    def of(self, linear: LinearWeight) -> float:
        if linear.expert is not None:
            experts = self.inventory.experts_counts.get(linear.module, 1)
        elif SINGLE_EXPERT.search(linear.name):
            experts = self.single[linear.layer]
        else:
            return 1.0
        return min(1.0, (self.inventory.experts_per_token or USUAL_EXPERTS_PER_TOKEN) / experts)
