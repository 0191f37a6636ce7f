# SPDX-License-Identifier: Apache-2.0
"""The definition of an NVFP4 tensor, in plain PyTorch: slow, short, and what every kernel must
reproduce byte for byte.

    w_OI  weight [.., in] as float32 (bf16 and fp16 convert exactly)     I = 16·B
    S     global scale, fp32;  s  block scale, E4M3;  m = fl32(s·S)
    q     = E2M1 of fl32(|w|/m), halves to even, clamped to 6; the sign bit is the weight's own

fl32 is IEEE rounding to nearest even, subnormals kept.

    max   s = E4M3(clamp(fl32(bmax / fl32(6·S)), 2⁻⁹, 448)), and 1 where that quotient is 0
    mse   the s of the 126 with the smallest loss; of equal losses the smaller s
          loss = Σ d²  over the 16 elements in ascending order, d = |w| − q·m
          in float64, each operation rounded, none fused (q·m is exact)

`max` is ModelOpt's arithmetic for dynamic block scales (`NVFP4QTensor.get_weights_scaling_factor`)
step by step, and gives its bytes. One difference, by intent: a weight of −0.0 (or one whose
quotient underflows) keeps its sign bit here; ModelOpt writes code 0 for it.

`mse` reads ties towards the smaller scale, so an all-zero block has byte 0x01 and codes 0 or 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.formats.nvfp4 import e2m1, e4m3

BLOCK_SIZE = 16
_BLOCKS_AT_A_TIME = 1 << 15  # bounds the memory of the full search: 126 passes over 4 MiB


def quantize(weight: Tensor, global_scale: float, *, mse: bool) -> tuple[Tensor, Tensor]:
    """Codes [..., in/2] and block scales [..., in/16], both uint8, of a finite weight [..., in]."""
    blocks = weight.reshape(-1, BLOCK_SIZE).float()
    choose = _mse_bytes if mse else _max_bytes
    parts = [
        _encode(part, choose(part, global_scale), global_scale)
        for part in torch.split(blocks, _BLOCKS_AT_A_TIME)
    ]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    *lead, width = weight.shape
    return codes.reshape(*lead, width // 2), scales.reshape(*lead, width // BLOCK_SIZE)


def dequantize(codes: Tensor, block_scale: Tensor, global_scale: float) -> Tensor:
    """float32 weight [..., in] = fl32(q · fl32(s·S))."""
    m_B = block_scale.float() * _fp32(global_scale, block_scale.device)
    values = e2m1.decode(e2m1.unpack(codes)).reshape(*m_B.shape, BLOCK_SIZE)
    return (values * m_B.unsqueeze(-1)).flatten(-2)


def _loss(w_NK: Tensor, m: Tensor) -> Tensor:
    q_NK = e2m1.decode(e2m1.round_magnitude(w_NK / m))
    d_NK = w_NK.double() - q_NK.double() * m.double()
    squared = d_NK * d_NK
    loss = torch.zeros_like(squared[:, 0])
    for k in range(BLOCK_SIZE):  # the order of addition is part of the definition
        loss = loss + squared[:, k]
    return loss


def _mse_bytes(blocks: Tensor, global_scale: float) -> Tensor:
    steps = e4m3.E4M3_POSITIVE.to(blocks.device) * _fp32(global_scale, blocks.device)
    losses = torch.stack([_loss(blocks.abs(), m) for m in steps], dim=-1)
    smallest = losses.amin(dim=-1, keepdim=True)
    return ((losses == smallest).to(torch.uint8).argmax(dim=-1) + 1).to(torch.uint8)


def _max_bytes(blocks: Tensor, global_scale: float) -> Tensor:
    divisor = 6.0 * _fp32(global_scale, blocks.device)
    quotient = blocks.abs().amax(dim=-1) / divisor
    quotient = torch.where(quotient == 0, torch.ones_like(quotient), quotient)
    return e4m3.encode_clamped(quotient).view(torch.uint8)


def _encode(blocks: Tensor, scale_bytes: Tensor, global_scale: float) -> tuple[Tensor, Tensor]:
    s_N = scale_bytes.view(torch.float8_e4m3fn).float()
    m_N = s_N * _fp32(global_scale, blocks.device)
    return e2m1.pack(e2m1.encode(blocks / m_N.unsqueeze(-1))), scale_bytes


def _fp32(value: float, device: torch.device) -> Tensor:
    """On the device: by a number in CPU memory, PyTorch's CUDA kernels divide by multiplying with
    its reciprocal, which is off by a bit."""
    return torch.tensor(value, dtype=torch.float32, device=device)
