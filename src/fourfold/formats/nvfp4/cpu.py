# SPDX-License-Identifier: Apache-2.0
"""The numba kernels, called with tensors: turns these into addresses, strides and kinds.

Import this module only through `nvfp4`, at first use: it imports numba.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fourfold.formats.nvfp4 import simd as lanes
from fourfold.formats.nvfp4 import stream_cpu, sweep, sweep_cpu

_INF_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
_INTEGERS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
_E4M3_VALUES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def amax(weight: Tensor) -> float:
    """The largest magnitude of a tensor that is not empty; Inf if it holds Inf or NaN.

    The bits of floats order like their magnitudes, NaN and Inf above: of those without a sign the
    largest signed integer tells, of those with one the largest unsigned. NumPy's integer maxima run
    at the speed of the cache (40 GB/s; a compiled loop over both at once reached 6.6).
    """
    signed, unsigned = _INTEGERS[weight.element_size()]
    bits = weight.detach().view(signed).numpy()
    sign = 1 << (8 * weight.element_size() - 1)
    with_sign = int(bits.view(unsigned).max()) - sign
    largest = max(int(bits.max()), with_sign, 0)
    if largest >= _INF_BITS[weight.dtype]:
        return math.inf
    return float(torch.from_numpy(np.array([largest], unsigned)).view(weight.dtype))


def quantize(
    weight_OI: Tensor, codes: Tensor, scales: Tensor, global_scale: float, algorithm: int
) -> tuple[float, float, int]:
    """Σ(w − q·s·S)², Σw² and the number of blocks settled by the definition; fills the buffers.

    If a sum is not finite, the bytes are void: NaN or Inf in the weight, or a weight so
    far beyond 6·448·S that float32 cannot tell the losses apart.
    """
    w_OI = _rows(weight_OI)
    rows, width = w_OI.shape
    blocks = width // lanes.BLOCK_SIZE
    strides = _stride(w_OI), _stride(codes), _stride(scales)
    if strides == (width, width // 2, blocks):
        rows, blocks = 1, rows * blocks
    exponent = math.frexp(global_scale)[1] - 1
    error, energy, settled = sweep_cpu.quantize_kernel(
        algorithm,
        sweep.KINDS[w_OI.dtype],
        rows,
        blocks,
        w_OI.data_ptr(),
        strides[0] * w_OI.element_size(),
        codes.data_ptr(),
        strides[1],
        scales.data_ptr(),
        strides[2],
        np.float32(global_scale),
        np.float32(2.0**-exponent),
    )
    return error * 4.0**exponent, energy * 4.0**exponent, settled


def dequantize(
    codes: Tensor,
    scales: Tensor,
    global_scale: float,
    out: Tensor,
    values: npt.NDArray[np.float32] = _E4M3_VALUES,
) -> None:
    """Fill `out`, float32 or bf16, contiguous. `scales` are bytes, which stand for `values`."""
    codes, scales = codes.contiguous(), scales.contiguous()
    stream_cpu.dequantize_kernel(
        sweep.KINDS[out.dtype],
        scales.numel(),
        codes.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        values,
        np.float32(global_scale),
    )


def error_energy(
    weight_OI: Tensor, codes: Tensor, scales: Tensor, global_scale: float
) -> tuple[float, float]:
    """Σ(w − q·s·S)² and Σw²."""
    w_OI, codes, scales = _rows(weight_OI), _rows(codes), _rows(scales)
    error, energy = stream_cpu.error_kernel(
        sweep.KINDS[w_OI.dtype],
        w_OI.shape[0],
        scales.shape[1],
        w_OI.data_ptr(),
        _stride(w_OI) * w_OI.element_size(),
        codes.data_ptr(),
        _stride(codes),
        scales.data_ptr(),
        _stride(scales),
        _E4M3_VALUES,
        np.float32(global_scale),
    )
    return error, energy


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, with its rows contiguous: a copy only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _stride(tensor: Tensor) -> int:
    """Elements from row to row; of a single row, its width."""
    return tensor.shape[1] if tensor.shape[0] <= 1 else tensor.stride(0)
