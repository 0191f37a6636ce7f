# SPDX-License-Identifier: Apache-2.0
"""What is needed of MXFP4 to cast its weights to another format without loss.

MXFP4 has E2M1 codes, and a scale 2^(k − 127) for each 32 of them; k = 255 is NaN.
"""

from __future__ import annotations

from torch import Tensor

BLOCK = 32
BIAS = 127
NAN = 255

UNUSED = 0
"""Stands for the exponent of a block whose codes are all 0: it may have any scale. The real k = 0,
2⁻¹²⁷, is beyond what any other format holds."""


def used_exponents(codes: Tensor, exponents: Tensor) -> Tensor:
    """Return exponents U8 [rows, in/32], with `UNUSED` where the codes U8 [rows, in/2] are 0."""
    blocks = codes.reshape(*exponents.shape, BLOCK // 2)
    return exponents * (blocks & 0x77).any(-1)


def span(exponents: Tensor) -> tuple[int, int] | None:
    """Return the smallest and the largest exponent that is used; None if there is none."""
    used = exponents[exponents != UNUSED]
    return (int(used.min()), int(used.max())) if len(used) else None
