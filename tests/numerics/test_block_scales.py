# SPDX-License-Identifier: Apache-2.0
"""Proves of scales that are chosen block by block: the kernel's pruned search chooses what the full
search in float64 does, wherever rounding cannot reach the choice; and the output is valid.

Shapes: O outputs, I inputs, B blocks of inputs, K inputs of a block.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold.algorithms import Weight
from fourfold.algorithms.block_scales import BlockScales
from fourfold.algorithms.four_over_six import FourOverSix
from fourfold.algorithms.local_hessian import LocalHessian
from fourfold.algorithms.mse_weighted import MSEWeighted
from fourfold.errors import ObservationError
from fourfold.formats import nvfp4
from fourfold.formats.nvfp4 import block_scales, block_scales_reference
from fourfold.formats.nvfp4.format import BLOCK_SCALE, CODES, NVFP4
from fourfold.formats.nvfp4.second_order import Moment, Rounded

from .blocks import FAMILIES
from .second_moments import MOMENTS, WEIGHTS, gaussian, ordinary

ALGORITHMS = [MSEWeighted(), LocalHessian(), FourOverSix(), MSEWeighted(448), LocalHessian(448)]

WIDTH = 128


def blocks_of(moment_II: Tensor) -> Tensor:
    starts = range(0, len(moment_II), 16)
    return torch.stack([moment_II[i : i + 16, i : i + 16] for i in starts])


def weight_of(family: str, group_scale: float, rows: int, seed: int) -> Tensor:
    rng = np.random.default_rng([seed, rows])
    with np.errstate(over="ignore"):
        blocks = FAMILIES[family](rng, rows * WIDTH // 16, group_scale)
    return torch.from_numpy(blocks).view(rows, WIDTH)


def check(w_OI: Tensor, chosen: Tensor, given_to: tuple[Tensor, Tensor, float]) -> float:
    """Decided blocks have the scale of the full search; returns the part that is decided."""
    wanted, is_decided = block_scales_reference.choose(w_OI, *given_to)
    assert not (is_decided & (chosen != wanted)).any()
    return float(is_decided.double().mean())


@pytest.mark.parametrize("moment", ["ordinary", "few_rows", "dead_channels", "outliers", "huge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_chooses_as_the_full_search(family: str, moment: str) -> None:
    """Also where the best scale lies at the edge of what the search looks at."""
    group_scale = float(np.float32(1 / 3))
    w_OI = weight_of(family, group_scale, 40, 1)
    moment_II = MOMENTS[moment](np.random.default_rng(2), WIDTH)
    h_BKK = block_scales.damped(blocks_of(moment_II), 0.01)
    least_BK = torch.linalg.eigvalsh(h_BKK)[:, :1].expand(-1, 16)
    factors_BKK = torch.linalg.cholesky(h_BKK).float()
    chosen = block_scales.by_form(w_OI, h_BKK, group_scale)
    by_form = check(w_OI, chosen, (factors_BKK, least_BK, group_scale))
    d_I = moment_II.diagonal().double() / moment_II.diagonal().double().mean()
    d_BK = d_I.float().view(-1, 16)
    chosen = block_scales.by_energy(w_OI, moment_II.diagonal(), group_scale)
    by_energy = check(w_OI, chosen, (d_BK.sqrt().diag_embed(), d_BK, group_scale))
    if family in {"gaussian", "student_t"}:  # the others are made of ties
        assert min(by_form, by_energy) > 0.8


@pytest.mark.parametrize("family", ["gaussian", "student_t", "at_an_edge"])
def test_equal_energies_choose_as_mse(family: str) -> None:
    """Losses of float32 are off by less than 2⁻¹⁹, so that much more may be lost."""
    group_scale = float(np.float32(1 / 3))
    w_OI = weight_of(family, group_scale, 500, 3)
    for energy_I in (torch.zeros(WIDTH), torch.full((WIDTH,), 7.0)):
        scales_OB = block_scales.by_energy(w_OI, energy_I, group_scale)
        codes = torch.empty(500, WIDTH // 2, dtype=torch.uint8)
        block_scale = torch.empty_like(scales_OB)
        block_scales.round_into(w_OI, scales_OB, group_scale, codes, block_scale)
        error = nvfp4.error_energy(w_OI, codes, block_scale, group_scale)[0]
        least = nvfp4.quantize_into(
            w_OI, codes, block_scale, scale="mse", global_scale=group_scale
        ).sum_sq_err
        assert error <= least * (1 + 2.0**-19)


def statistics_of(moment_II: Tensor) -> dict[str, Tensor]:
    return {
        "second_moment_diagonal": moment_II.diagonal(),
        "second_moment_blocks": blocks_of(moment_II),
    }


def quantized(
    algorithm: BlockScales, w_OI: Tensor, moment_II: Tensor
) -> tuple[Weight, float, float]:
    rows, width = w_OI.shape
    out = {
        CODES: torch.full((rows, width // 2), 255, dtype=torch.uint8),
        BLOCK_SCALE: torch.full((rows, width // 16), 255, dtype=torch.uint8),
    }
    weight = Weight("w", w_OI, out, statistics_of(moment_II))
    group_scale, figures = algorithm.quantize([weight], NVFP4())
    assert group_scale is not None
    return weight, group_scale, figures[0].relative_error


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(ALGORITHMS),
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from(sorted(MOMENTS)),
    st.sampled_from([16, 112, 144]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-38, 1e-30, 1.0, 1e30]),
)
def test_whatever_the_numbers_are(
    algorithm: BlockScales, weights: str, moments: str, width: int, seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    w_OI = WEIGHTS[weights](rng, 5, width) * size
    weight, group_scale, error = quantized(algorithm, w_OI, MOMENTS[moments](rng, width))
    scales = weight.out[BLOCK_SCALE]
    assert 1 <= scales.min() <= scales.max() <= 126
    values_OI = torch.empty(w_OI.shape)
    NVFP4().dequantize(weight.out, group_scale, values_OI)
    assert torch.isfinite(values_OI).all()
    assert np.isfinite(error)
    if not w_OI.any():
        assert not values_OI.any()


@pytest.mark.parametrize("algorithm", ALGORITHMS[:3], ids=lambda x: x.name)
def test_codes_are_the_nearest(algorithm: BlockScales) -> None:
    rng = np.random.default_rng(5)
    w_OI = gaussian(rng, 30, WIDTH)
    weight, group_scale, _ = quantized(algorithm, w_OI, ordinary(rng, WIDTH))
    step_OB = weight.out[BLOCK_SCALE].view(torch.float8_e4m3fn).float() * group_scale
    wanted = nvfp4.reference.e2m1.encode(w_OI / step_OB.repeat_interleave(16, dim=1))
    assert torch.equal(nvfp4.reference.e2m1.unpack(weight.out[CODES]), wanted)


def test_four_over_six_has_the_better_of_two() -> None:
    w_OI = gaussian(np.random.default_rng(6), 200, WIDTH)
    weight, group_scale, _ = quantized(FourOverSix(), w_OI, torch.zeros(WIDTH, WIDTH))
    assert group_scale == float(np.float32(float(w_OI.abs().max()) * 1.75) / np.float32(2688))
    errors = []
    for largest in (6.0, 4.0):
        bytes_OB = _bytes(w_OI.view(200, -1, 16).abs().amax(dim=2) / (largest * group_scale))
        values = _values(w_OI, bytes_OB, group_scale)
        errors.append((w_OI.double() - values).square().view(200, -1, 16).sum(dim=2))
    chosen = _values(w_OI, weight.out[BLOCK_SCALE], group_scale)
    error_OB = (w_OI.double() - chosen).square().view(200, -1, 16).sum(dim=2)
    assert (error_OB <= torch.minimum(*errors) * (1 + 2.0**-18)).all()
    is_four_OB = error_OB < errors[0]
    assert 0.2 < is_four_OB.double().mean() < 0.8


def _bytes(x: Tensor) -> Tensor:
    return nvfp4.reference.e4m3.encode_clamped(x).view(torch.uint8)


def _values(w_OI: Tensor, bytes_OB: Tensor, group_scale: float) -> Tensor:
    step_OI = (bytes_OB.view(torch.float8_e4m3fn).float() * group_scale).repeat_interleave(16, 1)
    codes = nvfp4.reference.e2m1.encode(w_OI / step_OI)
    return nvfp4.reference.e2m1.decode(codes).double() * step_OI


@pytest.mark.parametrize("seed", range(3))
def test_what_each_is_worth(seed: int) -> None:
    """The output's error falls from max to 4/6, mse, weighted mse and the local Hessian."""
    rng = np.random.default_rng([seed, 9])
    w_OI, moment_II = gaussian(rng, 300, WIDTH), ordinary(rng, WIDTH)
    losses = []
    for algorithm in (FourOverSix(), MSEWeighted(), LocalHessian()):
        weight, group_scale, _ = quantized(algorithm, w_OI, moment_II)
        values = torch.empty(w_OI.shape)
        NVFP4().dequantize(weight.out, group_scale, values)
        losses.append(float((((values - w_OI) @ moment_II) * (values - w_OI)).sum()))
    for name in ("mse", "max"):
        values = nvfp4.quantize(w_OI, scale=name).dequantize()
        losses.insert(0, float((((values - w_OI) @ moment_II) * (values - w_OI)).sum()))
    most, mse, four, weighted, local = losses
    assert local < weighted < mse < four < most


