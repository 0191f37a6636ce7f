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
FIRST_BYTE = 0x01
LAST_BYTE = 0x7E


def _value(byte: int) -> float:
    exponent, mantissa = byte >> 3, byte & 7
    if exponent == 0:
        return float(mantissa * 2.0**-9)
    return float((8 + mantissa) * 2.0 ** (exponent - 10))


E4M3_POSITIVE = torch.tensor([_value(byte) for byte in range(FIRST_BYTE, LAST_BYTE + 1)])
"""The 126 positive finite values in ascending order, float32: byte c is at index c − 1."""


def encode_clamped(x: Tensor) -> Tensor:
    """Block scales (float8_e4m3fn) of positive fp32 numbers: clamped to [2⁻⁹, 448], then rounded
    to the nearest, halves to even."""
    return x.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def from_bytes(scale_bytes: Tensor) -> Tensor:
    """uint8 bytes seen as float8_e4m3fn (no copy)."""
    return scale_bytes.view(torch.float8_e4m3fn)
