# SPDX-License-Identifier: Apache-2.0
"""NVFP4 tensors: quantize, dequantize, and the passes over weights that go with them. Nothing here
knows of checkpoints, models or recipes, and nothing is imported but `errors`.

    w ≈ q · s · S      q  E2M1 code, two to a byte          uint8          [..., in/2]
                       s  block scale of 16 inputs, E4M3    float8_e4m3fn  [..., in/16]
                       S  global scale                      float32        scalar

The definition of codes and scales is the head of `reference.py`; every kernel gives its bytes.

**Global scale.** S = fl32(amax / 2688), 2688 = 6·448, the largest code times the largest block
scale. It is held to [2⁻¹¹⁷, fl32(FLT_MAX/2688)]: at the lower end the smallest product s·S is
2⁻¹²⁶, the smallest normal float32, so that no scale is ever subnormal or zero and s·S keeps its
24 bits; at the upper end 6·448·S is still finite. A tensor whose amax lies below 1.6e-32 gets
S = 2⁻¹¹⁷, and an all-zero tensor S = 1.

Shapes: O rows, I inputs, B = I/16 blocks.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fourfold.errors import NonFiniteError, UsageError
from fourfold.formats import dispatch
from fourfold.formats.dispatch import Kernel
from fourfold.formats.nvfp4 import reference, sweep
from fourfold.formats.nvfp4.arguments import one_number

BLOCK_SIZE = reference.BLOCK_SIZE
_BLOCK_BYTES = BLOCK_SIZE // 2
_GLOBAL_SCALE = "a global scale"
GLOBAL_SCALE_MIN = 2.0**-117
GLOBAL_SCALE_MAX = float(np.finfo(np.float32).max / np.float32(2688.0))

FLOAT_DTYPES = tuple(sweep.KINDS)


class ScaleAlgorithm(StrEnum):
    """The ways to choose block scales that the kernels know."""

    MAX = "max"
    MSE = "mse"


_NUMBERS = {ScaleAlgorithm.MAX: sweep.MAX, ScaleAlgorithm.MSE: sweep.MSE}


class QuantizeStats(NamedTuple):
    """Figures of one quantize pass, for reports: their last digits depend on the kernel."""

    sum_sq_err: float
    """Σ (w − q·s·S)² over the weights."""
    sum_sq_w: float
    """Σ w²."""


@dataclass(frozen=True)
class BlockScaleCensus:
    """Counts of block scales that engines do not expect."""

    zero: int
    nan: int
    negative: int
    subnormal: int


@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantized weight [..., in]."""

    codes: Tensor
    """uint8 [..., in/2]; the low nibble is the even element."""
    block_scale: Tensor
    """float8_e4m3fn [..., in/16]."""
    global_scale: Tensor
    """float32 scalar."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight: [..., in]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [..., in]: fl32(q · fl32(s·S)), rounded to `dtype`."""
        return dequantize(self.codes, self.block_scale, self.global_scale, dtype)


def amax(weight: Tensor, *, name: str = "weight", kernel: Kernel | str = "auto") -> float:
    """Return the largest magnitude of a bf16, fp16 or fp32 tensor of any shape; 0.0 if it is empty.

    Raises:
        NonFiniteError: The weight holds NaN or Inf; the message names the tensor and the position.
    """
    _check_dtype(weight, name)
    weight = weight.detach()
    if weight.numel() == 0:
        return 0.0
    if dispatch.choose(kernel, weight.device) is Kernel.NUMBA:
        largest = float(_cpu().amax(weight))
    else:
        largest = float(amaxes(weight.reshape(1, -1), kernel))
    if not math.isfinite(largest):
        _raise_non_finite(weight, name)
    return largest


def global_scale(amax: float) -> float:
    """Return fl32(amax/2688) as a Python float, held to its range (see the module's head).

    Raises:
        UsageError: `amax` is negative or not finite.
    """
    amax = one_number(amax, "an amax")
    if not (math.isfinite(amax) and amax >= 0.0):
        raise UsageError(
            f"an amax of {amax} has no global scale: it must be finite and not negative"
        )
    if amax == 0.0:
        return 1.0
    scale = float(np.float32(amax) / np.float32(2688.0))
    return min(max(scale, GLOBAL_SCALE_MIN), GLOBAL_SCALE_MAX)


