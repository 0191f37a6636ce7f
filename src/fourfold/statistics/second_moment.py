# SPDX-License-Identifier: Apache-2.0
"""`second_moment`: Σ x·xᵀ of the inputs, and how many rows it is a sum of.

F64 `[I, I]` or `[E, I, I]`, and I64 `[]` or `[E]` (`second_moment.rows`). `pooled_moment` is the
same of all experts of a module together: `[I, I]` whatever E is. `second_moment_blocks` and
`second_moment_diagonal` are parts of it: `[I/16, 16, 16]` and `[I]`, or these for each expert. A
state has the lower half of a matrix alone; what `finish` returns is whole.

**Order.** The product of the rows that arrive together is one matrix product in float32, the same
whoever computes it. It is rounded to multiples of 2⁻²² times a power of two near its mean diagonal:
far less than the damping of a moment (`formats.nvfp4.second_order`). So rounded, products are added
in float64. Its 53 bits hold their sum without rounding, and the sum is the same in any order, while
it is below 2³¹ times the smallest of their mean diagonals: a channel may have 2¹² times the mean
energy, and there may be 2¹⁹ products of like energy. The statistics of a run are then those of a
run on any number of ranks that share out its batches.

Shapes: R rows, I input features, B blocks of them, K features of a block, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.statistics.base import Reduction, Site, State, Statistic

BLOCK = 16
COLUMNS = 256
"""Columns of a product that are computed at once."""


class SecondMoment(Statistic):
    """The sum of the outer products of the rows that reached a site, for each expert."""

    name = "second_moment"
    reduction: Reduction = "sum"

    def shape(self, width: int) -> tuple[int, ...]:
        """Return the shape of the moment of one expert, or of a linear layer."""
        return width, width

    def add(self, moment: Tensor, rows: Tensor) -> None:
        """Add the sum over rows `[R, I]` to a moment of `shape`, in place.

        Of a matrix the lower half alone is computed, in blocks of columns; the rest is undefined.
        """
        x_RI = rows.float()
        width = x_RI.shape[1]
        product_II = torch.empty(width, width, device=rows.device)
        for start in range(0, width, COLUMNS):
            stop = min(start + COLUMNS, width)
            torch.mm(x_RI[:, start:].T, x_RI[:, start:stop], out=product_II[start:, start:stop])
        shift = _shift(product_II.diagonal())
        if rows.device.type == "cpu":
            from fourfold.statistics import moment_cpu

            moment_cpu.add_lower(moment.numpy(), product_II.numpy(), float(shift))
        else:
            moment += ((product_II.double() + shift) - shift).tril()

    def mean(self, moment: Tensor, rows: Tensor) -> Tensor:
        """Return a moment that is a sum over so many rows as their mean, float32, whole."""
        count = rows.clamp(min=1)
        if moment.device.type == "cpu":
            from fourfold.statistics import moment_cpu

            mean = torch.empty(moment.shape)
            moment_cpu.whole_mean(moment.numpy(), float(count), mean.numpy())
            return mean
        mean = (moment / count).float()
        return mean.tril() + mean.tril(-1).mT

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            self.name: (torch.float64, (*site.lead, *self.shape(site.width))),
            f"{self.name}.rows": (torch.int64, site.lead),
        }

    def finish(self, state: State) -> State:
        """Return means in place of sums, float32; for experts also that of all rows (`.pool`)."""
        moment, rows = state[self.name], state[f"{self.name}.rows"]
        if not rows.ndim:
            return {self.name: self.mean(moment, rows), f"{self.name}.rows": rows}
        means = torch.empty(moment.shape, device=moment.device)
        for number, mean in enumerate(means):
            mean.copy_(self.mean(moment[number], rows[number]))
        pool = self.mean(moment.sum(dim=0), rows.sum())
        return {self.name: means, f"{self.name}.rows": rows, f"{self.name}.pool": pool}

    def of_expert(self, state: State, expert: int) -> State:
        pool = f"{self.name}.pool"
        return {name: x if name == pool else x[expert] for name, x in state.items()}

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        moment, count = state[self.name], state[f"{self.name}.rows"]
        if experts is None:
            self.add(moment, rows)
            count += len(rows)
            return
        number_R, row_R = by_expert(experts)
        for number in torch.unique(number_R).tolist():
            chosen = rows[row_R[number_R == number]]
            self.add(moment[number], chosen)
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


class MomentBlocks(SecondMoment):
    """The blocks of 16×16 on the diagonal of the second moment."""

    name = "second_moment_blocks"

    def shape(self, width: int) -> tuple[int, ...]:
        return width // BLOCK, BLOCK, BLOCK

    def add(self, moment: Tensor, rows: Tensor) -> None:
        x_BRK = rows.float().reshape(len(rows), -1, BLOCK).transpose(0, 1)
        product_BKK = (x_BRK.mT @ x_BRK).double()
        shift = _shift(product_BKK.diagonal(dim1=1, dim2=2))
        moment += (product_BKK + shift) - shift

    def mean(self, moment: Tensor, rows: Tensor) -> Tensor:
        return (moment / rows.clamp(min=1)).float()


class MomentDiagonal(SecondMoment):
    """The diagonal of the second moment: the energy of each input."""

    name = "second_moment_diagonal"

    def shape(self, width: int) -> tuple[int, ...]:
        return (width,)

    def add(self, moment: Tensor, rows: Tensor) -> None:
        energy_I = rows.double().square().sum(dim=0)
        shift = _shift(energy_I)
        moment += (energy_I + shift) - shift

    def mean(self, moment: Tensor, rows: Tensor) -> Tensor:
        return (moment / rows.clamp(min=1)).float()


def _shift(diagonal: Tensor) -> Tensor:
    """Return the number that a product is rounded with, as the head of this file says.

    A sum with 1.5·2³⁰ times a power of two has no bits below 2⁻²² times that power.
    """
    return 1.5 * 2.0**30 * diagonal.double().mean().frexp().exponent.double().exp2()


def by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return number and row of every pair of a row and an expert that reads it.

    Args:
        experts: int64 `[R]` or `[R, experts of a row]`; negative entries are no experts.
    """
    pairs = experts if experts.ndim == 2 else experts[:, None]
    row_R, column_R = (pairs >= 0).nonzero(as_tuple=True)
    return pairs[row_R, column_R], row_R
