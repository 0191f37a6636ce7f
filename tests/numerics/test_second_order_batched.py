# SPDX-License-Identifier: Apache-2.0
"""Proves that many moments at once give, each, what the reference and the CPU kernels give.

Shapes: N moments, O outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fourfold.formats import nvfp4
from fourfold.formats.nvfp4 import second_order_reference
from fourfold.formats.nvfp4.format import BLOCK_SCALE, CODES, NVFP4
from fourfold.formats.nvfp4.second_order import Moment, Rounded
from fourfold.formats.nvfp4.second_order_batched import MomentBatch, RoundedBatch, inverse_factors
from fourfold.formats.nvfp4.second_order_reference import Choice

from .second_moments import MOMENTS, WEIGHTS, gaussian, ordinary

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTHS = (16, 48, 144)
ROWS = 60


def case(width: int, device: str, count: int = 4) -> tuple[Tensor, Tensor, RoundedBatch]:
    """Weights `[N, O, I]`, their moments `[N, I, I]`, and a batch of them."""
    rng = np.random.default_rng(width)
    w_NOI = torch.stack([gaussian(rng, ROWS, width) * 2.0**-number for number in range(count)])
    moment_NII = torch.stack([ordinary(rng, width) * 10.0**number for number in range(count)])
    scales = [nvfp4.global_scale(float(w_OI.abs().max()) * 1.75) for w_OI in w_NOI]
    moments = MomentBatch(moment_NII.to(device), 0.01)
    return (
        w_NOI,
        moment_NII,
        RoundedBatch(w_NOI.to(device), moments, torch.tensor(scales).to(device)),
    )


def assert_decided_rows_equal(batch: RoundedBatch, number: int, wanted: Choice) -> float:
    """Returns the part of the rows that is decided."""
    is_equal_O = (batch.codes_NOI[number].cpu() == wanted.codes_OI).all(dim=1)
    is_equal_O &= (batch.scales_NOB[number].cpu() == wanted.scales_OB).all(dim=1)
    assert not (wanted.is_decided_O & ~is_equal_O).any()
    return float(wanted.is_decided_O.double().mean())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
def test_each_decides_as_the_reference(width: int, device: str) -> None:
    _, _, batch = case(width, device)
    moments = batch.moments
    batch.round()
    start = [x.cpu().clone() for x in (batch.codes_NOI, batch.scales_NOB, batch.values_NOI)]
    for number in range(4):
        target_OI, factor_II = batch.target_NOI[number].cpu(), moments.factor_MII[number].cpu()
        scale = float(batch.group_scale_N[number])
        wanted = second_order_reference.round_weight(target_OI, factor_II, scale)
        assert assert_decided_rows_equal(batch, number, wanted) > 0.5
    changed = batch.improve()
    assert width == 16 or int(changed.sum()) > 30
    for number in range(4):
        choice = Choice(*(x[number] for x in start), torch.ones(ROWS, dtype=torch.bool))
        parts = moments.h_MII, moments.block_inverses_MBKK, moments.block_factors_MBKK
        wanted = second_order_reference.sweep(
            choice, batch.target_NOI[number].cpu(), *(x[number].cpu() for x in parts),
            float(batch.group_scale_N[number]),
        )  # fmt: skip
        assert assert_decided_rows_equal(batch, number, wanted) > 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
def test_each_is_that_of_the_kernels(width: int, device: str) -> None:
    """Moments and orders are equal; codes are but for rows that rounding decides."""
    w_NOI, moment_NII, batch = case(width, device)
    batch.round()
    for number, (w_OI, moment_II) in enumerate(zip(w_NOI, moment_NII, strict=True)):
        moment = Moment(moment_II, 0.01)
        assert torch.equal(batch.moments.order_MI[number].cpu(), moment.order_I)
        assert torch.equal(batch.moments.h_MII[number].cpu(), moment.h_II)
        rounded = Rounded(w_OI, moment)
        rounded.round(float(batch.group_scale_N[number]))
        is_equal_O = (batch.codes_NOI[number].cpu() == rounded.codes_OI).all(dim=1)
        assert is_equal_O.double().mean() > 0.9
        assert float(rounded.loss()) == pytest.approx(loss(batch)[number], rel=0.01)


def loss(batch: RoundedBatch) -> list[float]:
    d_NOI = (batch.values_NOI - batch.target_NOI.double()).double()
    loss_N = ((d_NOI @ batch.moments.h_MII.double()) * d_NOI).sum(dim=(1, 2))
    return [float(x) for x in loss_N]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_codes_are_the_values(width: int, device: str) -> None:
    _, _, batch = case(width, device)
    batch.round()
    before = loss(batch)
    batch.descend(2)
    assert all(after <= first for after, first in zip(loss(batch), before, strict=True))
    codes, scales = batch.pack()
    for number in range(4):
        out = {CODES: codes[number].cpu(), BLOCK_SCALE: scales[number].cpu()}
        values_OI = torch.empty(ROWS, width)
        NVFP4().dequantize(out, float(batch.group_scale_N[number]), values_OI)
        ordered_OI = values_OI[:, batch.moments.order_MI[number].cpu()]
        assert torch.equal(ordered_OI, batch.values_NOI[number].cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_whatever_the_numbers_are(weights: str, device: str) -> None:
    """All kinds of moments in one batch."""
    rng = np.random.default_rng(8)
    w_NOI = torch.stack([WEIGHTS[weights](rng, 6, 112) for _ in MOMENTS])
    moment_NII = torch.stack([make(rng, 112) for make in MOMENTS.values()])
    scale = nvfp4.global_scale(float(w_NOI.abs().max()))
    scales_N = torch.full((len(MOMENTS),), scale, device=device)
    batch = RoundedBatch(w_NOI.to(device), MomentBatch(moment_NII.to(device), 0.01), scales_N)
    batch.round()
    batch.descend(2)
    _, scales = batch.pack()
    assert 1 <= scales.min() <= scales.max() <= 126
    assert torch.isfinite(batch.values_NOI).all()
    assert torch.isfinite(batch.group_scale_N).all()
    assert bool(w_NOI.any()) or not batch.values_NOI.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", WIDTHS)
def test_static_scales_are_those_of_the_kernels(width: int, device: str) -> None:
    """Also after rounding with compensation under them."""
    w_NOI, moment_NII, batch = case(width, device)
    scales_NOB = batch.static_scales()
    batch.round(scales_NOB)
    assert torch.equal(batch.scales_NOB, scales_NOB)
    for number, (w_OI, moment_II) in enumerate(zip(w_NOI, moment_NII, strict=True)):
        rounded = Rounded(w_OI, Moment(moment_II, 0.01))
        group_scale = float(batch.group_scale_N[number])
        rounded.round(group_scale, rounded.static_scales(group_scale))
        assert (scales_NOB[number].cpu() == rounded.scales_OB).double().mean() > 0.99
        is_equal_O = (batch.codes_NOI[number].cpu() == rounded.codes_OI).all(dim=1)
        assert is_equal_O.double().mean() > 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_one_moment_for_all_is_that_of_each(device: str) -> None:
    rng = np.random.default_rng(3)
    w_NOI = torch.stack([gaussian(rng, 20, 48) * 2.0**number for number in range(3)]).to(device)
    moment_MII = ordinary(rng, 48)[None].to(device)
    scales_N = w_NOI.abs().amax(dim=(1, 2)) / 1536
    shared = RoundedBatch(w_NOI, MomentBatch(moment_MII, 0.01), scales_N)
    each = RoundedBatch(w_NOI, MomentBatch(moment_MII.expand(3, -1, -1), 0.01), scales_N)
    for batch in (shared, each):
        batch.round(batch.static_scales())
        batch.round()
        batch.descend(2)
    is_equal_NO = (shared.codes_NOI == each.codes_NOI).all(dim=2)
    assert is_equal_NO.double().mean() > 0.9
    assert loss(shared) == pytest.approx(loss(each), rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("damping", [0.001, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_descent_never_raises_the_loss(seed: int, damping: float, device: str) -> None:
    """By float64, sweep by sweep, also where float32 takes rounding for a gain: with inputs that
    are all the same number, or all energy in one of them."""
    rng = np.random.default_rng(seed)
    for make_weight in WEIGHTS.values():
        w_NOI = torch.stack([make_weight(rng, 4, 144) for _ in MOMENTS]).to(device)
        moment_NII = torch.stack([make(rng, 144) for make in MOMENTS.values()]).to(device)
        scale = nvfp4.global_scale(float(w_NOI.abs().max()))
        scales_N = torch.full((len(MOMENTS),), scale, device=device)
        unit = 2.0 ** np.frexp(scale)[1]
        batch = RoundedBatch(w_NOI / unit, MomentBatch(moment_NII, damping), scales_N / unit)
        batch.round()
        losses = loss(batch)
        for _ in range(4):
            batch.descend(1)
            before, losses = losses, loss(batch)
            assert all(now <= then for now, then in zip(losses, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_moments_that_are_not_positive_definite(device: str) -> None:
    """They are told from those that are; what float32 cannot factor is factored in float64."""
    eye_II = torch.eye(300)
    easy_II = ordinary(np.random.default_rng(0), 300) + eye_II
    hard_II = torch.full((300, 300), 1 - 2.0**-22).fill_diagonal_(1)  # the least eigenvalue is 2⁻²²
    assert int(torch.linalg.cholesky_ex(hard_II).info) > 0
    h_NII = torch.stack([easy_II, hard_II, -eye_II]).to(device)
    factor_NII, is_positive_N = inverse_factors(h_NII)
    assert is_positive_N.tolist() == [True, True, False]
    assert torch.isfinite(factor_NII).all()
    alone_II, _ = inverse_factors(h_NII[:1])
    assert torch.allclose(alone_II[0], factor_NII[0], rtol=1e-5, atol=1e-6)
