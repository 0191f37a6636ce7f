# SPDX-License-Identifier: Apache-2.0
"""`second_moment`: Σ x·xᵀ of the inputs, and how many rows it is a sum of.

F64 `[I, I]` or `[E, I, I]`, and I64 `[]` or `[E]` (`second_moment.rows`). `pooled_moment` is the
same of all experts of a module together: `[I, I]` whatever E is.

**Order.** The product of the rows that arrive together is one matrix product in float32, the same
whoever computes it. These are added in float64, whose 53 bits hold sums of 24-bit numbers without
rounding while they differ by less than 2²² in size; so a sum is the same in any order, and the
statistics of a run are those of a run on any number of ranks that share out its batches.

Shapes: R rows, I input features, E experts, K experts of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.statistics.base import Reduction, Site, State, Statistic


class SecondMoment(Statistic):
    """The sum of the outer products of the rows that reached a site, for each expert."""

    name = "second_moment"
    reduction: Reduction = "sum"

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            self.name: (torch.float64, (*site.lead, site.width, site.width)),
            f"{self.name}.rows": (torch.int64, site.lead),
        }

    def new_cross(self, site: Site) -> State:
        """Return the cross moment of a site that no row has reached."""
        dtype, shape = self.shapes(site)[self.name]
        return {f"{self.name}.cross": torch.zeros(shape, dtype=dtype)}

    def update_cross(
        self, state: State, rows: Tensor, differences: Tensor, experts: Tensor | None
    ) -> None:
        """Accumulate Σ (x − x̂)·x̂ᵀ, given rows x̂ as `update` is, and the differences x − x̂."""
        cross = state[f"{self.name}.cross"]
        if experts is None:
            cross += _product(differences, rows)
            return
        number_R, row_R = by_expert(experts)
        for number in torch.unique(number_R).tolist():
            chosen = row_R[number_R == number]
            cross[number] += _product(differences[chosen], rows[chosen])

    def finish(self, state: State) -> State:
        """Return means in place of sums, float32; for experts also those of all rows (`.pool`)."""
        count = state[f"{self.name}.rows"]
        means = {f"{self.name}.rows": count}
        for name, total in state.items():
            if total.is_floating_point():
                means[name] = _mean(total, count)
                if count.ndim:
                    means[f"{name}.pool"] = _mean(total.sum(dim=0), count.sum())
        return means

    def of_expert(self, state: State, expert: int) -> State:
        return {name: x if name.endswith(".pool") else x[expert] for name, x in state.items()}

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        moment, count = state[self.name], state[f"{self.name}.rows"]
        if experts is None:
            moment += gram(rows)
            count += len(rows)
            return
        number_R, row_R = by_expert(experts)
        for number in torch.unique(number_R).tolist():
            chosen = rows[row_R[number_R == number]]
            moment[number] += gram(chosen)
            count[number] += len(chosen)


class PooledMoment(SecondMoment):
    """The sum of the outer products of all rows, whichever expert reads them."""

    name = "pooled_moment"

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return super().shapes(Site(site.name, site.width))

    def of_expert(self, state: State, expert: int) -> State:
        return state

    def update_cross(
        self, state: State, rows: Tensor, differences: Tensor, experts: Tensor | None
    ) -> None:
        if experts is not None and experts.ndim == 1:
            row_R = by_expert(experts)[1]
            rows, differences = rows[row_R], differences[row_R]
        super().update_cross(state, rows, differences, None)

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        if experts is not None:
            rows = rows[by_expert(experts)[1]] if experts.ndim == 1 else rows
        super().update(state, rows, None)


def _mean(moment: Tensor, rows: Tensor) -> Tensor:
    return (moment / rows.clamp(min=1)[..., None, None]).float()


def gram(rows: Tensor) -> Tensor:
    """Return Σ x·xᵀ of rows `[R, I]`, as float64."""
    return _product(rows, rows)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return (left.float().T @ right.float()).double()


def by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return number and row of every pair of a row and an expert that reads it.

    Args:
        experts: int64 `[R]` or `[R, K]`; negative entries are no experts.
    """
    pairs_RK = experts if experts.ndim == 2 else experts[:, None]
    row_R, column_R = (pairs_RK >= 0).nonzero(as_tuple=True)
    return pairs_RK[row_R, column_R], row_R
