# SPDX-License-Identifier: Apache-2.0
"""Factors per channel that make an activation and its readers easier to round together.

    s_i = rms(x_i)^a / ‖W_:i‖^b,   rounded to 2^k_i;   x' = x · 2⁻ᵏ,   W' = W · 2ᵏ,   x'·W'ᵀ = x·Wᵀ

a = ½, b = ½ is SmoothQuant's balance, b = 0 is AWQ's protection of the channels that are large in
x. Neither is always right, so both exponents are searched, on a grid that holds (0, 0), by what
counts: the error of the outputs of the quantized layers,

    loss(k) = mean over readers of ‖Q(x')·Q(W')ᵀ − x·Wᵀ‖² / ‖x·Wᵀ‖².

Rows are of three parts: some to fit s and what algorithms read of inputs, some to choose by, and
some to judge by. The factors are kept if they lower the loss on the last, by more than any other
rounding of the same weights might.

Q is what the recipe does. Algorithms that read second moments are slow, and make up themselves for
much of what smoothing is for: what helps rounding to nearest may harm them. So rounding with scales
of least squared error names the most promising few of the grid, and the recipe's own algorithm
chooses from them, and judges.

Shapes: R rows, I channels (inputs of the readers), O outputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fourfold.algorithms.base import ALGORITHMS, Weight, algorithm_of
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.statistics import statistics_of_rows
from fourfold.storage.safetensors_header import nbytes_of

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The values of a and b that are tried."""

NONE = 0.0, 0.0
"""The powers that leave everything as it is."""

PROMISING = 4
"""Points of the grid that a slow algorithm is tried with."""

LEAST_GAIN = 0.03
"""The part of the loss that must go. A choice between factors that are as good as each other
changes a second-order algorithm's loss by 1 % in either direction, and KL by 2 %."""

MOST = 8
"""The largest exponent k, and the smallest times -1: FP8 block scales of up's rows must hold it."""


@dataclass(frozen=True)
class Reader:
    """A linear weight that is quantized and reads the activation."""

    name: str
    weight_OI: Tensor
    scheme: Scheme
    group: str
    """The name of its scale group."""


@dataclass(frozen=True)
class Sizes:
    """Root mean squares by channel, float64 `[I]`: all that factors are made of."""

    x_I: Tensor
    """Of the activation."""
    w_I: Tensor
    """Of the columns of all readers."""

    def logarithms(self, a: float, b: float) -> Tensor:
        """Return log₂ s, less its median."""
        logs = a * _log2(self.x_I) - b * _log2(self.w_I)
        return logs - logs.median()

    def exponents(self, a: float, b: float) -> Tensor:
        """Return k, int8, about as many above 0 as below."""
        return self.logarithms(a, b).round().clamp(-MOST, MOST).to(torch.int8)


