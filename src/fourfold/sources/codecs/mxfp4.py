# SPDX-License-Identifier: Apache-2.0
"""MXFP4 linear layers, as compressed-tensors, Quark and DeepSeek write them.

    <linear>.weight_packed U8  [out, in/2], <linear>.weight_scale U8, E8M0 [out, in/32]
    <linear>.weight        U8, I8, F4 …,    <linear>.weight_scale or .scale

A byte holds two E2M1 codes, the first in its low half; a scale is 2^(byte − 127).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fourfold.errors import SourceError
from fourfold.formats import mxfp4
from fourfold.sources.codecs.base import REMEDY, EncodedWeight, MXFP4Codec, ReadRows, presented
from fourfold.storage.safetensors_header import TensorInfo

CODES, SCALE = "codes", "scale"

_EXPONENTS = ("U8", "F8_E8M0")
_BYTES = ("U8", "I8")


class MXFP4(MXFP4Codec):
    """Reads MXFP4 weights that are one matrix each."""

    name = "mxfp4"
    title = "MXFP4"

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        weights: dict[str, EncodedWeight] = {}
        for key, codes in tensors.items():
            stem, _, leaf = key.rpartition(".")
            if leaf not in ("weight_packed", "weight") or codes.dtype not in _BYTES:
                continue
            names = (f"{stem}.weight_scale", f"{stem}.scale")
            scale = next((tensors[name] for name in names if name in tensors), None)
            if scale is not None and scale.dtype in _EXPONENTS:
                weights[f"{stem}.weight"] = _weight(stem, codes, scale, config)
        return weights

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        from fourfold.sources.codecs import e2m1

        rows = range(start, stop)
        codes, exponents = (of(weight, None, rows, read) for of in (self.codes, self.exponents))
        e2m1.decode(codes, exponents, e2m1.E8M0, out, block=mxfp4.BLOCK)

    def codes(
        self, weight: EncodedWeight, expert: int | None, rows: range, read: ReadRows
    ) -> torch.Tensor:
        return _bytes(read, weight.parts[CODES], rows)

    def exponents(
        self, weight: EncodedWeight, expert: int | None, rows: range, read: ReadRows
    ) -> torch.Tensor:
        return _bytes(read, weight.parts[SCALE], rows)


def _bytes(read: ReadRows, name: str, rows: range) -> torch.Tensor:
    return read(name, rows.start, rows.stop).view(torch.uint8)


def _weight(
    stem: str, codes: TensorInfo, scale: TensorInfo, config: Mapping[str, Any]
) -> EncodedWeight:
    rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
    fits = 2 * half % mxfp4.BLOCK == 0 and scale.shape == (rows, 2 * half // mxfp4.BLOCK)
    if not rows * half or not fits:
        raise SourceError(
            f"{scale.key}: {scale.dtype} {list(scale.shape)} does not fit the codes "
            f"{codes.dtype} {list(codes.shape)}: MXFP4 has a scale for {mxfp4.BLOCK} codes of a "
            f"row. {REMEDY}"
        )
    info = presented(codes, f"{stem}.weight", (rows, 2 * half), config)
    return EncodedWeight(info, {CODES: codes.key, SCALE: scale.key})
