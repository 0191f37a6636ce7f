# SPDX-License-Identifier: Apache-2.0
"""Proves how FP8 engines' view of activations is computed: against NumPy in float64 and a search
over all E4M3 values, and against what is stated of zeros, infinities and NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import UsageError
from fourfold.formats.base import FORMATS
from fourfold.formats.nvfp4.e4m3 import E4M3_POSITIVE

GROUPS = {"fp8": 256, "fp8_channel": 256, "fp8_block": 128, "mxfp8": 32}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRID = np.array([0.0, *E4M3_POSITIVE.tolist()])
f32 = np.float32


def scale_by_hand(name: str, amax: np.float32, input_scale: float) -> np.float32:
    """The scale of what shares one, from the head of the module."""
    if name == "fp8":
        return f32(input_scale)
    if name == "fp8_channel":
        return max(f32(amax / f32(448)), f32(1 / (448 * 512)))
    if name == "fp8_block":
        return f32(max(amax, f32(1e-10)) / f32(448))
    if amax == 0:
        return f32(1)
    return f32(2.0 ** next(e for e in range(-117, 120) if amax <= 448 * 2.0**e or e == 119))


def rounded(name: str, x_TI: torch.Tensor, input_scale: float) -> torch.Tensor:
    x, out = x_TI.float().numpy(), np.zeros(x_TI.shape, f32)
    for token, row in enumerate(x):
        for start in range(0, x.shape[1], GROUPS[name]):
            part = row[start : start + GROUPS[name]]
            scale = scale_by_hand(name, np.abs(part).max(), input_scale)
            quotients = np.minimum(np.abs(part / scale), f32(448)).astype(np.float64)
            distances = np.abs(quotients[:, None] - GRID)
            is_nearest = distances == distances.min(axis=1, keepdims=True)
            even = np.where(np.arange(127) % 2 == 0, is_nearest, False)
            byte = np.where(even.any(axis=1), even.argmax(axis=1), is_nearest.argmax(axis=1))
            values = np.copysign(GRID[byte].astype(f32) * scale, part)
            out[token, start : start + len(part)] = values
    return torch.from_numpy(out).to(x_TI.dtype)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 1 << 20), low=st.integers(-30, 0), high=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_inputs_are_rounded_as_the_definition_says(
    name: str, dtype: torch.dtype, seed: int, low: int, high: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(6, 256, generator=generator)
    x_TI *= torch.exp2(torch.randint(low, high + 1, (6, 256), generator=generator))
    x_TI[0], x_TI[1, :128], x_TI[2, 7] = 0.0, -0.0, 1e4
    x_TI = x_TI.to(dtype)
    scale = float(f32(x_TI.float().abs().max()) / f32(2 * 448))  # half of it saturates
    found = FORMATS[name].round_activations(x_TI, scale if name == "fp8" else None)
    expected = rounded(name, x_TI, scale)
    assert torch.equal(found, expected)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))
    assert (found.dtype, found.shape) == (x_TI.dtype, x_TI.shape)


@pytest.mark.parametrize("name", GROUPS)
def test_shapes_and_buffers(name: str) -> None:
    fmt, scale = FORMATS[name], 0.01 if name == "fp8" else None
    x = torch.randn(2, 3, 256, generator=torch.manual_seed(0)).bfloat16()
    expected = fmt.round_activations(x, scale)
    assert torch.equal(expected[1], fmt.round_activations(x[1], scale))
    assert torch.equal(expected, fmt.round_activations(x.transpose(0, 1), scale).transpose(0, 1))
    assert fmt.round_activations(x, scale, x) is x
    assert torch.equal(x, expected)
    assert fmt.round_activations(x[:0], scale).shape == (0, 3, 256)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_spreads_as_far_as_its_scale(name: str, value: float) -> None:
    x = torch.ones(2, 256)
    x[1, 40] = value
    found = FORMATS[name].round_activations(x, 1.0 if name == "fp8" else None).isnan()
    expected = torch.zeros(2, 256, dtype=torch.bool)
    start = 40 // GROUPS[name] * GROUPS[name]
    expected[1, start : start + GROUPS[name]] = True
    if name == "fp8":  # its scale does not depend on inputs
        expected = torch.full((2, 256), False)
        expected[1, 40] = math.isnan(value)
    assert torch.equal(found, expected)


def test_static_scales_cover_the_largest_input() -> None:
    fmt = FORMATS["fp8"]
    assert fmt.input_scale(448.0) == 1.0
    assert fmt.input_scale(0.0) == 1.0
    assert fmt.input_scale(1e-40) == 2.0**-117
    x = torch.tensor([[-6.0, 3.0, 1e9]])
    assert fmt.round_activations(x, fmt.input_scale(6.0))[0].tolist()[:1] == [-6.0]
    assert float(fmt.round_activations(x, 1.0)[0, 2]) == 448.0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="positive and finite"):
        FORMATS["fp8"].round_activations(torch.ones(1, 16), scale)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 128"):
        FORMATS["fp8_block"].round_activations(torch.ones(1, 64), None)
    with pytest.raises(UsageError, match=r"torch\.int8"):
        FORMATS["mxfp8"].round_activations(torch.ones(1, 64, dtype=torch.int8), None)
