# SPDX-License-Identifier: Apache-2.0
"""Statistics of activations: what a calibration run can accumulate at the inputs of a layer.

A plan names the statistics that it needs, observers update them with the rows that a layer reads,
and ranks merge what each of them has seen. To add one, write a subclass of `Statistic` in a file
of its own and add it to `STATISTICS`.

This package lies below `planning`, which counts the memory that statistics take.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fourfold.statistics.amax import Amax
from fourfold.statistics.base import Reduction, Site, State, Statistic
from fourfold.statistics.block_amaxes import BlockAmaxes
from fourfold.statistics.second_moment import (
    MomentBlocks,
    MomentDiagonal,
    Moments,
    PooledMoment,
    SecondMoment,
)
from fourfold.statistics.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Amax(),
        Tokens(),
        BlockAmaxes(),
        SecondMoment(),
        PooledMoment(),
        MomentBlocks(),
        MomentDiagonal(),
    )
}
"""Every statistic, by the name with which an algorithm asks for it."""

SMALL = frozenset({"amax", "tokens"})
"""The statistics that are measured wherever any is."""

BLOCK_AMAXES = BlockAmaxes.name

KEPT = SMALL | {BLOCK_AMAXES}
"""The statistics that `calibration.safetensors` holds. Others are dropped with their layer."""


def statistic_of(tensor: str) -> Statistic:
    """Return the statistic that a tensor of a state belongs to, by the tensor's name."""
    return STATISTICS[tensor.partition(".")[0]]


def statistics_of_rows(names: Iterable[str], rows: Tensor) -> State:
    """Return finished statistics of the inputs of one linear layer.

    Args:
        names: Those that are wanted, as `Algorithm.needs` names them.
        rows: The inputs, `[R, I]`.
    """
    site, finished = Site("rows", rows.shape[1]), State()
    for name in sorted(names):
        state = STATISTICS[name].new(site, rows.device)
        STATISTICS[name].update(state, rows, None)
        finished |= STATISTICS[name].finish(state)
    return finished


__all__ = [
    "BLOCK_AMAXES",
    "KEPT",
    "SMALL",
    "STATISTICS",
    "Amax",
    "BlockAmaxes",
    "MomentBlocks",
    "MomentDiagonal",
    "Moments",
    "PooledMoment",
    "Reduction",
    "SecondMoment",
    "Site",
    "State",
    "Statistic",
    "Tokens",
    "statistic_of",
    "statistics_of_rows",
]
