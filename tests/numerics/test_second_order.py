# SPDX-License-Identifier: Apache-2.0
"""Proves of rounding with compensation: the kernels decide as the reference in float64 wherever
rounding cannot reach a decision; whatever weights and moments are, scales and codes are valid;
and descent never raises the loss.

Shapes: O outputs, I inputs, B blocks of inputs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold.algorithms import Weight
from fourfold.algorithms.gptq_joint import GPTQJoint
from fourfold.errors import ObservationError
from fourfold.formats import nvfp4
from fourfold.formats.nvfp4 import reference, second_order_reference
from fourfold.formats.nvfp4.format import BLOCK_SCALE, CODES, NVFP4
from fourfold.formats.nvfp4.inverse_factor import inverse_factor
from fourfold.formats.nvfp4.second_order import Moment, Rounded, descend
from fourfold.formats.nvfp4.second_order_reference import Choice

from .second_moments import MOMENTS, WEIGHTS, gaussian, ordinary

WIDTHS = (16, 48, 128, 144)


def case(width: int, seed: int, rows: int = 100) -> tuple[Rounded, float, Tensor]:
    """An ordinary weight, its group scale, and the scales that `mse` chooses."""
    rng = np.random.default_rng([width, seed])
    w_OI, moment = gaussian(rng, rows, width), Moment(ordinary(rng, width), 0.01)
    group_scale = nvfp4.global_scale(float(w_OI.abs().max()))
    scales_OB = reference.quantize(w_OI, group_scale, mse=True)[1]
    return Rounded(w_OI, moment), group_scale, scales_OB


def compare(rounded: Rounded, wanted: Choice, least: float) -> None:
    """Decided rows are equal, and there are not fewer of them than the part `least`."""
    is_equal_O = (rounded.codes_OI == wanted.codes_OI).all(dim=1)
    is_equal_O &= (rounded.scales_OB == wanted.scales_OB).all(dim=1)
    assert not (wanted.is_decided_O & ~is_equal_O).any()
    assert wanted.is_decided_O.double().mean() > least


@pytest.mark.parametrize("width", WIDTHS)
def test_the_kernel_decides_as_the_reference(width: int) -> None:
    for seed in range(3):
        rounded, group_scale, scales_OB = case(width, seed)
        given_to = rounded.target_OI, rounded.moment.factor_II, group_scale
        rounded.round(group_scale)
        compare(rounded, second_order_reference.round_weight(*given_to), 0.5)
        rounded.round(group_scale, scales_OB)
        ordered_OB = scales_OB[:, rounded.moment.order_I[::16] // 16]
        compare(rounded, second_order_reference.round_weight(*given_to, ordered_OB), 0.5)
        assert torch.equal(rounded.scales_OB, ordered_OB)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_sweep_decides_as_the_reference(width: int) -> None:
    """From the codes of plain rounding, which leave much to improve."""
    for seed in range(3):
        rounded, group_scale, scales_OB = case(width, seed)
        plain(rounded, group_scale, scales_OB)
        moment = rounded.moment
        start = Choice(
            rounded.codes_OI.clone(), rounded.scales_OB.clone(), rounded.values_OI.clone(),
            torch.ones(100, dtype=torch.bool),
        )  # fmt: skip
        wanted = second_order_reference.sweep(
            start, rounded.target_OI, moment.h_II, moment.block_inverses_BKK,
            moment.block_factors_BKK, group_scale,
        )  # fmt: skip
        changed = rounded.improve(group_scale)
        assert changed > 30
        compare(rounded, wanted, 0.1)


def plain(rounded: Rounded, group_scale: float, scales_OB: Tensor) -> None:
    """Round to the nearest under scales that are given."""
    order_B = rounded.moment.order_I[::16] // 16
    rounded.scales_OB = scales_OB[:, order_B].contiguous()
    step_OB = rounded.scales_OB.view(torch.float8_e4m3fn).float() * group_scale
    ratio_OI = rounded.target_OI / step_OB.repeat_interleave(16, dim=1)
    rounded.codes_OI = nvfp4.reference.e2m1.encode(ratio_OI)
    rounded.rescale(group_scale)


@pytest.mark.parametrize("seed", range(4))
def test_what_each_step_is_worth(seed: int) -> None:
    """Joint scales, scales that are fixed, no compensation: the loss grows in that order."""
    rounded, group_scale, scales_OB = case(128, seed)
    losses = []
    rounded.round(group_scale)
    losses.append(rounded.loss())
    rounded.round(group_scale, scales_OB)
    losses.append(rounded.loss())
    plain(rounded, group_scale, scales_OB)
    losses.append(rounded.loss())
    assert losses == sorted(losses)


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("width", [16, 64, 80, 144, 400, 592])
def test_the_factor(name: str, width: int) -> None:
    """UᵀU·H' is the identity, and U is that of float64, both within what float32 can do: n·u times
    the condition of H'."""
    moment = Moment(MOMENTS[name](np.random.default_rng(width), width), 0.01)
    h_II, factor_II = moment.h_II.double(), moment.factor_II.double()
    reach = width * 2.0**-24 * float(torch.linalg.cond(h_II))
    assert torch.equal(factor_II, factor_II.triu())
    residual_II = factor_II.T @ factor_II @ h_II - torch.eye(width)
    assert residual_II.norm(2) < reach
    lower_II = torch.linalg.cholesky(h_II.flip(0, 1)).flip(0, 1)
    exact_II = torch.linalg.solve_triangular(lower_II, torch.eye(width).double(), upper=True)
    assert (factor_II - exact_II).norm() < reach * exact_II.norm()


