# SPDX-License-Identifier: Apache-2.0
"""FP8 tensors: E4M3 codes, one byte a weight, and scales that multiply them.

    w ≈ q · s      q  E4M3 code       float8_e4m3fn  [out, in]
                   s  its block's scale

    format         a block is          s                                 the inputs are rounded with
    fp8            the scale group     float32                           a static scale
    fp8_channel    a row               float32        [out]              a scale for each token
    fp8_block      128 × 128 weights   float32        [⌈out/128⌉, in/128]  one for 128 inputs of it
    mxfp8          32 of a row         power of two   [out, in/32]       one for 32 inputs of it

`reference.py` is the definition; every kernel gives its bytes.

    s = fl32(amax/448), held to 2⁻¹¹⁷ or more; MXFP8: the smallest 2^e with amax ≤ 448·2^e, and e
        held to [-117, 119]; in both 1 where all weights are 0. amax is that of the block.
    q = E4M3(fl32(w/s)), to the nearest, halves to even, beyond 448 it is 448: never NaN
    ŵ = fl32(q·s)

fl32 is IEEE rounding to nearest even. With scales in that range ŵ is finite, and normal unless 0.

**Why amax, and no search.** E4M3 is a floating-point format: between 2⁻⁶ and 448 its relative error
is the same in each octave, and scales that differ by a power of two give the same weights but for
those near 0. A search moves the weights by less than an octave, and cannot clip, since a clipped
weight loses more than its rounding does. On normal, Laplace and Student-t (3 degrees) weights the
best of 48 scales lowers the squared error by 5 to 10 % for a row and 3 to 6 % for a block: from
2.65 to 2.60 % of the weight's norm. NVFP4's search lowers a four times larger error by a quarter.
For MXFP8 there is nothing to choose: a smaller power clips, and what a larger one can represent up
to amax, this one can as well. So `max` is the one way to choose scales.

Shapes: O rows, I columns; B × C blocks.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from fourfold.formats import dispatch, nvfp4
from fourfold.formats.dispatch import Kernel
from fourfold.formats.fp8 import reference
from fourfold.formats.fp8.reference import SCALE_MIN, Block
from fourfold.formats.nvfp4.e4m3 import E4M3_MAX

MX_BLOCK = 1, 32

FIGURES = 2048
"""Weights of a tile on a GPU, for which it stores the two sums."""


def scale_of(amax: float) -> float:
    """Return fl32(amax/448) as a Python float, held to its range; 1 for an amax of 0."""
    return float(reference.scales_of(torch.tensor([amax], dtype=torch.float32)))


def block_amaxes(w_OI: Tensor, block: Block, kernel: Kernel | str = "auto") -> Tensor:
    """Return the largest magnitude of each block, float32 [B, C], of a finite weight."""
    if dispatch.choose(kernel, w_OI.device) is Kernel.NUMBA and w_OI.numel():
        return cast(Tensor, _cpu().block_amaxes(w_OI.detach(), block))
    return reference.block_amaxes(w_OI.detach(), block)


def quantize_into(
    w_OI: Tensor,
    codes: Tensor,
    scales_BC: Tensor,
    block: Block,
    *,
    name: str = "weight",
    kernel: Kernel | str = "auto",
) -> tuple[float, float]:
    """Fill the uint8 buffer `codes` [O, I]; return Σ(w − q·s)² and Σw².

    Args:
        w_OI: bf16, fp16 or fp32, contiguous along I.
        codes: Contiguous along I.
        scales_BC: float32.
        block: The rows and columns that share a scale.
        name: The weight's name, for messages.
        kernel: The kernels to use; see `dispatch`.

    Raises:
        NonFiniteError: The weight holds NaN or Inf.
    """
    w_OI = w_OI.detach()
    if dispatch.choose(kernel, w_OI.device) is Kernel.NUMBA and w_OI.numel():
        error, energy = _cpu().quantize(w_OI, codes, scales_BC, block)
    else:
        codes.copy_(reference.quantize(w_OI, scales_BC, block).view(torch.uint8))
        error, energy = reference.error(w_OI, codes, scales_BC, block)
    if not math.isfinite(energy):
        nvfp4.amax(w_OI, name=name)  # raises
    return error, energy


def dequantize_into(
    codes: Tensor, scales_BC: Tensor, block: Block, out_OI: Tensor, kernel: Kernel | str = "auto"
) -> None:
    """Fill `out_OI`, contiguous float32 or bf16, with fl32(q·s) in its dtype."""
    if dispatch.choose(kernel, codes.device) is Kernel.NUMBA and codes.numel():
        _cpu().decode(codes.contiguous(), scales_BC, out_OI, first=0, block=block)
    else:
        out_OI.copy_(reference.dequantize(codes, scales_BC, block))


def error_energy(
    w_OI: Tensor, codes: Tensor, scales_BC: Tensor, block: Block, kernel: Kernel | str = "auto"
) -> tuple[float, float]:
    """Return Σ(w − q·s)² and Σw², in float64."""
    w_OI = w_OI.detach()
    if dispatch.choose(kernel, w_OI.device) is Kernel.NUMBA and w_OI.numel():
        error, energy = _cpu().error(w_OI, codes, scales_BC, block)
        return float(error), float(energy)
    return reference.error(w_OI, codes, scales_BC, block)


def quantize_batch_into(
    w_NX: Tensor,
    codes: Tensor,
    scales: Tensor,
    workspace: Tensor,
    exponents: Tensor | None = None,
    kernel: Kernel | str = "auto",
) -> Tensor:
    """Quantize N weights without waiting for the device; all tensors are contiguous and on one.

    Args:
        w_NX: The weights, one in each row.
        codes: uint8 [N, X], to be filled.
        scales: float32 [N], the scale of each weight; not read for MXFP8.
        workspace: uint8, `workspace_bytes` of it, 8-byte aligned.
        exponents: uint8 [N, X/32], to be filled: the weights become MXFP8.
        kernel: The kernels to use; see `dispatch`.

    Returns:
        Σ(w − q·s)² and Σw² of each weight, float64 [N, 2]. Where one of them is not finite, the
        weight is not, and its bytes are void.
    """
    if w_NX.numel() and dispatch.choose(kernel, w_NX.device) is Kernel.TRITON:
        parts = w_NX, codes, exponents, scales, workspace
        return cuda_kernels().quantize(*parts)  # type: ignore[no-any-return]
    figures = []
    for n, w_X in enumerate(w_NX):
        w_OI, scales_BC, block = w_X.view(1, -1), scales[n].view(1, 1), (1, len(w_X))
        if exponents is not None:
            block = MX_BLOCK
            powers = reference.exponents_of(block_amaxes(w_OI, block, kernel))
            exponents[n : n + 1] = powers
            scales_BC = reference.powers(powers)
        out = codes[n : n + 1]
        figures.append(quantize_into(w_OI, out, scales_BC, block, kernel=kernel))
    return torch.tensor(figures, dtype=torch.float64, device=w_NX.device).reshape(-1, 2)


def workspace_bytes(count: int, numel: int) -> int:
    """Return the bytes of workspace that `quantize_batch_into` needs for `count` weights of `numel`
    elements. The CPU's kernels do not use it."""
    return 16 * count * -(-numel // FIGURES)


def warm_up(dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> None:
    """Compile the kernels for weights of `dtype`, so that a thread can do so early."""
    w_OI, block = torch.ones(32, 32, dtype=dtype, device=device), (1, 32)
    codes = torch.empty(32, 32, dtype=torch.uint8, device=device)
    scales_BC = reference.scales_of(block_amaxes(w_OI, block))
    if dispatch.choose(Kernel.AUTO, w_OI.device) is not Kernel.TRITON:
        quantize_into(w_OI, codes, scales_BC, block)
        return
    workspace = torch.empty(workspace_bytes(32, 32), dtype=torch.uint8, device=device)
    for exponents in (None, torch.empty(32, 1, dtype=torch.uint8, device=device)):
        quantize_batch_into(w_OI, codes, scales_BC.flatten(), workspace, exponents)


def cuda_kernels() -> ModuleType:
    """Return the module of the Triton kernels; imported at first use."""
    return importlib.import_module("fourfold.formats.fp8.cuda")


def _cpu() -> ModuleType:
    """The numba kernels; imported at first use, because importing numba is slow."""
    return importlib.import_module("fourfold.formats.fp8.cpu")


__all__ = [
    "E4M3_MAX",
    "FIGURES",
    "MX_BLOCK",
    "SCALE_MIN",
    "Block",
    "block_amaxes",
    "cuda_kernels",
    "dequantize_into",
    "error_energy",
    "quantize_batch_into",
    "quantize_into",
    "scale_of",
    "warm_up",
    "workspace_bytes",
]
