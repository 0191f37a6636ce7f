# SPDX-License-Identifier: Apache-2.0
"""E2M1 codes with a byte as the scale of each block, decoded by a table of what the bytes mean.

Import this module at first use: it imports numba.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fourfold.formats.nvfp4 import BLOCK_SIZE, cpu

Table = npt.NDArray[np.float32]
"""The scale that each of 256 bytes stands for."""

_BYTES = torch.arange(256).to(torch.uint8)

E8M0: Table = _BYTES.view(torch.float8_e8m0fnu).float().numpy()
"""2^(byte − 127); 255 is NaN."""

E4M3: Table = _BYTES.view(torch.float8_e4m3fn).float().numpy()


def decode(
    codes: torch.Tensor, scales: torch.Tensor, table: Table, out: torch.Tensor, *, block: int
) -> None:
    """Fill `out` [rows, in] with code · scale, rounded to its dtype. Releases the GIL.

    Args:
        codes: U8 [rows, in/2], the low half of a byte first.
        scales: U8 [rows, in/block].
        table: The scales that bytes stand for.
        out: Contiguous bf16, fp16 or fp32.
        block: The number of codes that share a scale, 16 or 32.
    """
    if block != BLOCK_SIZE:
        scales = scales.repeat_interleave(block // BLOCK_SIZE, dim=-1)
    if out.dtype == torch.float16:
        exact = torch.empty(out.shape, dtype=torch.float32)
        cpu.dequantize(codes, scales, 1.0, exact, table)
        out.copy_(exact)
    else:
        cpu.dequantize(codes, scales, 1.0, out, table)
