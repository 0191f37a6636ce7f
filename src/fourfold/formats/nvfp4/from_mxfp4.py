# SPDX-License-Identifier: Apache-2.0
"""MXFP4 weights as NVFP4, exactly: the same codes, and powers of two as scales.

With the largest exponent of a scale group as K, the global scale is 2^(K − 127 − 8), and both
halves of a block of 32 with the exponent k get the block scale 2^(k − K + 8). E4M3 has the powers
of two from 2⁻⁹ to 2⁸, so a group is exact where K − k is at most 17.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fourfold.formats import mxfp4

TOP, BOTTOM = 8, -9
"""Exponents of the largest and the smallest power of two in E4M3."""

SMALLEST_GLOBAL = -117
"""The exponent of the smallest global scale."""

ONE = 0x38
"""1.0 in E4M3: the scale of a block whose codes are all 0."""


def global_scale(low: int, high: int) -> float | None:
    """Return the global scale for MXFP4 exponents from `low` to `high`; None if none is exact."""
    power = high - mxfp4.BIAS - TOP
    if high - low > TOP - BOTTOM or high == mxfp4.NAN or power < SMALLEST_GLOBAL:
        return None
    return math.ldexp(1.0, power)


def block_scales(exponents: Tensor, global_scale: float) -> Tensor:
    """Return the bytes of E4M3 scales U8 [rows, in/16] for exponents U8 [rows, in/32].

    An exponent that E4M3 has no power of two for is that of a block of zeros.
    """
    power = math.frexp(global_scale)[1] - 1
    bytes_of = torch.full((256,), ONE, dtype=torch.uint8)
    for exponent in range(BOTTOM, TOP + 1):
        bytes_of[exponent + power + mxfp4.BIAS] = _e4m3(exponent)
    return bytes_of[exponents.long()].repeat_interleave(2, dim=1)


def _e4m3(exponent: int) -> int:
    """The byte of 2^exponent; below 2⁻⁶ it is subnormal."""
    return (exponent + 7) << 3 if exponent >= -6 else 1 << (exponent + 9)
