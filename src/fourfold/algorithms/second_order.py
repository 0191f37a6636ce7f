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

On a GPU, `second_order_batched` computes the same for many groups at once. Largest magnitudes and
errors are found on the CPU in either case.

Shapes: N scale groups, M moments (N, or 1 that all groups share), O outputs, I inputs, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fourfold.algorithms.base import Figures, StackableAlgorithm, Weight
from fourfold.errors import ObservationError
from fourfold.formats import nvfp4
from fourfold.formats.base import WeightFormat
from fourfold.formats.nvfp4.block_scales import group_scale_and_unit
from fourfold.formats.nvfp4.format import BLOCK_SCALE, CODES, NVFP4
from fourfold.formats.nvfp4.second_order import Moment, Rounded, coarse
from fourfold.formats.nvfp4.second_order_batched import MomentBatch, RoundedBatch
from fourfold.statistics import PooledMoment, SecondMoment, Site

OWN, POOLED = SecondMoment.name, PooledMoment.name

POOL_ROWS = 64
"""Rows that the mean over all experts counts for, beside an expert's own."""

RIDGE = 0.05
"""The part of its mean diagonal that is added to a moment that is inverted for a target."""

MOST_ERROR, MOST_DAMPING = 0.3, 10.0
"""A weight whose own relative error exceeds the first is quantized again with ten times as much
damping, up to the second."""

WHILE_FACTORED, FACTORED = 10, 3
"""Float32 matrices of the size of a group's moment on a device: while it is factored, or the change
of its inputs predicted; and then."""

OF_WEIGHTS, BYTES_OF_ROW = 10, 5 << 10
"""Matrices of the size of a group's weights there, and bytes for the candidates of a row."""

LARGE = 1 << 30
"""Bytes of second moments at one site beyond which gate and up of its experts share one."""


Quantized = tuple[float | None, list[Figures]]
"""The group scale of a scale group, and the figures of its weights."""

Attempts = Sequence[Quantized | None]
"""What groups have become; None for those whose moment is singular, or nearly so."""


@dataclass(frozen=True)
class SecondOrder(StackableAlgorithm):
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
        def attempt_with(algorithm: SecondOrder, groups: Sequence[Sequence[Weight]]) -> Attempts:
            with suppress(ArithmeticError):
                return [algorithm._quantize(groups[0], fmt)]
            return [None]

        return self._until_close([weights], attempt_with)[0]

    def quantize_stack(
        self, groups: Sequence[Sequence[Weight]], fmt: WeightFormat, device: torch.device
    ) -> list[Quantized]:
        def attempt_with(algorithm: SecondOrder, groups: Sequence[Sequence[Weight]]) -> Attempts:
            return algorithm._quantize_stack(groups, fmt, device)

        return self._until_close(groups, attempt_with)

    def stack_bytes(self, rows: int, width: int) -> int:
        of_moment, of_weights = 4 * width * width, 4 * rows * width
        then = FACTORED * of_moment + OF_WEIGHTS * of_weights + BYTES_OF_ROW * rows
        return max(WHILE_FACTORED * of_moment, then)

    def _until_close(
        self,
        groups: Sequence[Sequence[Weight]],
        attempt_with: Callable[[SecondOrder, Sequence[Sequence[Weight]]], Attempts],
    ) -> list[Quantized]:
        """Quantize groups, and those again that lose too much of a weight, with more damping."""
        results: dict[int, Quantized] = {}
        waiting, algorithm = dict(enumerate(groups)), self
        while waiting:
            is_last = algorithm.damping >= MOST_DAMPING
            attempts = attempt_with(algorithm, list(waiting.values()))
            for number, attempt in zip(list(waiting), attempts, strict=True):
                if attempt is None and is_last:
                    raise ArithmeticError(
                        f"{waiting[number][0].name}: the damped second moment of its inputs is not "
                        "positive definite"
                    )
                if attempt is None:
                    continue
                if is_last or all(x.relative_error <= MOST_ERROR for x in attempt[1]):
                    for of_weight in attempt[1] if algorithm is not self else ():
                        of_weight.damping = algorithm.damping
                    results[number] = attempt
                    del waiting[number]
            algorithm = replace(algorithm, damping=min(10 * algorithm.damping, MOST_DAMPING))
            waiting = {
                number: [replace(weight, asymmetric=0.0) for weight in weights]
                for number, weights in waiting.items()
            }
        return [results[number] for number in range(len(groups))]

    def _quantize(self, weights: Sequence[Weight], fmt: WeightFormat) -> Quantized:
        figures, rounded = [_figures(weight, fmt) for weight in weights], []
        prepared: dict[int, tuple[Moment, Tensor | None]] = {}
        for weight in weights:
            source = finite(weight.statistics[_name_of(weight)], weight.name)
            if source.data_ptr() not in prepared:
                prepared[source.data_ptr()] = self._prepare(weight)
            moment, k_II = prepared[source.data_ptr()]
            rounded.append(Rounded(target(weight, k_II), moment))
        largest = max(float(x.target_OI.abs().max()) for x in rounded)
        group_scale, unit = group_scale_and_unit(largest, self.range)
        for chosen in rounded:
            chosen.target_OI /= unit
        group_scale = self.choose(rounded, coarse(group_scale / unit)) * unit
        group_scale = _valid(group_scale)
        for weight, chosen in zip(weights, rounded, strict=True):
            chosen.pack(weight.out[CODES], weight.out[BLOCK_SCALE])
        _measure_errors(weights, figures, fmt, group_scale)
        return group_scale, figures

    def _quantize_stack(
        self, groups: Sequence[Sequence[Weight]], fmt: WeightFormat, device: torch.device
    ) -> Attempts:
        figures = [[_figures(weight, fmt) for weight in weights] for weights in groups]
        moments = self._moments(groups, device)
        target_NOI = _targets(groups, device)
        scales, units = [], []
        for largest in target_NOI.abs().amax(dim=(1, 2)).tolist():
            group_scale, unit = group_scale_and_unit(largest, self.range)
            scales.append(coarse(group_scale / unit))
            units.append(unit)
        target_NOI /= torch.tensor(units, device=device)[:, None, None]
        batch = RoundedBatch(target_NOI, moments, torch.tensor(scales, device=device))
        del target_NOI
        self.choose_stack(batch)
        codes, block_scales = (part.cpu() for part in batch.pack())
        scales = batch.group_scale_N.tolist()
        is_positive_N = moments.is_positive_M.expand(len(groups)).tolist()
        attempts: list[Quantized | None] = []
        for number, weights in enumerate(groups):
            if not is_positive_N[number]:
                attempts.append(None)
                continue
            rows = [len(weight.matrix_OI) for weight in weights]
            of_weights = torch.split(codes[number], rows), torch.split(block_scales[number], rows)
            for weight, code, block_scale in zip(weights, *of_weights, strict=True):
                weight.out[CODES].copy_(code)
                weight.out[BLOCK_SCALE].copy_(block_scale)
            group_scale = _valid(scales[number] * units[number])
            _measure_errors(weights, figures[number], fmt, group_scale)
            attempts.append((group_scale, figures[number]))
        return attempts

    def _moments(self, groups: Sequence[Sequence[Weight]], device: torch.device) -> MomentBatch:
        """The damped moments of the inputs of some groups; one, if all of them read the same."""
        firsts = [weights[0] for weights in groups]
        sources = [finite(x.statistics[_name_of(x)], x.name).data_ptr() for x in firsts]
        if len(set(sources)) == 1:
            firsts = firsts[:1]
        width = firsts[0].matrix_OI.shape[1]
        moment_MII = torch.empty(len(firsts), width, width, device=device)
        for moment_II, weight in zip(moment_MII, firsts, strict=True):
            moment_II.copy_(shrunk(_on(weight, device).statistics, _name_of(weight)))
        return MomentBatch(moment_MII, self.damping)

    @abstractmethod
    def choose(self, weights: Sequence[Rounded], group_scale: float) -> float:
        """Choose codes and scales of the weights of a scale group; return its group scale."""

    @abstractmethod
    def choose_stack(self, batch: RoundedBatch) -> None:
        """Choose codes and scales of the weights of many scale groups, and the group scales."""

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


