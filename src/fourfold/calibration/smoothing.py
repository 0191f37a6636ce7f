# SPDX-License-Identifier: Apache-2.0
"""Factors per channel that make an activation and its readers easier to round together.

    s_i = rms(x_i)^a / ‖W_:i‖^b,   rounded to 2^k_i;   x' = x · 2⁻ᵏ,   W' = W · 2ᵏ,   x'·W'ᵀ = x·Wᵀ

a = ½, b = ½ is SmoothQuant's balance, b = 0 is AWQ's protection of the channels that are large in
x. Neither is always right, so both exponents are searched, on a grid that holds (0, 0), by what
counts: the error of the outputs of the quantized layers,

    loss(k) = mean over readers of ‖Q(x')·Q(W')ᵀ − x·Wᵀ‖² / ‖x·Wᵀ‖²,

on one part of the rows. The factors are kept if they lower it on the other part, too.

Q rounds weights with scales of least squared error, whatever algorithm the recipe names:
second-order algorithms would take hours here, and profit from the same factors.

Shapes: R rows, I channels (inputs of the readers), O outputs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.algorithms.base import ALGORITHMS, Weight
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.storage.safetensors_header import nbytes_of

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The values of a and b that are tried."""

MOST = 8
"""The largest exponent k, and the smallest times -1: FP8 block scales of up's rows must hold it."""


@dataclass(frozen=True)
class Reader:
    """A linear weight that is quantized and reads the activation."""

    weight_OI: Tensor
    scheme: Scheme
    group: str
    """The name of its scale group."""


@dataclass(frozen=True)
class Site:
    """An activation: rows to choose by, rows to judge by, and what reads it."""

    train_RI: Tensor
    held_out_RI: Tensor
    readers: Sequence[Reader]


@dataclass(frozen=True)
class Smoothing:
    """The best factors for some sites, and the loss on held-out rows without and with them."""

    a: float
    b: float
    before: float
    after: float

    @property
    def is_kept(self) -> bool:
        """True if the loss falls."""
        return self.after < self.before


def smooth(sites: Sequence[Site]) -> Smoothing:
    """Choose a and b for sites that share them, such as the experts of a layer."""
    losses = {
        (a, b): sum(_loss(site, site.train_RI, exponents(site, a, b)) for site in sites)
        for a in POWERS
        for b in POWERS
    }
    a, b = min(losses, key=lambda powers: losses[powers])
    before, after = (
        sum(_loss(site, site.held_out_RI, exponents(site, *powers)) for site in sites) / len(sites)
        for powers in ((0.0, 0.0), (a, b))
    )
    return Smoothing(a, b, before, after)


def exponents(site: Site, a: float, b: float) -> Tensor:
    """Return k of a site, int8 `[I]`, about as many above 0 as below."""
    weights = torch.cat([reader.weight_OI for reader in site.readers])
    logs = a * _log2(_rms(site.train_RI)) - b * _log2(_rms(weights))
    return (logs - logs.median()).round().clamp(-MOST, MOST).to(torch.int8)


def _rms(rows: Tensor) -> Tensor:
    return rows.double().square().mean(dim=0).sqrt()


def _log2(sizes: Tensor) -> Tensor:
    """Logarithms; a channel that is always 0 takes that of the smallest other."""
    positive = sizes[sizes > 0]
    return sizes.clamp(min=float(positive.min()) if len(positive) else 1.0).log2()


def _loss(site: Site, rows_RI: Tensor, exponents_I: Tensor) -> float:
    factors_I = torch.exp2(exponents_I.float())
    scaled_RI = rows_RI / factors_I
    amax = float((site.train_RI / factors_I).abs().max())
    groups: dict[str, list[Reader]] = defaultdict(list)
    for reader in site.readers:
        groups[reader.group].append(reader)
    losses: list[float] = []
    for readers in groups.values():
        rounded_RI = _rounded(scaled_RI, amax, readers[0].scheme)
        for reader, w_OI in zip(readers, _quantized(readers, factors_I), strict=True):
            expected_RO = rows_RI @ reader.weight_OI.T
            energy = float(expected_RO.square().sum())
            if energy:
                error_RO = (rounded_RI @ w_OI.T).sub_(expected_RO)
                losses.append(float(error_RO.square().sum()) / energy)
    return math.fsum(losses) / max(1, len(losses))


def _rounded(x_RI: Tensor, amax: float, scheme: Scheme) -> Tensor:
    if scheme.activations is None:
        return x_RI
    fmt = FORMATS[scheme.activations]
    if not fmt.rounds_activations:
        return x_RI
    scale = fmt.input_scale(amax) if fmt.input_parts() else None
    return fmt.round_activations(x_RI.contiguous(), scale)


def _quantized(readers: Sequence[Reader], factors_I: Tensor) -> list[Tensor]:
    """The scaled weights of a scale group, float32, as quantization leaves them."""
    fmt = FORMATS[readers[0].scheme.weights]
    algorithm = next(x for x in (ALGORITHMS["mse"], ALGORITHMS["max"]) if x.supports(fmt))
    weights = []
    for number, reader in enumerate(readers):
        matrix_OI = (reader.weight_OI * factors_I).contiguous()
        specs = fmt.row_parts((matrix_OI.shape[0], matrix_OI.shape[1]))
        parts = {
            part: torch.empty(shape[0], nbytes_of(dtype, shape[1:]), dtype=torch.uint8)
            for part, (dtype, shape) in specs.items()
        }
        weights.append(Weight(f"reader {number}", matrix_OI, parts))
    scale, _ = algorithm.quantize(weights, fmt)
    results = [torch.empty_like(weight.matrix_OI) for weight in weights]
    for weight, result in zip(weights, results, strict=True):
        fmt.dequantize(weight.out, scale, result)
    return results
