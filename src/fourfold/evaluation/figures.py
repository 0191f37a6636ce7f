# SPDX-License-Identifier: Apache-2.0
"""Figures of a quantized model beside its source: KL, agreement, perplexity, and their intervals.

At each position, with P the source's distribution over K tokens and the rest, and Q the model's:

    KL      Σ P·ln(P/Q), in nats, computed as Σ (Q − P + P·ln(P/Q)): the terms are ≥ 0 and differ
            by Σ Q − Σ P = 0, but for the rounding of both sums, which then cancels
    top-1   1 if both rank the same token first
    top-5   the part of the source's five likeliest tokens that are among the model's five

**Intervals** are paired bootstraps over windows: neighboring positions are not independent, windows
of a text nearly are. `RESAMPLES` times as many windows as there are, drawn with replacement, the
same ones for every model, give a distribution of the mean KL and of its ratio to another model's;
the interval holds the middle 95 % of it.

Shapes: N windows, W positions, T = N·W, K tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fourfold.errors import ModelError
from fourfold.evaluation.reference import Prediction, predict

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 2000
SEED = 0
TOP = 5


def divergence(reference: Prediction, model: Prediction) -> Tensor:
    """Return KL(P ‖ Q) at each position: [W], float64."""
    logp_WK, logq_WK = reference.log_probs_WK.double(), model.log_probs_WK.double()
    kl_W = _terms(logp_WK, logq_WK).sum(-1)
    return kl_W + _terms(reference.rest_W.double().log(), model.rest_W.double().log())


def _terms(logp: Tensor, logq: Tensor) -> Tensor:
    """Q − P + P·ln(P/Q); where P is 0, Q."""
    p, q = logp.exp(), logq.exp()
    return q - p + torch.where(p > 0, p * (logp - logq), 0.0)


@dataclass
class Measured:
    """What was measured of one model, position by position."""

    kl: list[Floats] = field(default_factory=list)
    """By window, [W]."""
    top1: list[float] = field(default_factory=list)
    """By window, the share of positions that agree."""
    top5: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    """By window, the mean of −ln Q of the token that follows."""

    def add(self, name: str, window: int, reference: Prediction, logits_WV: Tensor,
            tokens_W: Tensor) -> None:  # fmt: skip
        """Measure a model's logits for a window.

        Raises:
            ModelError: They are not finite, or rule out a token that the source expects.
        """
        model = predict(name, window, logits_WV, tokens_W, reference.ids_WK)
        kl_W = divergence(reference, model)
        if not bool(torch.isfinite(kl_W).all()):
            raise ModelError(
                f"{name}: rules out a token in window {window} that the source may predict, so "
                "that their divergence is infinite. Is it a checkpoint of the same model?"
            )
        best = min(TOP, reference.ids_WK.shape[-1])
        mine_WB = logits_WV.float().topk(best).indices.cpu()
        theirs_WB = reference.ids_WK[:, :best].long()
        self.kl.append(kl_W.numpy())
        self.top1.append(float((mine_WB[:, 0] == theirs_WB[:, 0]).double().mean()))
        shared_WB = (theirs_WB[:, :, None] == mine_WB[:, None, :]).any(-1)
        self.top5.append(float(shared_WB.double().mean()))
        self.nll.append(float(model.nll_W[:-1].double().mean()))

    @property
    def kl_of_windows(self) -> Floats:
        """The mean of each window: [N]."""
        return np.array([kl.mean() for kl in self.kl])

    @property
    def kl_mean(self) -> float:
        """The mean over all positions."""
        return float(np.concatenate(self.kl).mean())

    def percentiles(self, *ranks: float) -> list[float]:
        """Percentiles of KL over all positions."""
        return [float(x) for x in np.percentile(np.concatenate(self.kl), ranks)]


def resampled(values_N: Floats) -> Floats:
    """Return the means of `RESAMPLES` bootstrap samples; the same samples for equal N."""
    count = len(values_N)
    draws = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))
    means: Floats = values_N[draws].mean(1)
    return means


def interval(values: Floats) -> Interval:
    """Return the ends of the middle 95 %."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def mean_interval(kl_N: Floats) -> Interval | None:
    """Return the 95 % interval of the mean over windows; None for a single window."""
    return interval(resampled(kl_N)) if len(kl_N) > 1 else None


def ratio_interval(kl_N: Floats, first_N: Floats) -> tuple[float | None, Interval | None]:
    """Return the ratio of two means, and its interval; None for what is not defined."""
    if not first_N.mean() > 0:
        return None, None
    ratio, others = float(kl_N.mean() / first_N.mean()), resampled(first_N)
    is_defined = len(kl_N) > 1 and bool((others > 0).all())
    return ratio, interval(resampled(kl_N) / others) if is_defined else None


def mean(values: Sequence[float]) -> float:
    """Return the mean; the same for the same values."""
    return math.fsum(values) / len(values)


def perplexity(nll: Sequence[float]) -> float:
    """Return e to the mean of −ln Q."""
    return math.exp(mean(nll))
