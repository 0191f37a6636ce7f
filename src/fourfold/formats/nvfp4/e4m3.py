# SPDX-License-Identifier: Apache-2.0
"""E4M3 (`float8_e4m3fn`): the format of NVFP4 block scales.

Sign, four exponent bits (bias 7), three mantissa bits. A block scale is one of the 126 positive
finite values, bytes 0x01 to 0x7E: 2⁻⁹ … 448. Byte 0x00 would zero its block, and 0x7F is NaN:
neither is ever a block scale, so numbers are clamped to [2⁻⁹, 448] before they are rounded.

Bytes 0x01 to 0x07 are subnormal (byte · 2⁻⁹). Bytes order as their values do, eight to an octave
from 0x08 up; hence half the value of byte c ≥ 16 is byte c − 8, and half of an even c < 16 is c/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
E4M3_POSITIVE = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
"""The 126 positive finite values in ascending order, float32: byte c is at index c − 1."""


def encode_clamped(x: Tensor) -> Tensor:
    """Block scales (float8_e4m3fn) of positive fp32 numbers: clamped to [2⁻⁹, 448], then rounded
    to the nearest, halves to even."""
    return x.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
