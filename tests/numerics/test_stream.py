# SPDX-License-Identifier: Apache-2.0
"""Proves the reading passes: dequantize, error and census agree with the reference on any bytes,
also on those of a broken checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fourfold.errors import UsageError
from fourfold.formats.nvfp4 import (
    block_scale_census,
    dequantize,
    dequantize_into,
    error_energy,
    quantize,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALES = (1.0, 3.3e-4, 0.0, float("nan"), 1e-45, 3e35)


def any_bytes(rows, blocks, seed=0):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 256, (rows, blocks * 8), np.uint8))
    return codes, torch.from_numpy(rng.integers(0, 256, (rows, blocks), np.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_dequantize_any_bytes(scale, dtype):
    codes, scales = any_bytes(61, 13)
    a, b = (dequantize(codes, scales, scale, dtype, kernel) for kernel in ("reference", "numba"))
    assert torch.equal(a.isnan(), b.isnan())
    number = ~a.isnan()
    assert torch.equal(a[number], b[number])
    assert torch.equal(torch.signbit(a[number]), torch.signbit(b[number]))


def test_dequantize_slices_and_leading_dimensions():
    codes, scales = any_bytes(12, 8)
    whole = dequantize(codes, scales, 0.5)
    assert torch.equal(whole[:, 32:64], dequantize(codes[:, 16:32], scales[:, 2:4], 0.5))
    nested = dequantize(codes.view(3, 4, 64), scales.view(3, 4, 8), 0.5)
    assert torch.equal(whole, nested.view(12, 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["max", "mse"])
def test_the_error_is_that_of_the_reference(scale, dtype):
    weight = torch.randn(77, 16 * 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = quantize(weight, scale=scale)
    parts = made.codes, made.block_scale, made.global_scale
    expected = error_energy(weight, *parts, kernel="reference")
    assert error_energy(weight, *parts, kernel="numba") == pytest.approx(expected, rel=1e-6)
    flipped = error_energy(-weight, *parts, kernel="numba")
    assert flipped == pytest.approx(error_energy(-weight, *parts, kernel="reference"), rel=1e-6)


def test_the_error_of_tiny_weights_does_not_underflow():
    weight = torch.randn(8, 32) * 1e-25
    made = quantize(weight, scale="mse")
    error, energy = error_energy(weight, made.codes, made.block_scale, made.global_scale)
    assert 0.001 < error / energy < 0.02


def test_the_census_counts_every_kind():
    every = torch.arange(256).to(torch.uint8).view(2, 128)
    census = block_scale_census(every.view(torch.float8_e4m3fn))
    assert (census.zero, census.nan, census.negative, census.subnormal) == (2, 2, 127, 14)


@pytest.mark.parametrize("kernel", ["reference", "numba"])
def test_shapes_that_do_not_belong_together_are_refused(kernel):
    codes, scales = any_bytes(4, 3)
    with pytest.raises(UsageError, match="belong together"):
        dequantize(codes, scales[:, :2], 1.0, kernel=kernel)
    with pytest.raises(UsageError, match="belong together"):
        error_energy(torch.ones(5, 48), codes, scales, 1.0, kernel)
    with pytest.raises(UsageError, match="belong together"):
        error_energy(torch.ones(4, 48), codes, scales.float(), 1.0, kernel)
    with pytest.raises(UsageError, match="out: "):
        dequantize_into(codes, scales, 1.0, torch.empty(4, 32), kernel)
    with pytest.raises(UsageError, match="out: "):
        dequantize_into(codes, scales, 1.0, torch.empty(4, 48, dtype=torch.float16), kernel)


@pytest.mark.parametrize("kernel", ["reference", "numba"])
def test_parameters_are_weights_too(kernel):
    weight = torch.nn.Parameter(torch.randn(4, 32))
    made = quantize(weight, scale="mse", kernel=kernel)
    error_energy(weight, made.codes, made.block_scale, made.global_scale, kernel)
    assert not made.dequantize().requires_grad
