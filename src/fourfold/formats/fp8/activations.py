# SPDX-License-Identifier: Apache-2.0
"""Activations as engines see them before FP8 matrix products: rounded to E4M3 and back.

    x_TI  activations [.., in], bf16, fp16 or fp32
    s     the scale: static, of a token, of 128 inputs of it, or a power of two for 32 inputs
    x̂  = fl32(E4M3(fl32(x/s))·s), rounded to the dtype of x; beyond 448·s it is ±448·s

    static     `input_scale`, fl32(amax of the input site / 448)
    token      max(fl32(amax/448), fl32(1/(448·512)))      amax is that of the token
    128        fl32(max(amax, 1e-10)/448)                  amax is that of the 128 inputs
    MX         the smallest 2^e with amax ≤ 448·2^e        amax is that of the 32 inputs

Both lower bounds are those of vLLM. Engines multiply by a reciprocal of s where x/s is
divided here: the last bit of a quotient may differ, and with it, rarely, a code, to a value as
near. DeepGEMM on Blackwell rounds the scales of 128 inputs up to powers of two, which is not done
here. A scale of 0 or NaN is never made: an input that is NaN, or infinite under a dynamic scale,
makes NaN of all that shares its scale; an engine makes some number of it, which must not be
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fourfold.errors import UsageError
from fourfold.formats.fp8 import reference
from fourfold.formats.nvfp4 import FLOAT_DTYPES
from fourfold.formats.nvfp4.arguments import one_number
from fourfold.formats.nvfp4.e4m3 import E4M3_MAX

_ELEMENTS_AT_A_TIME = 1 << 20  # bounds the memory: some 12 bytes for each
_TOKEN_MIN, _GROUP_MIN = 1 / (E4M3_MAX * 512), 1e-10

Scales = Callable[[Tensor], Tensor]
"""Scales of amaxes."""


def token_scales(amaxes: Tensor) -> Tensor:
    """Return the scales of whole tokens."""
    return (amaxes / _divisor(amaxes)).clamp(min=_TOKEN_MIN)


def group_scales(amaxes: Tensor) -> Tensor:
    """Return the scales of groups of 128 inputs."""
    return amaxes.clamp(min=_GROUP_MIN) / _divisor(amaxes)


def mx_scales(amaxes: Tensor) -> Tensor:
    """Return the powers of two of groups of 32 inputs; NaN where an input is not finite."""
    is_finite = amaxes.isfinite()
    powers = reference.powers(reference.exponents_of(torch.where(is_finite, amaxes, 0.0)))
    return torch.where(is_finite, powers, torch.nan)


def round_static(x: Tensor, input_scale: Tensor | float | None, out: Tensor | None) -> Tensor:
    """Return x̂ of the module's head under one scale, a positive number."""
    scale = one_number(input_scale, "an input_scale")
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"an input_scale of {scale}: it must be positive and finite")
    scale_1 = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return _round(x, 1, lambda _: scale_1, out)


def round_dynamic(x: Tensor, group: int | None, scales: Scales, out: Tensor | None) -> Tensor:
    """Return x̂ of the module's head under the `scales` of `group` inputs, or of whole tokens."""
    return _round(x, group or max(1, x.shape[-1]), scales, out)


def _round(x: Tensor, group: int, scales: Scales, out: Tensor | None) -> Tensor:
    _check(x, group)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    x_TI, out_TI = x.detach().reshape(-1, width), out.detach().view(-1, width)
    step = max(1, _ELEMENTS_AT_A_TIME // max(1, width))
    for start in range(0, len(x_TI), step):
        x_TBK = x_TI[start : start + step].float()
        x_TBK = x_TBK.view(len(x_TBK), -1, group)
        s_TB1 = scales(x_TBK.abs().amax(dim=-1, keepdim=True))
        rounded = reference.encode(x_TBK / s_TB1).float() * s_TB1
        out_TI[start : start + step] = rounded.flatten(1)
    return out


def _check(x: Tensor, group: int) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise UsageError(f"activations of {x.dtype} cannot be rounded; give bf16, fp16 or fp32")
    if x.ndim == 0 or x.shape[-1] % group:
        raise UsageError(
            f"activations of shape {list(x.shape)} cannot be rounded; the last dimension must be a "
            f"multiple of {group}"
        )


def _divisor(amaxes: Tensor) -> Tensor:
    """448 on the device: see `nvfp4.reference`."""
    return torch.tensor(E4M3_MAX, dtype=torch.float32, device=amaxes.device)
