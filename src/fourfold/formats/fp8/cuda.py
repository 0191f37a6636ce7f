# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of FP8, called with tensors; as `nvfp4.cuda`, whose lock it takes.

Import this module only through the package, at first use: it imports Triton.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fourfold.formats.fp8 import FIGURES, kernels_cuda
from fourfold.formats.nvfp4 import sweep
from fourfold.formats.nvfp4.cuda import INTERPRETED, grids, launching, own

_MANY = 1 << 20
"""Weights of a tile where the kernel is interpreted: NumPy has no threads, but wide vectors."""


def quantize(
    w_NX: Tensor,
    codes: Tensor,
    exponents: Tensor | None,
    scales: Tensor,
    workspace: Tensor,
) -> Tensor:
    """Fill uint8 codes [N, X] of N weights with a float32 scale each; or, with `exponents` to fill,
    uint8 [N, X/32], of weights in MXFP8. workspace: `fp8.workspace_bytes` of it.

    Returns Σ(w − q·s)² and Σw², float64 [N, 2], which are not finite where a weight is not.
    """
    w_NX = w_NX.detach().contiguous()
    width = 16 if exponents is None else 32
    count, blocks = len(w_NX), w_NX.shape[1] // width
    tile = FIGURES // width
    if INTERPRETED:
        tile = max(tile, min(_MANY // width, triton.next_power_of_2(blocks)))
    programs = triton.cdiv(blocks, tile)
    errors, energies = workspace.view(torch.float64).view(2, count, -1)
    bits = w_NX.view(torch.int32 if w_NX.dtype == torch.float32 else torch.int16)
    filled = own(codes, 1)
    powers = filled if exponents is None else own(exponents, 1)
    with launching(w_NX, kernels_cuda.quantize_kernel):
        for some in grids(count):
            kernels_cuda.quantize_kernel[(programs, some.stop - some.start)](
                bits[some],
                scales[some],
                filled[some],
                powers[some],
                errors[some],
                energies[some],
                blocks,
                errors.shape[1],
                KIND=sweep.KINDS[w_NX.dtype],
                MX=exponents is not None,
                WIDTH=width,
                TILE=tile,
                enable_fp_fusion=False,
            )
    for buffer, out in ((filled, codes), (powers, exponents)):
        if out is not None and buffer is not out:
            out.copy_(buffer)
    sums = (figures[:, :programs].sum(dim=1) for figures in (errors, energies))
    return torch.stack(tuple(sums), dim=1)
