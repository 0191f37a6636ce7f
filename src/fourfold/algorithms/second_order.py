# SPDX-License-Identifier: Apache-2.0
"""The parts that algorithms share which judge codes by the second moment of the inputs.

The mathematics is in `formats.nvfp4.second_order`. Here is which moment a weight is given.

An expert that few tokens reached has a poor moment of its own, so it takes some of the other
experts': H = (n·H_own + 64·H_pool)/(n + 64) for n rows, where H_pool is the mean over the rows of
all experts. An expert without a row has the pool, and if no row reached any, all inputs count
alike. Gate and up of all experts may share the pool itself (`pooled`): they read the same tokens,
and one matrix is factored in place of one for each expert.

Inputs that only reach a part of the input space leave the rest of a weight to chance: codes may
move far from it where calibration saw nothing. A weight that loses more than 30 % of itself is
quantized again with more damping, for its own inputs as they are, until it does not. With the most
damping, codes are close to those of the smallest squared error of the weight.

Shapes: O outputs, I inputs, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from fourfold.formats.nvfp4.second_order import Moment, Rounded, coarse
from fourfold.statistics import PooledMoment, SecondMoment, Site

OWN, POOLED = SecondMoment.name, PooledMoment.name

POOL_ROWS = 64
"""Rows that the mean over all experts counts for, beside an expert's own."""

RIDGE = 0.05
"""The part of its mean diagonal that is added to a moment that is inverted for a target."""

MOST_ERROR, MOST_DAMPING = 0.3, 10.0
"""A weight whose own relative error exceeds the first is quantized again with ten times as much
damping, up to the second."""

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
        attempt = self
        while attempt.damping < MOST_DAMPING:
            with suppress(ArithmeticError):  # the moment is singular, or nearly so
                group_scale, figures = attempt._quantize(weights, fmt)
                if all(x.relative_error <= MOST_ERROR for x in figures):
                    break
            attempt = replace(attempt, damping=min(10 * attempt.damping, MOST_DAMPING))
            weights = [replace(weight, asymmetric=0.0) for weight in weights]
        else:
            group_scale, figures = attempt._quantize(weights, fmt)
        for of_weight in figures if attempt is not self else ():
            of_weight.damping = attempt.damping
        return group_scale, figures

    def _quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        figures, rounded = [], []
        prepared: dict[int, tuple[Moment, Tensor | None]] = {}
        for weight in weights:
            amax = fmt.amax(weight.matrix_OI, name=weight.name)
            is_known = any(name.endswith(".cross") for name in weight.statistics)
            asymmetric = weight.asymmetric if is_known else None
            figures.append(Figures(amax, asymmetric=asymmetric))
            source = weight.statistics[OWN if OWN in weight.statistics else POOLED]
            finite(source, weight.name)
            if source.data_ptr() not in prepared:
                prepared[source.data_ptr()] = self._prepare(weight)
            moment, k_II = prepared[source.data_ptr()]
            rounded.append(Rounded(target(weight, k_II), moment))
        largest = max(float(x.target_OI.abs().max()) for x in rounded)
        group_scale, unit = group_scale_and_unit(largest, self.range)
        for chosen in rounded:
            chosen.target_OI /= unit
        group_scale = self.choose(rounded, coarse(group_scale / unit)) * unit
        group_scale = min(max(group_scale, nvfp4.GLOBAL_SCALE_MIN), nvfp4.GLOBAL_SCALE_MAX)
        for weight, chosen, of_weight in zip(weights, rounded, figures, strict=True):
            chosen.pack(weight.out[CODES], weight.out[BLOCK_SCALE])
            error, energy = fmt.error(weight.matrix_OI, weight.out, group_scale)
            of_weight.sum_sq_err, of_weight.sum_sq_w = error, energy
        return group_scale, figures

    @abstractmethod
    def choose(self, weights: Sequence[Rounded], group_scale: float) -> float:
        """Choose codes and scales of the weights of a scale group; return its group scale."""

    def _prepare(self, weight: Weight) -> tuple[Moment, Tensor | None]:
        """The damped moment of a weight's inputs, and what predicts how they have moved, where that
        is wanted. Those of a pool are made once."""
        statistics = weight.statistics
        if POOLED not in statistics:
            k_II = prediction(statistics, OWN) if is_moved(weight, OWN) else None
            return Moment(shrunk(statistics), self.damping), k_II
        pool = statistics[POOLED]
        with _POOLS_LOCK:
            moments, predictions = _POOLS.setdefault(pool, ({}, {}))
            if self.damping not in moments:
                moments[self.damping] = Moment(pool, self.damping).prepare()
            k_II = None
            if is_moved(weight, POOLED):
                if POOLED not in predictions:
                    predictions[POOLED] = prediction(statistics, POOLED)
                k_II = predictions[POOLED]
            return moments[self.damping], k_II


def is_moved(weight: Weight, name: str) -> bool:
    """True if a weight is to make up for how its inputs have moved."""
    return weight.asymmetric > 0 and f"{name}.cross" in weight.statistics


def target(weight: Weight, k_II: Tensor | None) -> Tensor:
    """Return the real values that the codes of a weight approximate, float32 `[O, I]`.

    They are the weight's own, unless its inputs have moved from x to x̂. What that costs in the
    outputs is W·(x − x̂), and its best estimate from x̂ is W·C·H⁻¹·x̂ with C = Σ (x − x̂)·x̂ᵀ. A part
    of it, `asymmetric`, is added to the weight.

    Args:
        weight: The weight.
        k_II: C·H⁻¹, as `prediction` returns it; None if the inputs have not moved.
    """
    w_OI = weight.matrix_OI.float()
    return w_OI if k_II is None else w_OI + weight.asymmetric * (w_OI @ k_II)


def prediction(statistics: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return K = C·(H + a ridge)⁻¹, `[I, I]`, which predicts x − x̂ as K·x̂; None without rows."""
    h_II, c_II = (shrunk(statistics, x) for x in (name, f"{name}.cross"))
    mean = h_II.diagonal().mean()
    if not bool(mean > 0):
        return None
    ridged_II = h_II + RIDGE * mean * torch.eye(len(h_II))
    k_II: Tensor = torch.linalg.solve(ridged_II, c_II, left=False)
    return k_II


STATISTIC = SecondMoment()

_Prepared = tuple[dict[float, Moment], dict[str, Tensor | None]]

_POOLS: MutableMapping[Tensor, _Prepared] = WeakTensorKeyDictionary()
"""By pool: its moments, by the damping, and what predicts how its inputs have moved."""
_POOLS_LOCK = Lock()


def shrunk(statistics: Mapping[str, Tensor], name: str = OWN) -> Tensor:
    """Return the mean of a weight's own rows and, for an expert, some of those of all experts."""
    own, pool = statistics[name], statistics.get(f"{name}.pool")
    if pool is None:
        return own
    rows = float(statistics[f"{name.partition('.')[0]}.rows"])
    return (rows * own + POOL_ROWS * pool) / (rows + POOL_ROWS)


def finite(moment: Tensor, name: str) -> Tensor:
    """Return the moment of a weight's inputs.

    Raises:
        ObservationError: It is not finite.
    """
    bounds = moment.diagonal() if moment.ndim == 2 else moment
    if not bool(torch.isfinite(bounds).all()):
        raise ObservationError(
            f"{name}: its inputs are so large that the sum of their squares is not finite in "
            "float32. Leave the weight as it is, with a keep pattern."
        )
    return moment
