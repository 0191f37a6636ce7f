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

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fourfold.statistics.base import Reduction, Site, State, Statistic

BLOCK = 16
COLUMNS = 256
"""Columns of a product that are computed at once."""


class Moments(Statistic):
    """A sum of products of rows, for each expert, and the number of rows."""

    reduction: Reduction = "sum"

    @abstractmethod
    def shape(self, width: int) -> tuple[int, ...]:
        """Return the shape of the sum of one expert, or of a linear layer."""

    @abstractmethod
    def add(self, moment: Tensor, rows: Tensor) -> None:
        """Add the products of rows `[R, I]` to a sum of `shape`, in place.

        Products are computed where the rows are; the sum may be on the CPU all the same.
        """

    def mean(self, moment: Tensor, rows: Tensor) -> Tensor:
        """Return the mean of a sum over so many rows, float32."""
        return _mean(moment, rows)

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            self.name: (torch.float64, (*site.lead, *self.shape(site.width))),
            f"{self.name}.rows": (torch.int64, site.lead),
        }

    def finish(self, state: State) -> State:
        """Return means in place of sums, float32; for experts also those of all rows (`.pool`)."""
        rows = state[f"{self.name}.rows"]
        means = {f"{self.name}.rows": rows}
        for name, total in state.items():
            if not total.is_floating_point():
                continue
            of = self.mean if name == self.name else _mean
            if not rows.ndim:
                means[name] = of(total, rows)
                continue
            means[name] = torch.empty(total.shape, device=total.device)
            for number, mean in enumerate(means[name]):
                mean.copy_(of(total[number], rows[number]))
        return means | self.pool(state) if rows.ndim else means

    def pool(self, state: State) -> State:
        """Return the means over the rows of all experts, given the sums of each."""
        rows = state[f"{self.name}.rows"].sum()
        return {
            f"{name}.pool": (self.mean if name == self.name else _mean)(total.sum(dim=0), rows)
            for name, total in state.items()
            if total.is_floating_point()
        }

    def of_expert(self, state: State, expert: int) -> State:
        return {name: x if name.endswith(".pool") else x[expert] for name, x in state.items()}

    def parts(self, experts: Tensor | None) -> Iterator[tuple[Any, Any]]:
        """Yield indices of a sum and of the rows that it is of, given the experts of each row."""
        if experts is None:
            yield ..., slice(None)
            return
        number_R, row_R = by_expert(experts)
        for number in torch.unique(number_R).tolist():
            yield number, row_R[number_R == number]

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        moment, count = state[self.name], state[f"{self.name}.rows"]
        for part, chosen in self.parts(experts):
            self.add(moment[part], rows[chosen])
            count[part] += len(rows[chosen])


class SecondMoment(Moments):
    """The sum of the outer products of the rows that reached a site, for each expert."""

    name = "second_moment"

    def shape(self, width: int) -> tuple[int, ...]:
        return width, width

    def add(self, moment: Tensor, rows: Tensor) -> None:
        x_RI = rows.float()
        width = x_RI.shape[1]
        product_II = torch.empty(width, width, device=rows.device)
        for start in range(0, width, COLUMNS):
            stop = min(start + COLUMNS, width)
            torch.mm(x_RI[:, start:].T, x_RI[:, start:stop], out=product_II[start:, start:stop])
        shift = _shift(product_II.diagonal().double().mean())
        if moment.device.type == "cpu":
            from fourfold.statistics import moment_cpu

            moment_cpu.add_lower(moment.numpy(), product_II.cpu().numpy(), float(shift))
        else:
            moment += ((product_II.double() + shift) - shift).tril()

    def mean(self, moment: Tensor, rows: Tensor) -> Tensor:
        if moment.device.type == "cpu":
            from fourfold.statistics import moment_cpu

            mean = torch.empty(moment.shape)
            moment_cpu.whole_mean(moment.numpy(), float(rows.clamp(min=1)), mean.numpy())
            return mean
        mean = _mean(moment, rows)
        return mean.tril() + mean.tril(-1).mT

    def new_cross(self, site: Site, device: torch.device | str = "cpu") -> State:
        """Return the cross moment of a site that no row has reached."""
        dtype, shape = self.shapes(site)[self.name]
        return {f"{self.name}.cross": torch.zeros(shape, dtype=dtype, device=device)}

    def update_cross(
        self, state: State, rows: Tensor, differences: Tensor, experts: Tensor | None
    ) -> None:
        """Accumulate Σ (x − x̂)·x̂ᵀ, given rows x̂ as `update` is, and the differences x − x̂."""
        cross = state[f"{self.name}.cross"]
        for part, chosen in self.parts(experts):
            _add_cross(cross[part], differences[chosen], rows[chosen])


class PooledMoment(SecondMoment):
    """The sum of the outer products of all rows, whichever expert reads them."""

    name = "pooled_moment"

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return super().shapes(Site(site.name, site.width))

    def of_expert(self, state: State, expert: int) -> State:
        return state

    def parts(self, experts: Tensor | None) -> Iterator[tuple[Any, Any]]:
        if experts is None or experts.ndim == 2:
            yield ..., slice(None)
        else:
            yield ..., by_expert(experts)[1]


class MomentBlocks(Moments):
    """The blocks of 16×16 on the diagonal of the second moment."""

    name = "second_moment_blocks"

    def shape(self, width: int) -> tuple[int, ...]:
        return width // BLOCK, BLOCK, BLOCK

    def add(self, moment: Tensor, rows: Tensor) -> None:
        x_BRK = rows.float().reshape(len(rows), -1, BLOCK).transpose(0, 1)
        product_BKK = (x_BRK.mT @ x_BRK).double()
        shift = _shift(product_BKK.diagonal(dim1=1, dim2=2).mean())
        moment += ((product_BKK + shift) - shift).to(moment.device)


class MomentDiagonal(Moments):
    """The diagonal of the second moment: the energy of each input."""

    name = "second_moment_diagonal"

    def shape(self, width: int) -> tuple[int, ...]:
        return (width,)

    def add(self, moment: Tensor, rows: Tensor) -> None:
        energy_I = rows.double().square().sum(dim=0)
        shift = _shift(energy_I.mean())
        moment += ((energy_I + shift) - shift).to(moment.device)


def _add_cross(cross_II: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ·right of rows `[R, I]`, whole, rounded as moments are, by the energies of both."""
    product_II = (left.float().T @ right.float()).double()
    energies = left.double().square().sum() * right.double().square().sum()
    shift = _shift(energies.sqrt() / left.shape[1])
    cross_II += (product_II + shift) - shift


def _mean(total: Tensor, rows: Tensor) -> Tensor:
    return (total / rows.clamp(min=1)).float()


def _shift(energy: Tensor) -> Tensor:
    """Return the number that a product is rounded with, as the head of this file says.

    A sum with 1.5·2³⁰ times a power of two has no bits below 2⁻²² times that power.
    """
    return 1.5 * 2.0**30 * energy.frexp().exponent.double().exp2()


def by_expert(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return number and row of every pair of a row and an expert that reads it.

    Args:
        experts: int64 `[R]` or `[R, experts of a row]`; negative entries are no experts.
    """
    pairs = experts if experts.ndim == 2 else experts[:, None]
    row_R, column_R = (pairs >= 0).nonzero(as_tuple=True)
    return pairs[row_R, column_R], row_R
