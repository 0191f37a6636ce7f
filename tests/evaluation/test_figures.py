# SPDX-License-Identifier: Apache-2.0
"""Proves that the figures are what they say: KL and agreement against plain formulas over whole
distributions, the bound where only the likeliest tokens are kept, and the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold.errors import ModelError
from fourfold.evaluation.figures import (
    RESAMPLES,
    Measured,
    divergence,
    mean_interval,
    perplexity,
    ratio_interval,
)
from fourfold.evaluation.reference import ELEMENTS, Prediction, predict

W, V = 40, 57


def logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(W, V, generator=torch.Generator().manual_seed(seed))


def near(theirs: Tensor, noise: float, seed: int = 9) -> Tensor:
    return theirs + noise * torch.randn(W, V, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.randint(0, V, (W,), generator=torch.Generator().manual_seed(5))


def predicted(logits_WV: Tensor, ids_WK: Tensor | None = None, top: int = V) -> Prediction:
    return predict("source", 0, logits_WV, TOKENS, ids_WK, top)


def plain_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    logp, logq = (torch.log_softmax(x.double(), -1) for x in (logits_p, logits_q))
    return (logp.exp() * (logp - logq)).sum(-1)


def measured(logits_p: Tensor, logits_q: Tensor, top: int = V) -> Measured:
    result = Measured()
    result.add("OUT", 0, predicted(logits_p, top=top), logits_q, TOKENS)
    return result


@pytest.mark.parametrize("noise", [1e-3, 0.1, 3.0])
def test_kl_is_that_of_the_whole_distributions(noise: float) -> None:
    p = logits(1)
    q = near(p, noise)
    found, wanted = torch.from_numpy(measured(p, q).kl[0]), plain_kl(p, q)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-8)


def test_no_difference_is_none() -> None:
    assert measured(logits(1), logits(1)).kl[0].tolist() == [0.0] * W


@settings(deadline=None, max_examples=30)
@given(st.integers(5, V - 1), st.integers(0, 100), st.floats(0.01, 3))
def test_the_likeliest_tokens_give_a_lower_bound(top: int, seed: int, noise: float) -> None:
    """It misses the divergence among the others, times their probability, and nothing else."""
    p = logits(seed)
    q = near(p, noise)
    kept = predicted(p, top=top)
    bound = divergence(kept, predicted(q, kept.ids_WK))
    is_kept = torch.zeros(W, V, dtype=torch.bool).scatter(1, kept.ids_WK.long(), True)
    hidden = torch.tensor(-math.inf)
    among = plain_kl_of_others(p.where(~is_kept, hidden), q.where(~is_kept, hidden))
    missing = kept.rest_W.double() * among
    torch.testing.assert_close(bound + missing, plain_kl(p, q), rtol=1e-4, atol=1e-6)
    assert bool((bound >= 0).all())


def plain_kl_of_others(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    logp, logq = (torch.log_softmax(x.double(), -1) for x in (logits_p, logits_q))
    return torch.where(logp.isfinite(), logp.exp() * (logp - logq), 0.0).sum(-1)


def test_agreement_is_that_of_sorted_lists() -> None:
    p, q = logits(2), near(logits(2), 1.0)
    mine, theirs = (x.argsort(-1, descending=True)[:, :5].tolist() for x in (q, p))
    result = measured(p, q)
    assert result.top1 == [sum(a[0] == b[0] for a, b in zip(mine, theirs, strict=True)) / W]
    shared = [len({*a} & {*b}) / 5 for a, b in zip(mine, theirs, strict=True)]
    assert result.top5[0] == pytest.approx(sum(shared) / W)
    assert 0 < result.top1[0] < 1
    assert 0 < result.top5[0] < 1


def test_perplexity_is_that_of_cross_entropy() -> None:
    q = logits(3)
    nll = torch.nn.functional.cross_entropy(q[:-1], TOKENS[1:])
    assert perplexity(measured(logits(1), q).nll) == pytest.approx(float(nll.exp()), rel=1e-6)
    assert perplexity([1.0, 2.0]) == pytest.approx(math.exp(1.5))


def test_a_large_vocabulary_is_taken_in_pieces() -> None:
    """Of 9 million tokens, a row at a time."""
    wide = torch.randn(3, ELEMENTS // 2 + 1, generator=torch.Generator().manual_seed(0))
    together = predict("source", 0, wide, torch.tensor([4, 5, 6]), None, 5)
    for number, row in enumerate(wide):
        twice, tokens = row[None].repeat(2, 1), torch.tensor([4, 5 + number])
        alone = predict("source", 0, twice, tokens, None, 5)
        assert together.ids_WK[number].tolist() == row.topk(5).indices.tolist()
        assert torch.equal(together.log_probs_WK[number], alone.log_probs_WK[0])
        assert torch.equal(together.rest_W[number], alone.rest_W[0])
        assert float(together.nll_W[number]) == (float(alone.nll_W[0]) if number < 2 else 0.0)


@pytest.mark.parametrize("top", [V, 5])
@pytest.mark.parametrize("token", [0, 7, V - 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float, token: int, top: int) -> None:
    q = logits(1)
    q[3, token] = value
    with pytest.raises(ModelError, match="OUT: predicts NaN or Inf in window 0"):
        measured(logits(1), q, top)
    with pytest.raises(ModelError, match="source: predicts NaN or Inf in window 0"):
        predicted(q, top=top)


def test_tokens_that_no_model_predicts_do_not_matter() -> None:
    p, q = logits(1), near(logits(1), 0.1)
    hidden = torch.arange(V) % 7 == 0
    p[:, hidden] = q[:, hidden] = -math.inf
    assert measured(p, q).kl[0].mean() == pytest.approx(
        float(plain_kl(p[:, ~hidden], q[:, ~hidden]).mean()), rel=1e-4
    )
    with pytest.raises(ModelError, match="rules out a token in window 0"):
        measured(logits(1), q)


# --- intervals ----------------------------------------------------------------------------


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(2.0, 0.01, 50)
    found = mean_interval(values)
    assert found is not None
    draws = np.random.default_rng(77).choice(values, (20 * RESAMPLES, 50))
    low, high = np.percentile(draws.mean(1), (2.5, 97.5))
    assert found == pytest.approx((low, high), rel=0.03)
    assert found == mean_interval(values)
    assert found[0] < values.mean() < found[1]


def test_a_ratio_is_of_the_same_windows() -> None:
    """Windows differ tenfold, and models by a tenth: only pairs can tell."""
    first = np.random.default_rng(2).gamma(0.5, 0.01, 64)
    second = first * np.random.default_rng(3).normal(1.1, 0.02, 64)
    ratio, ends = ratio_interval(second, first)
    assert ratio == pytest.approx(second.mean() / first.mean())
    assert ends is not None
    assert 1.08 < ends[0] < ratio < ends[1] < 1.12
    alone, other = mean_interval(first), mean_interval(second)
    assert alone is not None
    assert other is not None
    assert other[0] < alone[1]


def test_intervals_that_are_not_defined() -> None:
    one, zero = np.array([0.1]), np.zeros(4)
    assert mean_interval(one) is None
    assert ratio_interval(one, one) == (1.0, None)
    assert ratio_interval(zero, zero) == (None, None)
    mostly_zero = np.array([0.0, 0.0, 0.0, 1.0])
    assert ratio_interval(zero, mostly_zero) == (0.0, None)
