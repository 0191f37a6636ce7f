# SPDX-License-Identifier: Apache-2.0
"""The definition of FP8 tensors, in plain PyTorch: short, and what every kernel must reproduce byte
for byte. The head of the package says what the numbers mean.

Shapes: O rows, I columns; B × C blocks of `height` × `width` weights, the last of which may be
partial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.formats.nvfp4.e4m3 import E4M3_MAX

Block = tuple[int, int]
"""The rows and columns that share a scale."""

LOWEST, HIGHEST = -117, 119
"""The exponents of scales: 2⁻⁹·2⁻¹¹⁷ is the smallest normal float32, and 448·2¹¹⁹ is finite."""

SCALE_MIN = 2.0**LOWEST
BIAS = 127
"""Of E8M0: a byte b means 2^(b − 127)."""


def block_amaxes(w_OI: Tensor, block: Block) -> Tensor:
    """Return the largest magnitude of each block, float32 [B, C]."""
    (rows, columns), (height, width) = w_OI.shape, block
    magnitudes = torch.nn.functional.pad(
        w_OI.float().abs(), (0, -columns % width, 0, -rows % height)
    )
    high, wide = -(-rows // height), -(-columns // width)
    return magnitudes.view(high, height, wide, width).amax(dim=(1, 3))


def scales_of(amaxes: Tensor) -> Tensor:
    """Return fl32(amax/448), at least 2⁻¹¹⁷; 1 where all weights are 0."""
    divisor = torch.tensor(E4M3_MAX, dtype=torch.float32, device=amaxes.device)
    scales = (amaxes / divisor).clamp(min=SCALE_MIN)
    return torch.where(amaxes == 0, 1.0, scales)


def exponents_of(amaxes: Tensor) -> Tensor:
    """Return the E8M0 bytes of the smallest 2^e with amax ≤ 448·2^e, e in [-117, 119]; e is 0 where
    all weights are 0."""
    mantissa, exponent = torch.frexp(amaxes)  # amax = mantissa · 2^exponent, mantissa in [½, 1)
    smallest = torch.where(mantissa <= E4M3_MAX / 512, exponent - 9, exponent - 8)
    held = torch.where(amaxes == 0, 0, smallest.clamp(LOWEST, HIGHEST))
    return (held + BIAS).to(torch.uint8)


def powers(exponents: Tensor) -> Tensor:
    """Return the float32 scales that E8M0 bytes stand for."""
    return exponents.view(torch.float8_e8m0fnu).float()


def spread(scales_BC: Tensor, shape: torch.Size, block: Block) -> Tensor:
    """Return the scale of every weight, [O, I]."""
    rows = scales_BC.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]


def encode(x: Tensor) -> Tensor:
    """Return E4M3 of float32 numbers: to the nearest, halves to even, beyond 448 it is 448. A NaN
    stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(w_OI: Tensor, scales_BC: Tensor, block: Block) -> Tensor:
    """Return the codes of a finite weight, E4M3 [O, I]."""
    return encode(w_OI.float() / spread(scales_BC, w_OI.shape, block))


def dequantize(codes: Tensor, scales_BC: Tensor, block: Block) -> Tensor:
    """Return fl32(q·s), float32 [O, I]."""
    return codes.view(torch.float8_e4m3fn).float() * spread(scales_BC, codes.shape, block)


def error(w_OI: Tensor, codes: Tensor, scales_BC: Tensor, block: Block) -> tuple[float, float]:
    """Return Σ(w − q·s)² and Σw², in float64; q·s is exact there."""
    q_OI = codes.view(torch.float8_e4m3fn).double()
    w_OI = w_OI.double()
    d_OI = w_OI - q_OI * spread(scales_BC, codes.shape, block).double()
    return float((d_OI * d_OI).sum()), float((w_OI * w_OI).sum())
