# SPDX-License-Identifier: Apache-2.0
"""E2M1: the four-bit float of NVFP4.

Bit 3 is the sign, bits 2-1 the exponent (bias 1), bit 0 the mantissa, so the eight magnitudes are

    code   0    1    2    3    4    5    6    7
    value  0   0.5   1   1.5   2    3    4    6

Rounding is to the nearest value, halves to the even code (0.25→0, 0.75→1, 1.25→1, 1.75→2, 2.5→2,
3.5→4, 5→4), and what lies above 6 becomes 6. The sign bit of the input is kept even where the
magnitude rounds to zero: −0.1 and −0.0 both become code 8.

Two codes share a byte; the low nibble holds the even element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.errors import UsageError

E2M1_MAX = 6.0
E2M1_VALUES = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
)
"""The value of each code 0..15, float32."""


def round_magnitude(x: Tensor) -> Tensor:
    """Codes 0..7 (uint8) of non-negative numbers, halves to the even code, clamped to 6."""
    # The half below an even code belongs to it (>=), the half above it too (>).
    code = (x > 0.25).to(torch.uint8)
    for bound, to_upper in ((0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += (x >= bound) if to_upper else (x > bound)
    return code


def encode(x: Tensor) -> Tensor:
    """E2M1 codes 0..15 (uint8) of any numbers but NaN, of the shape of `x`."""
    return round_magnitude(x.abs()) | (torch.signbit(x).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """float32 values of E2M1 codes 0..15, of the shape of `codes`; code 8 is −0.0."""
    return E2M1_VALUES.to(codes.device)[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """[..., n] codes to [..., n/2] bytes, the even element in the low nibble."""
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise UsageError(
            f"E2M1 codes of shape {list(codes.shape)} cannot be packed: the last "
            "dimension must be even"
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """[..., n/2] bytes to [..., n] codes: the inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
