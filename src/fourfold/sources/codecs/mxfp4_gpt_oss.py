# SPDX-License-Identifier: Apache-2.0
"""The experts of gpt-oss in MXFP4.

    gate_up_proj_blocks, down_proj_blocks  U8  [experts, outputs, in/32, 16]
    gate_up_proj_scales, down_proj_scales  U8  [experts, outputs, in/32]

They are presented as BF16 checkpoints of the family have them, transposed:
[experts, in, outputs]. Biases lie beside them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fourfold.errors import SourceError
from fourfold.formats import mxfp4
from fourfold.sources.codecs.base import EncodedWeight, MXFP4Codec, ReadRows, presented
from fourfold.storage.safetensors_header import TensorInfo

BLOCKS, SCALES = "_blocks", "_scales"


class MXFP4GptOss(MXFP4Codec):
    """Reads the fused experts of gpt-oss, an expert at a time."""

    name = "mxfp4_gpt_oss"
    title = "MXFP4 (gpt-oss)"

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        return {
            (key := info.key.removesuffix(BLOCKS)): _weight(key, info, tensors, config)
            for info in tensors.values()
            if info.key.endswith(BLOCKS) and info.dtype == "U8" and len(info.shape) == 4
        }

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        from fourfold.sources.codecs import e2m1, mxfp4_cpu  # import numba

        outputs = range(weight.info.shape[2])
        for expert, target in zip(range(start, stop), out, strict=True):
            codes = self.codes(weight, expert, outputs, read).contiguous()
            exponents = self.exponents(weight, expert, outputs, read).contiguous()
            is_bf16 = target.dtype == torch.bfloat16
            exact = target if is_bf16 else torch.empty(target.shape, dtype=torch.bfloat16)
            mxfp4_cpu.decode_transposed(codes, exponents, e2m1.E8M0, exact)
            if not is_bf16:
                target.copy_(exact)

    def codes(
        self, weight: EncodedWeight, expert: int | None, rows: range, read: ReadRows
    ) -> torch.Tensor:
        assert expert is not None
        return read(weight.parts[BLOCKS], expert, expert + 1)[0, _slice(rows)].flatten(1)

    def exponents(
        self, weight: EncodedWeight, expert: int | None, rows: range, read: ReadRows
    ) -> torch.Tensor:
        assert expert is not None
        return read(weight.parts[SCALES], expert, expert + 1)[0, _slice(rows)]


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop, rows.step)


def _weight(
    key: str, blocks: TensorInfo, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> EncodedWeight:
    scales = tensors.get(f"{key}{SCALES}")
    if scales is None:
        raise SourceError(
            f"{key}{SCALES}: missing beside {blocks.key}. Download the checkpoint again."
        )
    experts, outputs, groups, width = blocks.shape
    is_whole = width == mxfp4.BLOCK // 2 and blocks.numel > 0
    if scales.dtype != "U8" or scales.shape != (experts, outputs, groups) or not is_whole:
        raise SourceError(
            f"{scales.key}: {scales.dtype} {list(scales.shape)} does not fit {blocks.key} "
            f"{list(blocks.shape)}. Download the checkpoint again."
        )
    info = presented(blocks, key, (experts, groups * mxfp4.BLOCK, outputs), config)
    return EncodedWeight(info, {BLOCKS: blocks.key, SCALES: scales.key})
