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

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from fourfold.errors import SourceError
from fourfold.formats.nvfp4 import BLOCK_SIZE
from fourfold.sources.codecs.base import (
    EncodedWeight,
    NVFP4Codec,
    ReadRows,
    positive_scale,
    presented,
)
from fourfold.storage.safetensors_header import TensorInfo

CODES, BLOCK_SCALE, DIVISOR = "weight_packed", "weight_scale", "weight_global_scale"
INPUT_DIVISOR = "input_global_scale"

_KV_SCALES = ("k_scale", "v_scale", "q_scale")


class NVFP4Packed(NVFP4Codec):
    """Reads NVFP4 weights of linear layers."""

    name = "nvfp4_packed"
    title = "NVFP4 (compressed-tensors)"

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        stems = dict.fromkeys(
            stem
            for stem, _, leaf in (key.rpartition(".") for key in tensors)
            if leaf in (CODES, DIVISOR) and _is_nvfp4(tensors, stem)
        )
        return {f"{stem}.weight": _weight(stem, tensors, config) for stem in stems}

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        from fourfold.sources.codecs import e2m1

        codes, block_scale = (read(name, start, stop) for name in self.row_parts(weight))
        divisor = positive_scale(weight.parts[DIVISOR], read(weight.parts[DIVISOR], 0, 1))
        table = e2m1.E4M3 / np.float32(divisor)
        e2m1.decode(codes, block_scale.view(torch.uint8), table, out, block=BLOCK_SIZE)

    def row_parts(self, weight: EncodedWeight) -> tuple[str, str]:
        return weight.parts[CODES], weight.parts[BLOCK_SCALE]

    def global_scale(self, weight: EncodedWeight, read: ReadRows) -> float:
        return _reciprocal(weight.parts[DIVISOR], read)

    def input_scale(self, weight: EncodedWeight, read: ReadRows) -> float | None:
        return None if weight.input_scale is None else _reciprocal(weight.input_scale, read)

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        return [key for key in tensors if key.rpartition(".")[2] in _KV_SCALES]


def _reciprocal(name: str, read: ReadRows) -> float:
    return float(np.float32(1) / np.float32(positive_scale(name, read(name, 0, 1))))


def _is_nvfp4(tensors: Mapping[str, TensorInfo], stem: str) -> bool:
    """By the global scale, or, if that is lost, by the dtypes of the other parts."""
    infos = [tensors.get(f"{stem}.{part}") for part in (CODES, BLOCK_SCALE)]
    dtypes = [None if info is None else info.dtype for info in infos]
    return f"{stem}.{DIVISOR}" in tensors or dtypes == ["U8", "F8_E4M3"]


def _weight(
    stem: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> EncodedWeight:
    names = {part: f"{stem}.{part}" for part in (CODES, BLOCK_SCALE, DIVISOR)}
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise SourceError(
            f"{missing[0]}: missing, while other parts of that layer are there. Download the "
            "checkpoint again."
        )
    codes, scales, divisor = (tensors[name] for name in names.values())
    rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
    fits = 2 * half % BLOCK_SIZE == 0 and scales.shape == (rows, 2 * half // BLOCK_SIZE)
    dtypes = (codes.dtype, scales.dtype, divisor.dtype)
    if dtypes != ("U8", "F8_E4M3", "F32") or not fits or not rows * half or divisor.numel != 1:
        raise SourceError(
            f"{stem}: codes {codes.dtype} {list(codes.shape)}, block scales {scales.dtype} "
            f"{list(scales.shape)}, global scale {divisor.dtype} {list(divisor.shape)}: not NVFP4. "
            "Download the checkpoint again."
        )
    input_divisor = f"{stem}.{INPUT_DIVISOR}"
    return EncodedWeight(
        presented(codes, f"{stem}.weight", (rows, 2 * half), config),
        names,
        input_divisor if input_divisor in tensors else None,
    )
