# SPDX-License-Identifier: Apache-2.0
"""What is needed of MXFP4 to cast its weights to another format without loss.

MXFP4 has E2M1 codes, and a scale 2^(k − 127) for each 32 of them; k = 255 is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

BLOCK = 32
BIAS = 127
NAN = 255


def used(codes: Tensor, exponents: Tensor) -> Tensor:
    """Return the exponents of the blocks with a code that is not 0: the others may have any scale.

    Args:
        codes: U8 [rows, in/2], the low half of a byte first.
        exponents: U8 [rows, in/32].

    Returns:
        U8 [blocks].
    """
    blocks = codes.reshape(*exponents.shape, BLOCK // 2)
    return exponents[((blocks & 0x77) != 0).any(-1)]


def span(exponents: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return the smallest and the largest of all exponents; None if there are none."""
    ends = [(int(x.min()), int(x.max())) for x in exponents if x.numel()]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None
