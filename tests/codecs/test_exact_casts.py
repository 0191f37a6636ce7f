# SPDX-License-Identifier: Apache-2.0
"""MXFP4 becomes NVFP4 without loss, where E4M3 has the powers of two: the same codes, and values
that are equal bit for bit."""

from __future__ import annotations

import pytest
import torch

from fourfold.formats import mxfp4
from fourfold.formats.base import FORMATS
from fourfold.formats.nvfp4.from_mxfp4 import global_scale

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NVFP4 = FORMATS["nvfp4"]
SPAN = 17


def every_code() -> torch.Tensor:
    """Codes U8 [1, 16]: each of the 16 codes twice."""
    low, high = torch.arange(16, dtype=torch.uint8), torch.arange(16, dtype=torch.uint8).flip(0)
    return (low | high << 4).view(1, 16)


def values_of(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The definition of MXFP4, in float64."""
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    scales = 2.0 ** (exponents.double() - 127)
    return E2M1[pairs.long()].double() * scales.repeat_interleave(32, 1)


def cast(codes: torch.Tensor, exponents: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    span = mxfp4.span([mxfp4.used(codes, exponents)])
    assert span is not None
    scale = NVFP4.scale_of_mxfp4(*span)
    assert scale is not None
    rows, half = codes.shape
    out = {
        "codes": torch.empty(rows, half, dtype=torch.uint8),
        "block_scale": torch.empty(rows, half // 8, dtype=torch.uint8),
    }
    NVFP4.from_mxfp4(codes, exponents, scale, out)
    return out, scale


@pytest.mark.parametrize("high", [18 + 1, 100, 127, 128, 200, 252])
def test_every_code_and_exponent(high: int) -> None:
    """All 16 codes under each exponent that may lie beside the largest one."""
    exponents = torch.arange(high - SPAN, high + 1, dtype=torch.uint8).view(1, -1)
    codes = every_code().repeat(1, exponents.shape[1])
    out, scale = cast(codes, exponents)
    assert torch.equal(out["codes"], codes)
    assert not ((out["block_scale"] & 0x7F) == 0).any()
    assert not ((out["block_scale"] & 0x7F) == 0x7F).any()
    decoded = torch.empty(1, codes.shape[1] * 2)
    NVFP4.dequantize(out, scale, decoded)
    wanted = values_of(codes, exponents)
    assert torch.equal(decoded.double(), wanted)
    assert torch.equal(torch.signbit(decoded), torch.signbit(wanted))


def test_what_is_not_exact() -> None:
    assert global_scale(100, 100 + SPAN) is not None
    assert global_scale(100, 100 + SPAN + 1) is None
    assert global_scale(255, 255) is None  # NaN
    assert global_scale(18, 18) == 2.0**-117
    assert global_scale(17, 17) is None  # no global scale is that small


def test_blocks_of_zeros_have_any_exponent() -> None:
    """Their exponents, 0 in most checkpoints, prevent no cast."""
    codes = torch.cat((every_code(), torch.full((1, 16), 0x80), torch.zeros(1, 16)), 1)
    exponents = torch.tensor([[127, 0, 200]], dtype=torch.uint8)
    out, scale = cast(codes.to(torch.uint8), exponents)
    decoded = torch.empty(1, 96)
    NVFP4.dequantize(out, scale, decoded)
    assert torch.equal(decoded[:, :32].double(), values_of(every_code(), exponents[:, :1]))
    assert not decoded[:, 32:].any()
    assert mxfp4.span([torch.zeros(0, dtype=torch.uint8)]) is None


def test_the_smallest_exponent_is_one_like_others() -> None:
    """2⁻¹²⁷ under a code that is not 0 is no mark of a block of zeros."""
    exponents = torch.tensor([[120, 0]], dtype=torch.uint8)
    span = mxfp4.span([mxfp4.used(every_code().repeat(1, 2), exponents)])
    assert span == (0, 120)
    assert NVFP4.scale_of_mxfp4(*span) is None
