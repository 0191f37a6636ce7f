# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights in the ModelOpt layout, as fourfold and NVIDIA's ModelOpt write them.

    <linear>.weight          U8       [out, in/2]   two E2M1 codes a byte
    <linear>.weight_scale    F8_E4M3  [out, in/16]  block scales
    <linear>.weight_scale_2  F32      []            global scale
    <linear>.input_scale     F32      []            for quantized activations only

Rows of a weight are decoded from the same rows of the codes and block scales.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fourfold.errors import SourceError
from fourfold.formats import nvfp4
from fourfold.layouts.modelopt import (
    BLOCK_SCALE,
    CODES,
    GLOBAL_SCALE,
    INPUT_SCALE,
    K_SCALE,
    V_SCALE,
)
from fourfold.sources.codecs.base import (
    EncodedWeight,
    NVFP4Codec,
    ReadRows,
    positive_scale,
    presented,
)
from fourfold.storage.safetensors_header import TensorInfo


class ModelOptNVFP4(NVFP4Codec):
    """Reads NVFP4 weights of linear layers."""

    name = "modelopt_nvfp4"
    title = "NVFP4 (ModelOpt)"

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        linears = dict.fromkeys(
            stem
            for stem, _, leaf in (key.rpartition(".") for key in tensors)
            if leaf in (GLOBAL_SCALE, BLOCK_SCALE) and _is_nvfp4(tensors, stem)
        )
        return {f"{linear}.{CODES}": _weight(linear, config, tensors) for linear in linears}

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        codes = read(weight.parts[CODES], start, stop)
        block_scales = read(weight.parts[BLOCK_SCALE], start, stop)
        global_scale = self.global_scale(weight, read)
        if out.dtype == torch.float16:
            out.copy_(nvfp4.dequantize(codes, block_scales, global_scale))
        else:
            nvfp4.dequantize_into(codes, block_scales, global_scale, out)

    def row_parts(self, weight: EncodedWeight) -> tuple[str, str]:
        return weight.parts[CODES], weight.parts[BLOCK_SCALE]

    def global_scale(self, weight: EncodedWeight, read: ReadRows) -> float:
        name = weight.parts[GLOBAL_SCALE]
        return positive_scale(name, read(name, 0, 1))

    def input_scale(self, weight: EncodedWeight, read: ReadRows) -> float | None:
        name = weight.input_scale
        return None if name is None else positive_scale(name, read(name, 0, 1))

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        return [key for key in tensors if key.rpartition(".")[2] in (K_SCALE, V_SCALE)]


def _is_nvfp4(tensors: Mapping[str, TensorInfo], linear: str) -> bool:
    """By the global scale, or, if that is lost, by the dtypes of the other parts."""
    infos = [tensors.get(f"{linear}.{part}") for part in (CODES, BLOCK_SCALE)]
    dtypes = [None if info is None else info.dtype for info in infos]
    return f"{linear}.{GLOBAL_SCALE}" in tensors or dtypes == ["U8", "F8_E4M3"]


def _weight(
    linear: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> EncodedWeight:
    """Describe a linear layer's weight, whose parts must fit each other."""
    names = {part: f"{linear}.{part}" for part in (CODES, BLOCK_SCALE, GLOBAL_SCALE)}
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise SourceError(
            f"{missing[0]}: missing, while other parts of that layer are there. "
            "The checkpoint is incomplete: quantize the model again."
        )
    codes, scales, single = (tensors[name] for name in names.values())
    rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
    dtypes = (codes.dtype, scales.dtype, single.dtype)
    block = nvfp4.BLOCK_SIZE
    fits = 2 * half % block == 0 and scales.shape == (rows, 2 * half // block)
    if dtypes != ("U8", "F8_E4M3", "F32") or not fits or not rows * half or single.numel != 1:
        raise SourceError(
            f"{linear}: codes {codes.dtype} {list(codes.shape)}, block scales {scales.dtype} "
            f"{list(scales.shape)}, global scale {single.dtype} {list(single.shape)}: not NVFP4. "
            "Quantize the model again."
        )
    input_scale = f"{linear}.{INPUT_SCALE}"
    return EncodedWeight(
        presented(codes, codes.key, (rows, half * 2), config),
        names,
        input_scale if input_scale in tensors else None,
    )
