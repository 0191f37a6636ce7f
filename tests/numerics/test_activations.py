# SPDX-License-Identifier: Apache-2.0
"""Proves that activations are rounded as the definition says, and as engines' kernels do.

The judge is a loop over blocks in NumPy with tables of its own. A second one follows the engines'
kernel step by step, with reciprocals that are off by one ulp either way.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fourfold.errors import UsageError
from fourfold.formats.nvfp4 import activations
from fourfold.formats.nvfp4.activations import fake_quantize

from .activation_oracle import E2M1, E4M3, nearest, rounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x: torch.Tensor, input_scale: float) -> None:
    found, wanted = fake_quantize(x, input_scale), rounded(x, input_scale)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.signbit(found), torch.signbit(wanted))
    assert (found.dtype, found.shape) == (x.dtype, x.shape)


def activations_of(seed: int, rows: int = 40, width: int = 64) -> torch.Tensor:
    """Rows of very different sizes, with zeros, outliers and repeated magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.exp2(torch.randint(-14, 3, (rows, 1), generator=generator))
    x[torch.rand(rows, width, generator=generator) < 0.1] = 0.0
    x[torch.rand(rows, width, generator=generator) < 0.02] *= 30
    x[0], x[1] = 0.0, -0.0
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_amax", [1.0, 0.37, 5.0, 64.0])
def test_is_the_definition(dtype: torch.dtype, of_amax: float) -> None:
    x = activations_of(seed=int(of_amax * 8)).to(dtype)
    check(x, float(x.abs().max()) * of_amax / 2688)


SIZES = [0.0, 1e-45, 1e-38, 1e-30, 1e-8, 1.0, 6.0, 448.0, 2688.0, 1e8, 1e30, 3e38]


@given(
    arrays(
        np.float32,
        (2, 32),
        elements=st.sampled_from([x * sign for x in SIZES for sign in (1, -1)])
        | st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.sampled_from([2.0**-117, 1e-30, 1e-8, 2.0**-10, 1 / 2688, 1.0, 1e5, 1e30]),
)
def test_wild_inputs(x_TI: np.ndarray, input_scale: float) -> None:
    check(torch.from_numpy(x_TI), input_scale)


def test_ties_go_to_even() -> None:
    block = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, 0, 0, 0, 0, 0, 0])
    rounded = [6, 0, 1, 1, 2, 2, 4, 4, -0.0, -4, 0, 0, 0, 0, 0, 0]
    for exponent in (-6, 0, 8):  # s is 1, 64, 2⁻⁸
        found = fake_quantize(block * 2.0**exponent, 1.0)
        assert (found * 2.0**-exponent).tolist() == rounded


def test_block_scales_at_ties_go_to_even() -> None:
    for byte in range(126):
        half = (float(E4M3[byte]) + float(E4M3[byte + 1])) / 2
        x = torch.full((1, 16), half * 6)
        even = byte if byte % 2 == 0 else byte + 1
        s = float(E4M3[even])
        q = float(nearest(E2M1, np.float32(half * 6) / np.float32(s))) if s else 0.0
        assert fake_quantize(x, 1.0).tolist() == [[q * s] * 16]


def test_a_block_too_small_for_a_scale_is_zero() -> None:
    at_the_tie = 6 * 2.0**-10
    above = float(np.nextafter(np.float32(at_the_tie), np.float32(1)))
    assert fake_quantize(torch.full((16,), at_the_tie), 1.0).tolist() == [0.0] * 16
    assert fake_quantize(torch.full((16,), above), 1.0).tolist() == [2.0**-9 * 3] * 16


def test_what_is_too_large_saturates() -> None:
    x = torch.tensor([1e30, -torch.inf, 5 * 448.0] + 13 * [0.0])
    assert fake_quantize(x, 1.0)[:3].tolist() == [2688.0, -2688.0, 4 * 448.0]


def test_a_nan_spoils_its_block_and_no_other() -> None:
    x = torch.ones(2, 48)
    x[0, 20] = torch.nan
    found = fake_quantize(x, 1 / 2688)
    assert torch.isnan(found[0, 16:32]).all()
    found[0, 16:32] = 1
    assert torch.equal(found, torch.ones(2, 48))


def test_shapes_strides_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations_of(3, rows=24)
    whole = fake_quantize(x, 0.001)
    monkeypatch.setattr(activations, "_ELEMENTS_AT_A_TIME", 5 * 64)
    assert torch.equal(fake_quantize(x, 0.001), whole)
    assert torch.equal(fake_quantize(x.view(2, 3, 4, 64), 0.001), whole.view(2, 3, 4, 64))
    assert torch.equal(fake_quantize(x.T.contiguous().T, torch.tensor(0.001)), whole)
    assert torch.equal(fake_quantize(x[:0], 0.001), whole[:0])
    out = torch.empty_like(x)
    assert fake_quantize(x, 0.001, out) is out
    assert torch.equal(out, whole)
    fake_quantize(x, 0.001, x)
    assert torch.equal(x, whole)


