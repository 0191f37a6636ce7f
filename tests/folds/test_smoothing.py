# SPDX-License-Identifier: Apache-2.0
"""The search for factors: what it gains where channels are unlike each other, and that it never
keeps what does not help on other rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fourfold.calibration.smoothing import MOST, Reader, Site, smooth
from fourfold.formats.scheme import Scheme

W4A4 = Scheme("nvfp4", "mse", "nvfp4")
W4A16 = Scheme("nvfp4", "mse")


def site(scheme: Scheme = W4A4, *, outliers: bool, balance: float = 0.5, seed: int = 0) -> Site:
    """An activation of 256 channels, six of which are 20 to 100 times larger.

    `balance`: how far the weights that read these are smaller. Training leaves them so: otherwise
    the six would be all that a layer looks at.
    """
    random = torch.Generator().manual_seed(seed)
    x_RI = torch.randn(768, 256, generator=random)
    w_OI = torch.randn(128, 256, generator=random) / 16
    if outliers:
        sizes_I = torch.ones(256)
        sizes_I[torch.randperm(256, generator=random)[:6]] = torch.logspace(1.301, 2, 6)
        x_RI, w_OI = x_RI * sizes_I, w_OI / sizes_I**balance
    return Site(x_RI[:256], x_RI[256:512], x_RI[512:], [Reader("w", w_OI, scheme, "group")])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_outliers(balance: float, seed: int) -> None:
    smoothing = smooth([site(outliers=True, balance=balance, seed=seed)])
    assert smoothing.is_kept
    assert smoothing.after < 0.15 * smoothing.before


def test_outliers_with_weights_of_the_usual_size() -> None:
    """They make up nearly all of the output, whose error is small from the beginning."""
    smoothing = smooth([site(outliers=True, balance=0.0)])
    assert smoothing.before < 0.02
    assert smoothing.after < 0.4 * smoothing.before


def test_weights_alone_profit_too() -> None:
    smoothing = smooth([site(W4A16, outliers=True)])
    assert smoothing.after < 0.15 * smoothing.before


def test_nothing_is_kept_that_raises_the_loss() -> None:
    """Rows to judge by from another distribution than those to choose by."""
    chosen = site(outliers=True)
    other = replace(chosen, judge_RI=chosen.judge_RI.flip(1))
    smoothing = smooth([other])
    assert (smoothing.a, smoothing.b) != (0.0, 0.0)
    assert smoothing.after > smoothing.before
    assert not smoothing.is_kept


def test_second_order_algorithm_chooses_by_itself() -> None:
    """Where rounding to nearest profits, an algorithm that knows the inputs may not."""
    smoothing = smooth([site(Scheme("nvfp4", "gptq_joint", "nvfp4"), outliers=True)])
    assert smoothing.after < 0.15 * smoothing.before


def test_factors_of_zero_channels() -> None:
    """A channel that is always 0, and one that nothing reads."""
    plain = site(outliers=False)
    x_RI, w_OI = plain.fit_RI.clone(), plain.readers[0].weight_OI.clone()
    x_RI[:, 3], w_OI[:, 5] = 0, 0
    zeros = replace(plain, fit_RI=x_RI, readers=[replace(plain.readers[0], weight_OI=w_OI)])
    for a, b in ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        k_I = zeros.sizes.exponents(a, b)
        assert k_I.dtype == torch.int8
        assert int(k_I.abs().max()) <= MOST
        assert int(k_I.median()) == 0
    assert smooth([zeros]).before > 0


def test_exponents_are_those_of_the_formula() -> None:
    x_RI: Tensor = torch.tensor([[1.0, 2.0, 4.0, 16.0], [1.0, -2.0, -4.0, 16.0]])
    w_OI = torch.tensor([[2.0, 2.0, 2.0, 1 / 8]])
    own = Site(x_RI, x_RI, x_RI, [Reader("w", w_OI, W4A16, "group")])
    assert own.sizes.exponents(1.0, 0.0).tolist() == [-1, 0, 1, 3]
    assert own.sizes.exponents(0.0, 1.0).tolist() == [0, 0, 0, 4]
    assert own.sizes.exponents(0.5, 0.5).tolist() == [0, 0, 0, 4]
