# SPDX-License-Identifier: Apache-2.0
"""The parts that algorithms share which judge codes by the second moment of the inputs.

The mathematics is in `formats.nvfp4.second_order`. Here is which moment a weight is given.

An expert that few tokens reached has a poor moment of its own, so it takes some of the other
experts': H = (n·H_own + 64·H_pool)/(n + 64) for n rows, where H_pool is the mean over the rows of
all experts. An expert without a row has the pool, and if no row reached any, all inputs count
alike. Gate and up of all experts may share the pool itself (`pooled`): they read the same tokens,
and one matrix is factored in place of one for each expert.

Shapes: O outputs, I inputs, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fourfold.algorithms.base import Algorithm, Figures, Weight
from fourfold.errors import ObservationError
from fourfold.formats import nvfp4
from fourfold.formats.base import WeightFormat
from fourfold.formats.nvfp4.block_scales import group_scale_and_unit
from fourfold.formats.nvfp4.format import BLOCK_SCALE, CODES, NVFP4
from fourfold.formats.nvfp4.second_order import Moment, Rounded
from fourfold.statistics import PooledMoment, SecondMoment, Site

OWN, POOLED = SecondMoment.name, PooledMoment.name

POOL_ROWS = 64
"""Rows that the mean over all experts counts for, beside an expert's own."""

LARGE = 1 << 30
"""Bytes of second moments at one site beyond which gate and up of its experts share one."""


@dataclass(frozen=True)
class SecondOrder(Algorithm):
    """An algorithm for NVFP4 that reads the second moment of a weight's inputs."""

    needs: ClassVar[frozenset[str]] = frozenset({OWN, POOLED})

    range: int = 256
    """The block scale of the largest block: the group scale is amax/(6·range)."""
    pooled: bool | None = None
    """Whether gate and up of all experts share a moment; None: where theirs would be `LARGE`."""
    damping: float = 0.01
    """The part of its mean diagonal that is added to a moment."""

    def supports(self, fmt: WeightFormat) -> bool:
        return isinstance(fmt, NVFP4)

    def needs_at(self, site: Site) -> frozenset[str]:
        is_shared = self.pooled
        if is_shared is None:
            is_shared = STATISTIC.nbytes(site) > LARGE
        is_gate_up = site.experts is not None and not site.name.endswith(".down")
        return frozenset({POOLED if is_shared and is_gate_up else OWN})

    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        figures, rounded = [], []
        moments: dict[int, Moment] = {}
        for weight in weights:
            amax = fmt.amax(weight.matrix_OI, name=weight.name)
            figures.append(Figures(amax))
            source = weight.statistics[OWN if OWN in weight.statistics else POOLED]
            moment = moments.get(source.data_ptr()) or self._moment(weight)
            moments[source.data_ptr()] = moment
            rounded.append(Rounded(weight.matrix_OI.float(), moment))
        largest = max(float(x.target_OI.abs().max()) for x in rounded)
        group_scale, unit = group_scale_and_unit(largest, self.range)
        for chosen in rounded:
            chosen.target_OI /= unit
        group_scale = self.choose(rounded, group_scale / unit) * unit
        group_scale = min(max(group_scale, nvfp4.GLOBAL_SCALE_MIN), nvfp4.GLOBAL_SCALE_MAX)
        for weight, chosen, of_weight in zip(weights, rounded, figures, strict=True):
            chosen.pack(weight.out[CODES], weight.out[BLOCK_SCALE])
            error, energy = fmt.error(weight.matrix_OI, weight.out, group_scale)
            of_weight.sum_sq_err, of_weight.sum_sq_w = error, energy
        return group_scale, figures

    @abstractmethod
    def choose(self, weights: Sequence[Rounded], group_scale: float) -> float:
        """Choose codes and scales of the weights of a scale group; return its group scale."""

    def _moment(self, weight: Weight) -> Moment:
        """The damped moment of a weight's inputs; the one of a pool is made once."""
        if POOLED in weight.statistics:
            pool = _finite(weight.statistics[POOLED], weight.name)
            with _POOLS_LOCK:
                shared = _POOLS.get(pool)
                if shared is None or shared[0] != self.damping:
                    shared = self.damping, Moment(pool, self.damping)
                    shared[1].factor_II  # noqa: B018 - made here, once
                    _POOLS[pool] = shared
                return shared[1]
        return Moment(shrunk(weight), self.damping)


STATISTIC = SecondMoment()

_POOLS: MutableMapping[Tensor, tuple[float, Moment]] = WeakTensorKeyDictionary()
"""The prepared moments of pools, by the pool."""
_POOLS_LOCK = Lock()


def shrunk(weight: Weight, name: str = OWN) -> Tensor:
    """Return the moment `name` of a weight's own rows and, for an expert, of some of the pool's.

    Raises:
        ObservationError: It is not finite.
    """
    own, pool = weight.statistics[name], weight.statistics.get(f"{name}.pool")
    if pool is not None:
        rows = float(weight.statistics[f"{name}.rows"])
        own = (rows * own + POOL_ROWS * pool) / (rows + POOL_ROWS)
    return _finite(own, weight.name)


def _finite(moment: Tensor, name: str) -> Tensor:
    bounds = moment.diagonal() if moment.ndim == 2 else moment
    if not bool(torch.isfinite(bounds).all()):
        raise ObservationError(
            f"{name}: its inputs are so large that the sum of their squares is not finite in "
            "float32. Leave the weight as it is, with a keep pattern."
        )
    return moment
