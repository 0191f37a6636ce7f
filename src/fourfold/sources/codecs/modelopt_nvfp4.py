# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights in the ModelOpt layout, as fourfold and NVIDIA's ModelOpt write them.

<linear>.weight          U8       [out, in/2]   two E2M1 codes a byte
<linear>.weight_scale    F8_E4M3  [out, in/16]  block scales
<linear>.weight_scale_2  F32      []            global scale
<linear>.input_scale     F32      []            for quantized activations only
"""

from __future__ import annotations

import torch

from fourfold.formats import nvfp4
from fourfold.layouts.modelopt import BLOCK_SCALE, CODES, GLOBAL_SCALE, INPUT_SCALE
from fourfold.sources.codecs.base import EncodedWeight, ReadRows, positive_scale
from fourfold.sources.codecs.nvfp4 import NVFP4Codec


class ModelOptNVFP4(NVFP4Codec):
    """Reads NVFP4 weights of linear layers."""

    name = "modelopt_nvfp4"
    title = "NVFP4 (ModelOpt)"
    leaves = CODES, BLOCK_SCALE, GLOBAL_SCALE
    input_leaf = INPUT_SCALE

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        codes, block_scale = self.read_rows(weight, start, stop, read)
        global_scale = self.global_scale(weight, read)
        if out.dtype == torch.float16:
            out.copy_(nvfp4.dequantize(codes, block_scale, global_scale))
        else:
            nvfp4.dequantize_into(codes, block_scale, global_scale, out)

    def multiplier(self, name: str, read: ReadRows) -> float:
        return positive_scale(name, read(name, 0, 1))