def test_static_scales_are_those_of_the_local_hessian() -> None:
    """Also where GPTQ rounds the blocks in another order than theirs."""
    rng = np.random.default_rng(11)
    w_OI, moment_II = gaussian(rng, 50, WIDTH), ordinary(rng, WIDTH)
    moment = Moment(moment_II, 0.01)
    group_scale = nvfp4.global_scale(float(w_OI.abs().max()))
    rounded = Rounded(w_OI, moment)
    assert not torch.equal(moment.order_I, torch.arange(WIDTH))
    wanted = block_scales.by_form(
        w_OI, block_scales.damped(blocks_of(moment_II), 0.01), group_scale
    )
    scales_OB = rounded.static_scales(group_scale)
    assert (scales_OB == wanted).double().mean() > 0.99  # H_bb is rounded to float32 in one
    rounded.round(group_scale, scales_OB)
    codes, block_scale = torch.empty(50, WIDTH // 2, dtype=torch.uint8), torch.empty_like(wanted)
    rounded.pack(codes, block_scale)
    assert torch.equal(block_scale, scales_OB)


@pytest.mark.parametrize("algorithm", ALGORITHMS[:2], ids=lambda x: x.name)
def test_inputs_that_overflow_are_refused(algorithm: BlockScales) -> None:
    with pytest.raises(ObservationError, match=r"^w: .*keep pattern\.$"):
        quantized(algorithm, torch.ones(2, 16), torch.full((16, 16), torch.inf))
