# SPDX-License-Identifier: Apache-2.0
"""Activations as a W4A4 engine sees them: rounded to NVFP4 and back, in the dtype they came in.

    x_TI  activations [.., in], bf16, fp16 or fp32 (the first two convert exactly)     I = 16·B
    S     `input_scale`, static, fp32: amax of the input site / 2688
    s     block scale, E4M3, dynamic: chosen here for each 16 consecutive inputs

    s  = E4M3(min(fl32(bmax / fl32(6·S)), 448))       to nearest, halves to even; may be 0
    m  = fl32(s·S)
    q  = E2M1(fl32(x / m))                            halves to even, beyond 6 it is 6
    x̂  = fl32(q·m), rounded to the dtype of x

fl32 is IEEE rounding to nearest even, subnormals kept. Where s is 0 (bmax at most 6·S·2⁻¹⁰) the
block becomes zero: dynamic scales are not held to 2⁻⁹, as those of weights are (`reference.py`).
Beyond 2688·S an input saturates, infinities too, as in the engines. A block with a NaN becomes
NaN throughout: an engine makes some number of it, which must not be measured.

**What engines compute.** vLLM, SGLang, TensorRT-LLM and FlashInfer share one kernel
(`cvt_warp_fp16_to_fp4`, and its kin for experts). With g = 1/S it computes

    s = E4M3(g · (bmax · rcp(6))),   q = E2M1(x · rcp(s · rcp(g)))

where rcp is an approximate reciprocal, good to 1 ulp, and subnormals are flushed to 0. That is the
formula above but for the last bits of float32, so s and q differ only where a quotient lies within
a few of these bits of a halfway point. Such quotients are rare, but not as rare as bits are many:
bf16 inputs are coarse, and so are their ratios. With an S from bf16 activations, one block scale
in a thousand goes the other way, to a value as near (`test_activations.py` does both).

Engines multiply q·s exactly and apply S to the sum. x̂ in bf16 is rounded once more, by up to 2⁻⁹
of its size, which is little beside E2M1; in float32 there is no such difference. In fp16 an x̂
beyond 65504 is infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.errors import UsageError
from fourfold.formats import dispatch
from fourfold.formats.dispatch import Kernel
from fourfold.formats.nvfp4 import (
    BLOCK_SIZE,
    FLOAT_DTYPES,
    GLOBAL_SCALE_MAX,
    GLOBAL_SCALE_MIN,
    cuda_kernels,
    e2m1,
    e4m3,
)
from fourfold.formats.nvfp4.arguments import one_number

_ELEMENTS_AT_A_TIME = 1 << 20  # bounds the memory: some 20 bytes for each


def fake_quantize(
    x: Tensor,
    input_scale: Tensor | float,
    out: Tensor | None = None,
    kernel: Kernel | str = "auto",
) -> Tensor:
    """x̂ of the module's head for activations [.., in]: of the same shape, dtype and device.

    input_scale: S, one positive number.
    out: a contiguous tensor like `x` to write into; `x` itself will do. A new one by default.

    No gradient passes. Raises UsageError for a dtype, shape, scale or `out` that does not fit.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = _checked_scale(x, input_scale, out)
    if dispatch.choose(kernel, x.device) is Kernel.TRITON:
        cuda_kernels().fake_quantize(x.detach(), scale, out.detach())
        return out
    width = x.shape[-1]
    x_TI, out_TI = x.detach().reshape(-1, width), out.detach().view(-1, width)
    step = max(1, _ELEMENTS_AT_A_TIME // max(1, width))
    for start in range(0, len(x_TI), step):
        out_TI[start : start + step] = _round(x_TI[start : start + step], scale)
    return out


def _round(x_TI: Tensor, scale: float) -> Tensor:
    """x̂ of some rows, in float32."""
    global_scale = torch.tensor(scale, dtype=torch.float32, device=x_TI.device)
    x_TBK = x_TI.float().view(len(x_TI), -1, BLOCK_SIZE)
    quotient_TB = x_TBK.abs().amax(dim=-1) / (e2m1.E2M1_MAX * global_scale)
    s_TB = quotient_TB.clamp(max=e4m3.E4M3_MAX).to(torch.float8_e4m3fn)
    m_TB1 = (s_TB.float() * global_scale).unsqueeze(-1)
    # A NaN in x is a NaN in m; where m is 0, x/m is infinite or NaN, and q·0 is 0.
    q_TBK = e2m1.decode(e2m1.round_magnitude(x_TBK.abs() / m_TB1))
    return (q_TBK * m_TB1).copysign(x_TBK).view(x_TI.shape)


def _checked_scale(x: Tensor, input_scale: Tensor | float, out: Tensor) -> float:
    """The scale as a float32 number. `UsageError` for what does not fit."""
    if x.dtype not in FLOAT_DTYPES:
        raise UsageError(f"activations of {x.dtype} cannot be rounded; give bf16, fp16 or fp32")
    if x.ndim == 0 or x.shape[-1] % BLOCK_SIZE:
        raise UsageError(
            f"activations of shape {list(x.shape)} cannot be rounded; the last dimension must be a "
            f"multiple of {BLOCK_SIZE}"
        )
    value = float(torch.tensor(one_number(input_scale, "an input_scale"), dtype=torch.float32))
    if not GLOBAL_SCALE_MIN <= value <= GLOBAL_SCALE_MAX:
        raise UsageError(
            f"an input_scale of {value} is outside [{GLOBAL_SCALE_MIN:.3g}, {GLOBAL_SCALE_MAX:.3g}]"
            "; it is the input site's amax / 2688"
        )
    same = (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    if not same or not out.is_contiguous():
        raise UsageError(
            f"out: {out.dtype} {list(out.shape)} on {out.device}; needs a contiguous {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    return value