def test_the_factor_of_what_float32_cannot_tell_from_singular() -> None:
    """It is found in float64, and what is not positive definite there, either, is an error."""
    x_RI = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    x_RI[:, 150:] = x_RI[:, :150] + 1e-4 * x_RI[:, 150:]
    h_II = (x_RI.double().T @ x_RI.double() / 400).float()
    assert int(torch.linalg.cholesky_ex(h_II).info) > 0
    factor_II = inverse_factor(h_II.double() + 1e-6 * torch.eye(300))
    assert torch.isfinite(inverse_factor(h_II + 1e-6 * torch.eye(300))).all()
    assert torch.isfinite(factor_II).all()
    with pytest.raises(ArithmeticError):
        inverse_factor(-torch.eye(300))


Case = tuple[str, str, int, int, float]
cases = st.tuples(
    st.sampled_from(sorted(WEIGHTS)),
    st.sampled_from(sorted(MOMENTS)),
    st.sampled_from([16, 32, 112, 128, 144, 272]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-38, 1e-30, 1.0, 1e30]),
)


def quantized(
    case: Case, algorithm: GPTQJoint, dtype: torch.dtype = torch.float32
) -> tuple[Weight, float, float]:
    """The weight with its buffers, its group scale, and its relative error."""
    weights, moments, width, seed, size = case
    rng = np.random.default_rng(seed)
    w_OI = (WEIGHTS[weights](rng, 5, width) * size).to(dtype)
    statistics = {"second_moment": MOMENTS[moments](rng, width), "second_moment.rows": 7}
    buffers = {
        CODES: torch.full((5, width // 2), 255, dtype=torch.uint8),
        BLOCK_SCALE: torch.full((5, width // 16), 255, dtype=torch.uint8),
    }
    weight = Weight("w", w_OI, buffers, statistics)
    group_scale, figures = algorithm.quantize([weight], NVFP4())
    assert group_scale is not None
    return weight, group_scale, figures[0].relative_error


@settings(max_examples=150, deadline=None)
@given(cases, st.integers(0, 2), st.sampled_from([256, 448]))
def test_whatever_the_numbers_are(case: Case, descent: int, range: int) -> None:
    weight, group_scale, error = quantized(case, GPTQJoint(descent=descent, range=range))
    scales = weight.out[BLOCK_SCALE]
    assert 1 <= scales.min() <= scales.max() <= 126
    assert nvfp4.GLOBAL_SCALE_MIN <= group_scale <= nvfp4.GLOBAL_SCALE_MAX
    values_OI = torch.empty(weight.matrix_OI.shape)
    NVFP4().dequantize(weight.out, group_scale, values_OI)
    assert torch.isfinite(values_OI).all()
    assert np.isfinite(error)
    if not weight.matrix_OI.any():
        assert not values_OI.any()


@settings(max_examples=150, deadline=None)
@given(cases.filter(lambda case: case[4] == 1), st.sampled_from([0.001, 0.01, 1.0]))
def test_descent_never_raises_the_loss(case: Case, damping: float) -> None:
    weights, moments, width, seed, _ = case
    rng = np.random.default_rng(seed)
    rounded = [
        Rounded(WEIGHTS[weights](rng, 4, width), Moment(MOMENTS[moments](rng, width), damping))
        for _ in range(2)
    ]
    group_scale = nvfp4.global_scale(max(float(x.target_OI.abs().max()) for x in rounded))
    for weight in rounded:
        weight.round(group_scale)
    group_scale = descend(rounded, group_scale, 4, is_checked=True)
    for weight in rounded:
        values_OI = weight.values_OI.clone()
        weight.rescale(group_scale)
        assert torch.equal(weight.values_OI, values_OI)


def test_descent_is_worth_something() -> None:
    rounded, group_scale, _ = case(128, 0)
    rounded.round(group_scale)
    before = rounded.loss()
    descend([rounded], group_scale, 2)
    assert rounded.loss() < 0.95 * before


@pytest.mark.parametrize("width", WIDTHS)
def test_packed_codes_are_the_values(width: int) -> None:
    rounded, group_scale, _ = case(width, 5)
    rounded.round(group_scale)
    group_scale = descend([rounded], group_scale, 2)
    out = {
        CODES: torch.zeros(100, width // 2, dtype=torch.uint8),
        BLOCK_SCALE: torch.zeros(100, width // 16, dtype=torch.uint8),
    }
    rounded.pack(out[CODES], out[BLOCK_SCALE])
    values_OI = torch.empty(100, width)
    NVFP4().dequantize(out, group_scale, values_OI)
    assert torch.equal(values_OI[:, rounded.moment.order_I], rounded.values_OI)


@pytest.mark.parametrize("name", ["gaussian", "zero_blocks", "heavy_tails"])
def test_without_a_row_the_error_is_that_of_mse(name: str) -> None:
    """All inputs count alike, so that nothing compensates; `mse` has the least error there is.

    The losses of float32 are off by less than 2⁻¹⁹, so each choice loses at most that much.
    """
    weight, group_scale, error = quantized((name, "no_rows", 272, 1, 1.0), GPTQJoint(range=448))
    w_OI = weight.matrix_OI
    codes, scales = (torch.empty_like(weight.out[part]) for part in (CODES, BLOCK_SCALE))
    sums = nvfp4.quantize_into(w_OI, codes, scales, scale="mse", global_scale=group_scale)
    least = (sums.sum_sq_err / sums.sum_sq_w) ** 0.5
    assert error <= least * (1 + 2.0**-19)
    assert (weight.out[BLOCK_SCALE] == scales).double().mean() > 0.99


@pytest.mark.parametrize("size", [2.0**-90, 2.0**60])
def test_powers_of_two_change_nothing(size: float) -> None:
    first, small, _ = quantized(("gaussian", "ordinary", 144, 3, 1.0), GPTQJoint(descent=2))
    other, large, _ = quantized(("gaussian", "ordinary", 144, 3, size), GPTQJoint(descent=2))
    assert large == small * size
    for part in first.out:
        assert torch.equal(first.out[part], other.out[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_16_bits(dtype: torch.dtype) -> None:
    """They are rounded as the same numbers in float32."""
    case: Case = ("gaussian", "ordinary", 144, 3, 1.0)
    half, _, _ = quantized(case, GPTQJoint(), dtype)
    again = dict(half.out)
    full = Weight("w", half.matrix_OI.float(), {k: x.clone() for k, x in again.items()},
                  half.statistics)  # fmt: skip
    GPTQJoint().quantize([full], NVFP4())
    for part in again:
        assert torch.equal(again[part], full.out[part])


def test_inputs_that_overflow_are_refused() -> None:
    moment_II = torch.full((16, 16), torch.inf)
    statistics = {"second_moment": moment_II, "second_moment.rows": torch.tensor(3)}
    weight = Weight("model.layers.0.o_proj", torch.ones(2, 16), {}, statistics)
    with pytest.raises(ObservationError, match=r"^model\.layers\.0\.o_proj: .*keep pattern\.$"):
        GPTQJoint().quantize([weight], NVFP4())
