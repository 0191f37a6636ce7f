# SPDX-License-Identifier: Apache-2.0
"""NVFP4 experts that lie stacked, as engines read them for some families.

    experts.gate_up_proj                 U8       [experts, outputs, in/2]
    experts.gate_up_proj_weight_scale    F8_E4M3  [experts, outputs, in/16]
    experts.gate_up_proj_weight_scale_2  F32      [experts], or [experts, 2] for gate and up
    experts.gate_up_proj_input_scale     F32      the same, or one number

Names differ by family (`fourfold.layouts.stacked`), and Llama 4's stacks are transposed, codes too:
[experts, in/2, outputs]. A stack is presented under the name of its codes, which is that of the
unquantized checkpoint: [experts, outputs, in], or [experts, in, outputs].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fourfold.errors import SourceError
from fourfold.formats import nvfp4
from fourfold.layouts.stacked import INPUT_AMAX, stacks_of
from fourfold.layouts.stacks import Stack
from fourfold.sources.codecs.base import (
    QUANTIZED_TWICE,
    EncodedWeight,
    InputRounding,
    ReadRows,
    TensorCodec,
    positive_scale,
    presented,
)
from fourfold.sources.codecs.nvfp4 import (
    BLOCK_SCALE,
    CODES,
    KV_SCALES,
    NUMBER,
    check_block_scales,
)
from fourfold.storage.safetensors_header import TensorInfo

ROW_PARTS = (CODES, BLOCK_SCALE)
LAYER_NUMBER = "global scale of the layer"
"""The part that stands for `NUMBER` where all experts share one."""


class StackedNVFP4(TensorCodec):
    """Reads stacked experts, one after the other."""

    name = "nvfp4_stacked"
    title = "NVFP4 (ModelOpt, stacked)"
    remark = QUANTIZED_TWICE

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        return {
            key: _weight(stack.place(experts), stack, tensors, config)
            for stack in stacks_of(config)
            for key, info in tensors.items()
            if info.dtype == "U8" and len(info.shape) == 3
            if (experts := stack.experts_of(key, "codes")) is not None
        }

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        for expert, target in zip(range(start, stop), out, strict=True):
            codes, scales = (read(weight.parts[x], expert, expert + 1)[0] for x in ROW_PARTS)
            check_block_scales(weight.parts[BLOCK_SCALE], scales)
            if codes.shape[1] == target.shape[1]:  # [in/2, outputs], of Llama 4
                codes, scales, target = codes.T.contiguous(), scales.T.contiguous(), target.T
            name = weight.parts.get(LAYER_NUMBER, weight.parts.get(NUMBER, ""))
            row = 0 if LAYER_NUMBER in weight.parts else expert
            numbers = read(name, row, row + 1).view(-1)  # one, or one for each projection
            parts = (x.chunk(len(numbers)) for x in (codes, scales, target))
            for number, codes_OI, scale_OB, out_OI in zip(numbers, *parts, strict=True):
                global_scale = positive_scale(name, number)
                out_OI.copy_(nvfp4.dequantize(codes_OI, scale_OB, global_scale))

    def input_rounding(self, weight: EncodedWeight, read: ReadRows) -> InputRounding | None:
        name = weight.input_scale
        if name is None:
            return None
        is_one = LAYER_NUMBER in weight.parts or name.endswith("_amax")
        # Engines take the largest for the whole layer.
        largest = read(name, 0, 1 if is_one else weight.info.rows).max()
        scale = positive_scale(name, largest)
        return InputRounding("nvfp4", scale / INPUT_AMAX if name.endswith("_amax") else scale)

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        return [key for key in tensors if key.rpartition(".")[2] in KV_SCALES]


def _weight(
    place: str, stack: Stack, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> EncodedWeight:
    own = stack.numbers["global_scale"]
    number_part = LAYER_NUMBER if own.per_layer else NUMBER
    names = {
        CODES: f"{place}{stack.row_parts['codes']}",
        BLOCK_SCALE: f"{place}{stack.row_parts['block_scale']}",
        number_part: f"{place}{own.suffix}",
    }
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise SourceError(
            f"{missing[0]}: missing, while other parts of these experts are there. The checkpoint "
            "is incomplete: download it again, or quantize the model again."
        )
    codes, scales, number = (tensors[name] for name in names.values())
    experts, outputs, half = codes.shape
    if stack.is_transposed:
        outputs, half = half, outputs
    blocks = 2 * half // nvfp4.BLOCK_SIZE
    count = [len(stack.projections)] if own.per_projection else []
    wanted = {
        codes.key: ("U8", codes.shape),
        scales.key: ("F8_E4M3", _matrices(stack, experts, outputs, blocks)),
        number.key: ("F32", () if own.per_layer else (experts, *count)),
    }
    for info in (codes, scales, number):
        if (info.dtype, info.shape) != wanted[info.key] or not info.numel:
            dtype, shape = wanted[info.key]
            raise SourceError(
                f"{info.key} in {info.file.name}: {info.dtype} {list(info.shape)} where stacked "
                f"NVFP4 has {dtype} {list(shape)}. Download the checkpoint again, or quantize the "
                "model again."
            )
    of_inputs = f"{place}{stack.numbers['input_scale'].suffix}"
    return EncodedWeight(
        presented(codes, codes.key, _matrices(stack, experts, outputs, 2 * half), config),
        names,
        of_inputs if of_inputs in tensors else None,
    )


def _matrices(stack: Stack, experts: int, outputs: int, width: int) -> tuple[int, ...]:
    """The shape of a stack of matrices."""
    return (experts, *((width, outputs) if stack.is_transposed else (outputs, width)))
