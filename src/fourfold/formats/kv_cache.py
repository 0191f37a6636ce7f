# SPDX-License-Identifier: Apache-2.0
"""Keys and values as an engine with a quantized KV cache reads them again.

    x   keys after rotary embedding, or values: [.., head size], bf16, fp16 or fp32
    S   `k_scale` or `v_scale`, fp32; 1 where a checkpoint has none

    FP8     x̂ = fl32(E4M3(min(max(fl32(x / S), −448), 448)) · S), rounded to the dtype of x
    NVFP4   as activations (`nvfp4/activations.py`) with the input scale 1: a block scale for each
            16 values of a head

Engines apply S to the sums instead of to every product, so their sums differ in the last bits. A
NaN stays one. Some attention kernels also round queries and probabilities to FP8 (FlashAttention 3;
trtllm-gen, which is what reads NVFP4 on B200): this is not done here.

NVFP4 is defined for S = 1 alone. For others engines disagree: SGLang multiplies the scale that it
reads by 6 on B200 and takes it as it is on RTX GPUs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fourfold.formats.nvfp4.activations import fake_quantize
from fourfold.formats.nvfp4.e4m3 import E4M3_MAX

KVFormat = Literal["fp8", "nvfp4"]
"""The formats of KV caches, by their names in recipes."""


def round_states(states: Tensor, fmt: KVFormat, scale: float = 1.0) -> Tensor:
    """Return keys or values [.., head size] as they are read from a cache, in their own dtype.

    Args:
        states: bf16, fp16 or fp32.
        fmt: The format of the cache.
        scale: `k_scale` or `v_scale`.
    """
    if fmt == "nvfp4":
        assert scale == 1.0
        return fake_quantize(states, 1.0)
    divisor = torch.tensor(scale, dtype=torch.float32, device=states.device)
    codes = (states.detach().float() / divisor).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * divisor).to(states.dtype)