def _name_of(weight: Weight) -> str:
    """The statistic that a weight is given."""
    return OWN if OWN in weight.statistics else POOLED


def _on(weight: Weight, device: torch.device) -> Weight:
    """A weight whose statistics are on a device, but for the number of rows."""
    moved = {
        name: x.to(device) if isinstance(x, Tensor) and x.ndim else x
        for name, x in weight.statistics.items()
    }
    return replace(weight, statistics=moved)


def _figures(weight: Weight, fmt: WeightFormat) -> Figures:
    is_known = any(name.endswith(".cross") for name in weight.statistics)
    amax = fmt.amax(weight.matrix_OI, name=weight.name)
    return Figures(amax, asymmetric=weight.asymmetric if is_known else None)


def _measure_errors(
    weights: Sequence[Weight], figures: Sequence[Figures], fmt: WeightFormat, group_scale: float
) -> None:
    for weight, of_weight in zip(weights, figures, strict=True):
        error, energy = fmt.error(weight.matrix_OI, weight.out, group_scale)
        of_weight.sum_sq_err, of_weight.sum_sq_w = error, energy


def _valid(group_scale: float) -> float:
    return min(max(group_scale, nvfp4.GLOBAL_SCALE_MIN), nvfp4.GLOBAL_SCALE_MAX)


def _targets(groups: Sequence[Sequence[Weight]], device: torch.device) -> Tensor:
    """The targets of groups on a device, float32 `[N, O, I]`: the rows of a group's weights."""
    rows = sum(len(weight.matrix_OI) for weight in groups[0])
    target_NOI = torch.empty(len(groups), rows, groups[0][0].matrix_OI.shape[1], device=device)
    predictions: dict[int, Tensor | None] = {}
    for weights, target_OI in zip(groups, target_NOI, strict=True):
        parts = torch.split(target_OI, [len(weight.matrix_OI) for weight in weights])
        for weight, part_OI in zip(weights, parts, strict=True):
            name, k_II = _name_of(weight), None
            if is_moved(weight, name):
                source = weight.statistics[name].data_ptr()
                if source not in predictions:
                    predictions = {source: prediction(_on(weight, device).statistics, name)}
                k_II = predictions[source]
            part_OI.copy_(weight.matrix_OI)
            part_OI.copy_(target(replace(weight, matrix_OI=part_OI), k_II))
    return target_NOI


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
    ridged_II = h_II + RIDGE * mean * torch.eye(len(h_II), device=h_II.device)
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
