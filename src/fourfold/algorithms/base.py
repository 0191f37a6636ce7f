# SPDX-License-Identifier: Apache-2.0
"""How scales and codes are chosen: the interface of an algorithm, and the registry.

An algorithm quantizes one **scale group** at a time: the weights that engines fuse and that share
one group scale. It names the statistics of the inputs that it needs; calibration measures them,
and nothing is measured that no algorithm of the plan asks for.

There are three kinds.

- A plain `Algorithm` is given the weights of the group whole, with buffers for their parts.
- A `StackableAlgorithm` can also be given many groups of one shape, to quantize them side by side
  on a GPU. Their codes may differ from those of `quantize` where rounding decides.
- A `RowwiseAlgorithm` chooses each row's scales and codes from that row and the group scale alone,
  by one of the ways that the format's kernels know. Such weights are read and quantized in pieces
  where a group is large, and many at a time on a GPU; the bytes are those of `quantize`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fourfold.formats.base import WeightFormat
from fourfold.formats.registry import Registry
from fourfold.formats.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fourfold.statistics import Site


@dataclass(slots=True)
class Figures:
    """Measurements of one quantized weight."""

    amax: float = 0.0
    """The largest magnitude of the weight."""
    sum_sq_err: float = 0.0
    """Σ(w − ŵ)²."""
    sum_sq_w: float = 0.0
    """Σw²."""
    asymmetric: float | None = None
    """The part of the change of its inputs that it makes up for; None if that is not known."""
    damping: float | None = None
    """The damping, where it had to be more than the recipe's."""

    @property
    def relative_error(self) -> float:
        """The relative Frobenius error ‖w − ŵ‖/‖w‖; 0 for an all-zero weight."""
        return math.sqrt(self.sum_sq_err / self.sum_sq_w) if self.sum_sq_w else 0.0

    def or_lost(self) -> Figures:
        """Return these, or those of a weight that became 0 if its energy underflowed to 0."""
        energy = self.sum_sq_w or self.amax**2
        return dataclasses.replace(self, sum_sq_err=self.sum_sq_err or energy, sum_sq_w=energy)


@dataclass(frozen=True)
class Weight:
    """One linear weight of a scale group, as an algorithm sees it."""

    name: str
    matrix_OI: Tensor
    """bf16, fp16 or fp32 `[out, in]`, contiguous along `in`. Not to be changed."""
    out: Mapping[str, Tensor]
    """The buffers to fill, by row part: uint8 `[rows of the part, bytes of a row]`."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    """Statistics of the weight's inputs, by name: what `Algorithm.needs` asks for. For a routed
    expert they are of the rows that were routed to it."""
    asymmetric: float = 0.0
    """The part of the change of its inputs that the weight is to make up for."""


class Algorithm(ABC):
    """A way to choose scales and codes."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the statistics of the inputs that `quantize` reads from `Weight.statistics`."""

    def with_options(self, options: Mapping[str, float]) -> Algorithm:
        """Return this algorithm with other options, which are the fields of a frozen dataclass."""
        fields: Any = self
        changed: Algorithm = dataclasses.replace(fields, **options)
        return changed

    def needs_at(self, site: Site) -> frozenset[str]:
        """Return those of `needs` that `quantize` reads where the inputs arrive at a site."""
        return self.needs

    def supports(self, fmt: WeightFormat) -> bool:
        """True if this algorithm can quantize to a format."""
        return True

    @abstractmethod
    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        """Quantize one scale group.

        Args:
            weights: The weights of the group, whole. Their buffers are filled.
            fmt: The format to quantize to.

        Returns:
            The group scale (None for a format without one), and the figures of each weight.

        Raises:
            NonFiniteError: A weight holds NaN or Inf.
        """


class StackableAlgorithm(Algorithm):
    """Quantizes scale groups whole, also many of one shape side by side on a device."""

    @abstractmethod
    def quantize_stack(
        self, groups: Sequence[Sequence[Weight]], fmt: WeightFormat, device: torch.device
    ) -> list[tuple[float | None, list[Figures]]]:
        """Quantize scale groups side by side.

        Args:
            groups: The weights of each group, in the memory of the CPU, as `quantize` is given
                them. All groups have the same numbers of rows and inputs, and the weights of a
                group have the same inputs.
            fmt: The format to quantize to.
            device: The device that computes.

        Returns:
            For each group, what `quantize` returns.

        Raises:
            NonFiniteError: A weight holds NaN or Inf.
        """

    @abstractmethod
    def stack_bytes(self, rows: int, width: int) -> int:
        """Return an estimate of the device's memory that a group takes in a stack.

        Args:
            rows: Outputs of all weights of the group.
            width: Inputs of each.
        """


class RowwiseAlgorithm(Algorithm):
    """Chooses scales by one of the ways that a format's kernels know, row by row."""

    scale: ClassVar[str]
    """Which of `WeightFormat.scales` it is."""

    def supports(self, fmt: WeightFormat) -> bool:
        return self.scale in fmt.scales

    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        amaxes = [fmt.amax(weight.matrix_OI, name=weight.name) for weight in weights]
        group_scale = fmt.group_scale(max(amaxes))
        figures = []
        for weight, amax in zip(weights, amaxes, strict=True):
            error, energy = fmt.quantize(
                weight.matrix_OI,
                weight.out,
                scale=self.scale,
                group_scale=group_scale,
                name=weight.name,
            )
            figures.append(Figures(amax, error, energy))
        return group_scale, figures


ALGORITHMS: Registry[Algorithm] = Registry(
    {
        "max": "fourfold.algorithms.max_scale:MaxScale",
        "mse": "fourfold.algorithms.mse_scale:MSEScale",
        "four_over_six": "fourfold.algorithms.four_over_six:FourOverSix",
        "mse_weighted": "fourfold.algorithms.mse_weighted:MSEWeighted",
        "local_hessian": "fourfold.algorithms.local_hessian:LocalHessian",
        "gptq": "fourfold.algorithms.gptq:GPTQ",
        "gptq_joint": "fourfold.algorithms.gptq_joint:GPTQJoint",
    }
)
"""The algorithms by name, which is what a recipe's `weights.scale` says."""


def fields_of(algorithm: Algorithm) -> frozenset[str]:
    """Return the names of an algorithm's options."""
    if not dataclasses.is_dataclass(algorithm):
        return frozenset()
    return frozenset(field.name for field in dataclasses.fields(algorithm))


def algorithm_of(scheme: Scheme) -> Algorithm:
    """Return the algorithm of a scheme, with the scheme's options."""
    algorithm = ALGORITHMS[scheme.algorithm]
    return algorithm.with_options(dict(scheme.options)) if scheme.options else algorithm