def quantize(
    weight: Tensor,
    *,
    scale: ScaleAlgorithm | str = ScaleAlgorithm.MAX,
    global_scale: Tensor | float | None = None,
    name: str = "weight",
    kernel: Kernel | str = "auto",
) -> NVFP4Tensor:
    """Quantize a bf16, fp16 or fp32 weight [..., in], with `in` a multiple of 16.

    Args:
        weight: The weight.
        scale: How block scales are chosen.
        global_scale: The scale of the weight's scale group; by default its own amax / 2688.
        name: The weight's name, for messages.
        kernel: The kernels to use; see `dispatch`.

    Raises:
        NonFiniteError: The weight holds NaN or Inf.
        UsageError: The dtype, shape, global scale or name of a kernel is invalid.
    """
    largest = amax(weight, name=name, kernel=kernel)
    if global_scale is None:
        global_scale = _own_global_scale(largest)
    width, weight = _check_width(weight, name), weight.detach()
    lead = weight.shape[:-1]
    codes = torch.empty(*lead, width // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*lead, width // BLOCK_SIZE, dtype=torch.uint8, device=weight.device)
    rows = math.prod(lead)
    quantize_into(
        weight.reshape(rows, width),
        codes.view(rows, width // 2),
        scales.view(rows, width // BLOCK_SIZE),
        scale=scale,
        global_scale=global_scale,
        name=name,
        kernel=kernel,
    )
    s_tensor = torch.tensor(float(global_scale), dtype=torch.float32, device=weight.device)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), s_tensor)


def quantize_into(
    weight_OI: Tensor,
    codes_out: Tensor | np.ndarray[Any, Any],
    block_scale_out: Tensor | np.ndarray[Any, Any],
    *,
    scale: ScaleAlgorithm | str,
    global_scale: Tensor | float,
    name: str = "weight",
    kernel: Kernel | str = "auto",
) -> QuantizeStats:
    """Quantize [O, I] into uint8 buffers [O, I/2] and [O, I/16].

    The buffers may be views into larger ones (of any alignment), with contiguous rows. Only scratch
    memory is allocated, no thread is started, and the numba kernels release the GIL, so that ranges
    of rows can be quantized from a thread pool.

    Raises:
        NonFiniteError: The weight holds NaN or Inf. The buffers then hold nothing of use.
    """
    algorithm = _parse_algorithm(scale)
    s_value = _check_global_scale(global_scale, name)
    _check_width(weight_OI, name)
    weight_OI = weight_OI.detach()
    codes, scales = torch.as_tensor(codes_out), torch.as_tensor(block_scale_out)
    _check_buffer(codes, weight_OI, 2, "codes_out")
    _check_buffer(scales, weight_OI, BLOCK_SIZE, "block_scale_out")
    if weight_OI.numel() == 0:
        return QuantizeStats(0.0, 0.0)
    error = energy = math.nan
    match dispatch.choose(kernel, weight_OI.device):
        case Kernel.NUMBA:
            error, energy, _ = _cpu().quantize(weight_OI, codes, scales, s_value, algorithm)
        case Kernel.TRITON:
            error, energy = cuda_kernels().quantize_matrix(
                weight_OI, codes, scales, s_value, algorithm
            )
    if math.isfinite(error) and math.isfinite(energy):
        return QuantizeStats(error, energy)
    if not bool(torch.isfinite(weight_OI).all()):
        _raise_non_finite(weight_OI, name)
    parts = reference.quantize(weight_OI, s_value, mse=algorithm == sweep.MSE)
    codes.copy_(parts[0])
    scales.copy_(parts[1])
    return QuantizeStats(*error_energy(weight_OI, *parts, s_value, Kernel.REFERENCE))


def amaxes(weight_NX: Tensor, kernel: Kernel | str = "auto") -> Tensor:
    """Return the largest magnitude of each of N weights `[N, ...]`, without waiting for the device.

    Returns:
        float32 [N] on the weights' device; not finite where a weight holds NaN or Inf.
    """
    _check_dtype(weight_NX, "weight")
    w_NX = weight_NX.detach().flatten(1)
    if w_NX.numel() == 0:
        return w_NX.new_zeros(len(w_NX), dtype=torch.float32)
    if dispatch.choose(kernel, w_NX.device) is Kernel.TRITON and w_NX.shape[1] % BLOCK_SIZE == 0:
        return cast(Tensor, cuda_kernels().amaxes(w_NX))
    return w_NX.abs().amax(dim=1).float()


def quantize_batch_into(
    weight_NX: Tensor,
    codes_out: Tensor,
    block_scale_out: Tensor,
    *,
    scale: ScaleAlgorithm | str,
    global_scales: Tensor,
    workspace: Tensor | None = None,
    kernel: Kernel | str = "auto",
) -> Tensor:
    """Quantize N weights [N, 16·B], each with its own global scale, into uint8 buffers [N, 8·B] and
    [N, B]; all of them contiguous and on one device, which is not waited for.

    Args:
        weight_NX: The weights.
        codes_out: The buffer for the codes.
        block_scale_out: The buffer for the block scales.
        scale: How block scales are chosen.
        global_scales: float32 [N], each within the range of `global_scale`. That is not checked,
            because checking would wait for the device.
        workspace: uint8, `workspace_bytes` of it, 8-byte aligned; allocated by default.
        kernel: The kernels to use; see `dispatch`.

    Returns:
        Σ(w − q·s·S)² and Σw² of each weight, float64 [N, 2]. Where one of them is not finite, the
        bytes of that weight are void: it holds NaN or Inf, or is far beyond its global scale.
        `quantize_into` quantizes it, or raises the error.
    """
    algorithm = _parse_algorithm(scale)
    _check_width(weight_NX, "weight")
    _check_buffer(codes_out, weight_NX, 2, "codes_out")
    _check_buffer(block_scale_out, weight_NX, BLOCK_SIZE, "block_scale_out")
    shape, dtype = getattr(global_scales, "shape", None), getattr(global_scales, "dtype", None)
    if shape != (len(weight_NX),) or dtype != torch.float32:
        raise UsageError(
            f"global_scales: needs float32 [{len(weight_NX)}], one for each weight, got "
            f"{dtype} {shape}"
        )
    _check_workspace(workspace, weight_NX)
    w_NX = weight_NX.detach()
    if w_NX.numel() and dispatch.choose(kernel, w_NX.device) is Kernel.TRITON:
        parts = w_NX, codes_out, block_scale_out, global_scales
        return cast(Tensor, cuda_kernels().quantize(*parts, algorithm, workspace))
    figures = [
        quantize_into(
            w_NX[n : n + 1],
            codes_out[n : n + 1],
            block_scale_out[n : n + 1],
            scale=scale,
            global_scale=float(global_scales[n]),
            kernel=kernel,
        )
        for n in range(len(w_NX))
    ]
    return torch.tensor(figures, dtype=torch.float64, device=w_NX.device).reshape(-1, 2)


def workspace_bytes(count: int, numel: int) -> int:
    """Return the bytes of workspace that `quantize_batch_into` needs for `count` weights of `numel`
    elements: two float64 sums for every 32 blocks. The CPU's kernels do not use it.
    """
    return 16 * count * -(-numel // (32 * BLOCK_SIZE))


def dequantize(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | float,
    dtype: torch.dtype = torch.float32,
    kernel: Kernel | str = "auto",
) -> Tensor:
    """Return the weight [..., in] of codes [..., in/2] and block scales [..., in/16].

    It is fl32(q · fl32(s·S)), rounded to `dtype`, for any bytes and any global scale, NaN included.
    """
    _check_pair(codes, block_scale)
    direct = dtype if dtype == torch.bfloat16 else torch.float32
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    out = torch.empty(shape, dtype=direct, device=codes.device)
    dequantize_into(codes, block_scale, global_scale, out, kernel)
    return out.to(dtype)


def dequantize_into(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | float,
    out: Tensor,
    kernel: Kernel | str = "auto",
) -> None:
    """`dequantize` into a contiguous float32 or bf16 tensor [..., in]. Releases the GIL."""
    _check_pair(codes, block_scale)
    if out.shape != (*codes.shape[:-1], codes.shape[-1] * 2) or not out.is_contiguous():
        raise UsageError(f"out: {list(out.shape)} does not fit codes {list(codes.shape)}")
    if out.dtype not in (torch.float32, torch.bfloat16) or out.device != codes.device:
        raise UsageError(
            f"out: {out.dtype} on {out.device}; give float32 or bfloat16 on {codes.device}"
        )
    scale_bytes, s_value = block_scale.view(torch.uint8), one_number(global_scale, _GLOBAL_SCALE)
    match dispatch.choose(kernel, codes.device):
        case Kernel.NUMBA:
            _cpu().dequantize(codes, scale_bytes, s_value, out)
        case Kernel.TRITON:
            cuda_kernels().dequantize(codes, scale_bytes, s_value, out)
        case _:
            scale = scale_bytes.view(torch.float8_e4m3fn)
            out.copy_(reference.dequantize(codes, scale, s_value))


def error_energy(
    weight_OI: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | float,
    kernel: Kernel | str = "auto",
) -> tuple[float, float]:
    """Return Σ(w − q·s·S)² and Σw², computed in one pass with float64 sums."""
    _check_dtype(weight_OI, "weight")
    _check_pair(codes, block_scale)
    if weight_OI.ndim != 2 or weight_OI.shape != (codes.shape[0], codes.shape[-1] * 2):
        raise UsageError(
            f"a weight {list(weight_OI.shape)} and codes {list(codes.shape)} do not belong together"
        )
    weight_OI = weight_OI.detach()
    if dispatch.choose(kernel, weight_OI.device) is Kernel.NUMBA:
        scales = block_scale.view(torch.uint8)
        s_value = one_number(global_scale, _GLOBAL_SCALE)
        error, energy = _cpu().error_energy(weight_OI, codes, scales, s_value)
        return float(error), float(energy)
    w_OI = weight_OI.double()
    d_OI = w_OI - dequantize(codes, block_scale, global_scale, kernel=kernel).double()
    return float((d_OI * d_OI).sum()), float((w_OI * w_OI).sum())


def block_scale_census(block_scale: Tensor) -> BlockScaleCensus:
    """Count the block scales (float8_e4m3fn or their bytes) that are zero (of either sign), NaN,
    negative (sign bit set, not NaN), or subnormal (of either sign)."""
    byte = block_scale.view(torch.uint8)
    magnitude = byte & 0x7F
    return BlockScaleCensus(
        zero=int((magnitude == 0).sum()),
        nan=int((magnitude == 0x7F).sum()),
        negative=int(((byte >= 0x80) & (byte != 0xFF)).sum()),
        subnormal=int(((magnitude > 0) & (magnitude < 8)).sum()),
    )


def warm_up(
    dtype: torch.dtype = torch.bfloat16,
    scale: ScaleAlgorithm | str = ScaleAlgorithm.MSE,
    kernel: Kernel | str = "auto",
    device: torch.device | str = "cpu",
) -> None:
    """Compile the kernels for weights of `dtype`, so that a thread can do so early.

    Triton's kernels on a CUDA device are also timed with several tile sizes; the fastest is used
    from then on.
    """
    weight = torch.ones(BLOCK_SIZE, BLOCK_SIZE, dtype=dtype, device=device)
    if dispatch.choose(kernel, weight.device) is Kernel.TRITON:
        cuda_kernels().tune(weight.device, dtype, _parse_algorithm(scale))
    tensor = quantize(weight, scale=scale, kernel=kernel)
    error_energy(weight, tensor.codes, tensor.block_scale, tensor.global_scale, kernel)


_own_global_scale = global_scale


def _cpu() -> ModuleType:
    """The numba kernels; imported at first use, because importing numba is slow."""
    return importlib.import_module("fourfold.formats.nvfp4.cpu")


def cuda_kernels() -> ModuleType:
    """Return the module of the Triton kernels; imported at first use."""
    return importlib.import_module("fourfold.formats.nvfp4.cuda")


def _raise_non_finite(weight: Tensor, name: str) -> None:
    flat = int((~torch.isfinite(weight)).flatten().to(torch.uint8).argmax())
    position = [int(i) for i in np.unravel_index(flat, tuple(weight.shape))]
    value = float(weight[tuple(position)])
    raise NonFiniteError(
        f"{name}: {value} at {position} (shape {list(weight.shape)}); a weight "
        "must be finite: repair the source checkpoint"
    )


def _parse_algorithm(scale: ScaleAlgorithm | str) -> int:
    """The number that kernels know an algorithm by."""
    try:
        return _NUMBERS[ScaleAlgorithm(scale)]
    except ValueError:
        names = " | ".join(ScaleAlgorithm)
        raise UsageError(f"unknown scale algorithm {scale!r}; choose {names}") from None


def _check_global_scale(global_scale: Tensor | float, name: str) -> float:
    value = float(np.float32(one_number(global_scale, f"{name}: a global scale")))
    if not GLOBAL_SCALE_MIN <= value <= GLOBAL_SCALE_MAX:
        raise UsageError(
            f"{name}: a global scale of {value} is outside "
            f"[{GLOBAL_SCALE_MIN:.3g}, {GLOBAL_SCALE_MAX:.3g}]; "
            "global_scale(amax) gives one that fits"
        )
    return value


def _check_dtype(weight: Tensor, name: str) -> None:
    dtype = getattr(weight, "dtype", type(weight).__name__)
    if dtype not in FLOAT_DTYPES:
        raise UsageError(
            f"{name}: {dtype} is not a weight that can be quantized; "
            "give bfloat16, float16 or float32"
        )


def _check_width(weight: Tensor, name: str) -> int:
    _check_dtype(weight, name)
    if weight.ndim == 0 or weight.shape[-1] % BLOCK_SIZE:
        raise UsageError(
            f"{name}: shape {list(weight.shape)} cannot be quantized; the last "
            f"dimension must be a multiple of {BLOCK_SIZE}"
        )
    return weight.shape[-1]


def _check_pair(codes: Tensor, block_scale: Tensor) -> None:
    fits = codes.ndim > 0 and codes.shape[-1] % _BLOCK_BYTES == 0 and codes.itemsize == 1
    fits &= block_scale.itemsize == 1 and codes.device == block_scale.device
    if not fits or block_scale.shape != (*codes.shape[:-1], codes.shape[-1] // _BLOCK_BYTES):
        raise UsageError(
            f"codes {codes.dtype} {list(codes.shape)} and block scales {block_scale.dtype} "
            f"{list(block_scale.shape)} do not belong together: bytes are needed, and one scale "
            f"for {_BLOCK_BYTES} bytes of codes"
        )


def _check_workspace(workspace: Tensor | None, weight_NX: Tensor) -> None:
    """Check the workspace: kernels write into it without checks."""
    if workspace is None:
        return
    wanted = workspace_bytes(*weight_NX.shape)
    fits = workspace.dtype == torch.uint8 and list(workspace.shape) == [wanted]
    fits &= workspace.is_contiguous() and workspace.device == weight_NX.device
    if not fits or workspace.data_ptr() % 8:
        raise UsageError(
            f"workspace: needs uint8 [{wanted}] on {weight_NX.device}, contiguous and at an "
            f"address that 8 divides, got {workspace.dtype} {list(workspace.shape)} on "
            f"{workspace.device}"
        )


def _check_buffer(buffer: Tensor, weight_OI: Tensor, per_byte: int, argument: str) -> None:
    shape = [weight_OI.shape[0], weight_OI.shape[1] // per_byte] if weight_OI.ndim == 2 else None
    fits = buffer.dtype == torch.uint8 and list(buffer.shape) == shape
    if not fits or (buffer.shape[1] > 1 and buffer.stride(1) != 1):
        raise UsageError(
            f"{argument}: needs uint8 {shape} with contiguous rows for a 2-D weight "
            f"{list(weight_OI.shape)}, got {buffer.dtype} {list(buffer.shape)} of strides "
            f"{buffer.stride()}"
        )
    if buffer.device != weight_OI.device:
        raise UsageError(f"{argument} is on {buffer.device}, the weight on {weight_OI.device}")
