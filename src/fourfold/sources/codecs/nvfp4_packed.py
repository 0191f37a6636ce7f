# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights in the layout of compressed-tensors.

    <linear>.weight_packed        U8       [out, in/2]   two E2M1 codes a byte
    <linear>.weight_scale         F8_E4M3  [out, in/16]  block scales
    <linear>.weight_global_scale  F32      [1]           the reciprocal of the global scale
    <linear>.input_global_scale   F32      [1]           likewise, for quantized activations only

A value is code · (block scale / weight_global_scale), the quotient in float32, as the library
computes it.
"""

from __future__ import annotations

import numpy as np
import torch

from fourfold.errors import DamagedError
from fourfold.formats.nvfp4 import BLOCK_SIZE
from fourfold.sources.codecs.base import REMEDY, EncodedWeight, ReadRows, positive_scale
from fourfold.sources.codecs.nvfp4 import NUMBER, NVFP4Codec

FLOAT32_MAX = float(np.finfo(np.float32).max)


class NVFP4Packed(NVFP4Codec):
    """Reads NVFP4 weights of linear layers."""

    name = "nvfp4_packed"
    title = "NVFP4 (compressed-tensors)"
    leaves = "weight_packed", "weight_scale", "weight_global_scale"
    input_leaf = "input_global_scale"

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        from fourfold.sources.codecs import e2m1

        codes, block_scale = self.read_rows(weight, start, stop, read)
        divisor = _divisor(weight.parts[NUMBER], read)
        table = e2m1.E4M3 / np.float32(divisor)
        e2m1.decode(codes, block_scale.view(torch.uint8), table, out, block=BLOCK_SIZE)

    def multiplier(self, name: str, read: ReadRows) -> float:
        return float(np.float32(1) / np.float32(_divisor(name, read)))


def _divisor(name: str, read: ReadRows) -> float:
    """A stored number, whose reciprocal must be a float32, too."""
    divisor = positive_scale(name, read(name, 0, 1))
    if 1 / divisor > FLOAT32_MAX:
        raise DamagedError(f"{name}: {divisor:.6g}; its reciprocal is infinite. {REMEDY}")
    return divisor