def test_no_gradient_and_no_change_of_the_input() -> None:
    x = activations_of(4).requires_grad_()
    before = x.detach().clone()
    assert not fake_quantize(x, 0.001).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "scale", "out", "message"),
    [
        (torch.zeros(16, dtype=torch.int32), 1.0, None, "activations of torch.int32"),
        (torch.zeros(2, 24), 1.0, None, "[2, 24] cannot be rounded; the last dimension"),
        (torch.tensor(1.0), 1.0, None, "[] cannot be rounded"),
        (torch.zeros(16), 0.0, None, "an input_scale of 0.0 is outside"),
        (torch.zeros(16), -1.0, None, "an input_scale of -1.0 is outside"),
        (torch.zeros(16), float("nan"), None, "an input_scale of nan is outside"),
        (torch.zeros(16), float("inf"), None, "an input_scale of inf is outside"),
        (torch.zeros(16), torch.ones(2), None, "is one number, not a tensor [2]"),
        (torch.zeros(16), 1.0, torch.zeros(32), "needs a contiguous torch.float32 [16]"),
        (torch.zeros(16), 1.0, torch.zeros(16, dtype=torch.half), "out: torch.float16 [16]"),
        (torch.zeros(2, 16), 1.0, torch.zeros(16, 2).T, "needs a contiguous"),
    ],
)
def test_what_does_not_fit_is_named(x, scale, out, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        fake_quantize(x, scale, out)


# --- the engines' kernel ------------------------------------------------------------------


def kernel(x_BK: np.ndarray, input_scale: np.float32, ulp: int) -> tuple[np.ndarray, ...]:
    """s and q as the kernel computes them, its reciprocals `ulp` units off."""

    def rcp(value: np.ndarray) -> np.ndarray:
        exact = np.float32(1) / value
        return exact if ulp == 0 else np.nextafter(exact, np.float32(ulp * np.inf))

    g = np.float32(1) / input_scale
    s_B = g * (np.abs(x_BK).max(-1) * rcp(np.float32(6)))
    s_B = np.array([nearest(E4M3, s) for s in s_B])
    factor_B = rcp(s_B * rcp(g))
    q_BK = np.array([[nearest(E2M1, v) for v in row] for row in np.abs(x_BK) * factor_B[:, None]])
    return s_B, q_BK


def ours(x_BK: np.ndarray, input_scale: np.float32) -> tuple[np.ndarray, ...]:
    """s and q of the definition, and the two quotients that they are rounded from."""
    r_B = np.abs(x_BK).max(-1) / (np.float32(6) * input_scale)
    s_B = np.array([nearest(E4M3, r) for r in r_B])
    r_BK = np.abs(x_BK) / (s_B * input_scale)[:, None]
    q_BK = np.array([[nearest(E2M1, r) for r in row] for row in r_BK])
    return s_B, q_BK, r_B, r_BK


def is_halfway(quotient: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Whether a halfway point lies so near that the kernel may be on its other side.

    The kernel's quotient has at most four roundings of 1 ulp, ours two of a half: with 1 ulp up to
    2⁻²³ of the value, 5 · 2⁻²³.
    """
    halves = (table[1:].astype(float) + table[:-1]) / 2
    near = np.abs(quotient.astype(float)[..., None] - halves).min(-1)
    return near <= 5 * 2.0**-23 * quotient


@pytest.mark.parametrize("ulp", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_differ_at_halfway_points_alone(dtype: torch.dtype, ulp: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 16, generator=generator).to(dtype).float().numpy()
    scale = np.float32(np.abs(x).max()) / np.float32(2688)
    s_B, q_BK, r_B, r_BK = ours(x, scale)
    kernel_s_B, kernel_q_BK = kernel(x, scale, ulp)
    other_s, same_s = kernel_s_B != s_B, kernel_s_B == s_B
    assert is_halfway(r_B, E4M3)[other_s].all()
    other_q = (kernel_q_BK != q_BK)[same_s]
    assert is_halfway(r_BK, E2M1)[same_s][other_q].all()
    assert other_s.mean() < 0.005
    assert other_q.mean() < 0.005


def test_the_judge_of_the_kernel_is_ours() -> None:
    x = activations_of(9).reshape(-1, 16)[8:].numpy()
    s_B, q_BK, *_ = ours(x[np.abs(x).max(-1) > 1e-3], np.float32(0.001))
    found = fake_quantize(torch.from_numpy(x[np.abs(x).max(-1) > 1e-3]), 0.001).abs().numpy()
    assert np.array_equal(found, q_BK * (s_B * np.float32(0.001))[:, None])
