# SPDX-License-Identifier: Apache-2.0
"""`second_moment`: Σ x·xᵀ of the inputs, and how many rows it is a sum of.

F64 `[I, I]` or `[E, I, I]`, and I64 `[]` or `[E]` (`second_moment.rows`). `pooled_moment` is the
same of all experts of a module together: `[I, I]` whatever E is.

**Order.** The product of the rows that arrive together is one matrix product in float32, the same
whoever computes it. It is rounded to multiples of 2⁻²² times a power of two near its mean diagonal:
far less than the damping of a moment (`formats.nvfp4.second_order`). So rounded, products are added
in float64. Its 53 bits hold their sum without rounding, and the sum is the same in any order, while
it is below 2³¹ times the smallest of their mean diagonals: a channel may have 2¹² times the mean
energy, and there may be 2¹⁹ products of like energy. The statistics of a run are then those of a
run on any number of ranks that share out its batches.

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

    def finish(self, state: State) -> State:
        """Return means in place of sums, float32; for experts also that of all rows (`.pool`)."""
        moment, rows = state[self.name], state[f"{self.name}.rows"]
        means = {self.name: _mean(moment, rows), f"{self.name}.rows": rows}
        if rows.ndim:
            means[f"{self.name}.pool"] = _mean(moment.sum(dim=0), rows.sum())
        return means

    def of_expert(self, state: State, expert: int) -> State:
        pool = f"{self.name}.pool"
        return {name: x if name == pool else x[expert] for name, x in state.items()}

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

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        if experts is not None:
            rows = rows[by_expert(experts)[1]] if experts.ndim == 1 else rows
        super().update(state, rows, None)


def _mean(moment: Tensor, rows: Tensor) -> Tensor:
    return (moment / rows.clamp(min=1)[..., None, None]).float()


def gram(rows: Tensor) -> Tensor:
    """Return Σ x·xᵀ of rows `[R, I]`, float64, rounded as the head of this file says."""
    x_RI = rows.float()
    product_II = (x_RI.T @ x_RI).double()
    # A sum with 1.5·2³⁰ times a power of two has no bits below 2⁻²² times that power.
    shift = 1.5 * 2.0**30 * product_II.diagonal().mean().frexp().exponent.double().exp2()
    return (product_II + shift) - shift


def by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return number and row of every pair of a row and an expert that reads it.

    Args:
        experts: int64 `[R]` or `[R, K]`; negative entries are no experts.
    """
    pairs_RK = experts if experts.ndim == 2 else experts[:, None]
    row_R, column_R = (pairs_RK >= 0).nonzero(as_tuple=True)
    return pairs_RK[row_R, column_R], row_R