@dataclass(frozen=True)
class Site:
    """An activation, and what reads it. Rows are float32 `[R, I]`."""

    fit_RI: Tensor
    """What statistics are of."""
    choose_RI: Tensor
    judge_RI: Tensor
    readers: Sequence[Reader]

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes of its channels."""
        weights = torch.cat([reader.weight_OI for reader in self.readers])
        return Sizes(rms(self.fit_RI), rms(weights))


@dataclass(frozen=True)
class Smoothing:
    """The best factors for some sites, and the loss on rows to judge by without and with them."""

    a: float
    b: float
    before: float
    after: float

    @property
    def is_kept(self) -> bool:
        """True if the loss falls by enough."""
        return self.after < (1 - LEAST_GAIN) * self.before


def smooth(sites: Sequence[Site]) -> Smoothing:
    """Choose a and b for sites that share them, such as the experts of a layer."""

    def loss(powers: tuple[float, float], *, judges: bool = False, is_quick: bool = False) -> float:
        return math.fsum(
            loss_of(
                site,
                site.judge_RI if judges else site.choose_RI,
                site.sizes.exponents(*powers),
                is_quick=is_quick,
            )
            for site in sites
        ) / len(sites)

    def quick(powers: tuple[float, float]) -> float:
        return loss(powers, is_quick=True)

    grid = sorted(((a, b) for a in POWERS for b in POWERS), key=quick)
    best = grid[0]
    if any(algorithm_of(reader.scheme).needs for site in sites for reader in site.readers):
        best = min(dict.fromkeys([*grid[:PROMISING], NONE]), key=loss)
    return Smoothing(*best, loss(NONE, judges=True), loss(best, judges=True))


def rms(rows: Tensor) -> Tensor:
    """Return the root mean square of each column."""
    return rows.double().square().mean(dim=0).sqrt()


def _log2(sizes: Tensor) -> Tensor:
    """Logarithms; a channel that is always 0 takes that of the smallest other."""
    positive = sizes[sizes > 0]
    return sizes.clamp(min=float(positive.min()) if len(positive) else 1.0).log2()


def loss_of(site: Site, rows_RI: Tensor, exponents_I: Tensor, *, is_quick: bool = False) -> float:
    """Return the loss of a site on some rows.

    Args:
        site: The activation and its readers.
        rows_RI: The rows.
        exponents_I: k. Real numbers, too, though they cannot be folded without rounding.
        is_quick: True rounds with scales of least squared error instead of the readers' algorithm,
            if that is slow.
    """
    factors_I = torch.exp2(exponents_I.float())
    scaled_RI, fit_RI = rows_RI / factors_I, site.fit_RI / factors_I
    groups: dict[str, list[Reader]] = defaultdict(list)
    for reader in site.readers:
        groups[reader.group].append(reader)
    losses: list[float] = []
    for readers in groups.values():
        rounded_RI = _rounded(scaled_RI, fit_RI, readers[0].scheme)
        weights = _quantized(readers, factors_I, fit_RI, is_quick=is_quick)
        for reader, w_OI in zip(readers, weights, strict=True):
            expected_RO = rows_RI @ reader.weight_OI.T
            energy = float(expected_RO.square().sum())
            if energy:
                error_RO = (rounded_RI @ w_OI.T).sub_(expected_RO)
                losses.append(float(error_RO.square().sum()) / energy)
    return math.fsum(losses) / max(1, len(losses))


def _rounded(x_RI: Tensor, fit_RI: Tensor, scheme: Scheme) -> Tensor:
    """Inputs as engines round them, with a scale of the rows to fit."""
    if scheme.activations is None:
        return x_RI
    fmt = FORMATS[scheme.activations]
    if not fmt.rounds_activations:
        return x_RI
    scale = fmt.input_scale(float(fit_RI.abs().max())) if fmt.input_parts() else None
    return fmt.round_activations(x_RI.contiguous(), scale)


def _quantized(
    readers: Sequence[Reader], factors_I: Tensor, fit_RI: Tensor, *, is_quick: bool
) -> list[Tensor]:
    """The scaled weights of a scale group, float32, as quantization leaves them."""
    scheme = readers[0].scheme
    fmt, algorithm = FORMATS[scheme.weights], algorithm_of(scheme)
    if is_quick and algorithm.needs:
        algorithm = next(x for x in (ALGORITHMS["mse"], ALGORITHMS["max"]) if x.supports(fmt))
    statistics = statistics_of_rows(algorithm.needs, _rounded(fit_RI, fit_RI, scheme))
    weights = []
    for reader in readers:
        matrix_OI = (reader.weight_OI * factors_I).contiguous()
        specs = fmt.row_parts((matrix_OI.shape[0], matrix_OI.shape[1]))
        parts = {
            part: torch.empty(shape[0], nbytes_of(dtype, shape[1:]), dtype=torch.uint8)
            for part, (dtype, shape) in specs.items()
        }
        weights.append(Weight(reader.name, matrix_OI, parts, statistics))
    scale, _ = algorithm.quantize(weights, fmt)
    results = [torch.empty_like(weight.matrix_OI) for weight in weights]
    for weight, result in zip(weights, results, strict=True):
        fmt.dequantize(weight.out, scale, result)
    return results
