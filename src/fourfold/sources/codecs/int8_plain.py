# SPDX-License-Identifier: Apache-2.0
"""Integers as compressed-tensors stores them unpacked (`int-quantized`, `naive-quantized`): W8A8.

    <linear>.weight             I8             [out, in]         codes, also of fewer bits
    <linear>.weight_scale       BF16, F16, F32 [out, in/group], [out, 1], [out] or [1]
    <linear>.weight_zero_point  I8             as the scales, asymmetric only

Codes and zeros are signed. With 128 added to both they are those of the packed forms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fourfold.errors import SourceError
from fourfold.sources.codecs.base import REMEDY, EncodedWeight, ReadRows, TensorCodec, presented
from fourfold.sources.codecs.int4_packed import packings_in
from fourfold.sources.codecs.integers import CHUNK, SCALE_DTYPES, check_finite
from fourfold.storage.safetensors_header import TensorInfo

CODES, SCALE, ZERO = "weight", "weight_scale", "weight_zero_point"

_INDEX = "weight_g_idx"
"""The groups of columns that are not in order: no library reads them in this form."""
_STATIC = ("input_scale", "input_zero_point")
_KV_SCALES = ("k_scale", "v_scale", "q_scale")
_MIDDLE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainWeight(EncodedWeight):
    """One weight in I8."""

    groups: int
    """The scales of a row."""
    is_scalar: bool
    """True if all rows share one scale."""


class INT8Plain(TensorCodec):
    """Reads weights of linear layers."""

    name = "int8_plain"
    title = "INT8 (compressed-tensors)"

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        stated = list(packings_in(config))
        is_symmetric = not stated or any(packing.is_symmetric for packing in stated)
        return {
            key: _weight(info, tensors, config, is_symmetric=is_symmetric)
            for key, info in tensors.items()
            if _is_stored_so(info, tensors)
        }

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        assert isinstance(weight, PlainWeight)
        from fourfold.sources.codecs import int_cpu  # imports numba

        def of_rows(part: str, first: int, last: int) -> torch.Tensor:
            if weight.is_scalar:
                return read(weight.parts[part], 0, 1).reshape(1, 1).expand(last - first, 1)
            return read(weight.parts[part], first, last).reshape(last - first, weight.groups)

        columns, zeros = weight.info.shape[1], torch.full((1, 1), float(_MIDDLE))
        step = max(1, CHUNK // columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            scales = of_rows(SCALE, first, last)
            check_finite(weight.parts[SCALE], scales)
            if ZERO in weight.parts:
                zeros = of_rows(ZERO, first, last).float() + _MIDDLE
            int_cpu.decode(
                read(weight.parts[CODES], first, last).view(torch.uint8) ^ _MIDDLE,
                scales,
                zeros,
                out[first - start : last - start],
                bits=8,
                width=columns // weight.groups,
                groups=np.empty(0, np.int32),
            )

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        return [key for key in tensors if _is_static_scale(key, tensors)]


def _is_static_scale(key: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """True for a scale of a KV cache, or of the inputs of a weight in I8."""
    stem, _, leaf = key.rpartition(".")
    codes = tensors.get(f"{stem}.{CODES}")
    return leaf in _KV_SCALES or (leaf in _STATIC and codes is not None and codes.dtype == "I8")


def _is_stored_so(codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    stem, _, leaf = codes.key.rpartition(".")
    if leaf != CODES or codes.dtype != "I8" or len(codes.shape) != 2:
        return False
    return f"{stem}.{SCALE}" in tensors and f"{stem}.{_INDEX}" not in tensors


def _weight(
    codes: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    *,
    is_symmetric: bool,
) -> PlainWeight:
    """Describe a weight, whose parts must fit each other."""
    stem = codes.key.removesuffix(f".{CODES}")
    names = {part: f"{stem}.{part}" for part in (CODES, SCALE, ZERO)}
    names = {part: name for part, name in names.items() if name in tensors}
    if ZERO not in names and not is_symmetric:
        raise SourceError(
            f"{stem}.{ZERO}: missing, but the configuration says that {codes.key} is not "
            f"symmetric. {REMEDY}"
        )
    scale, zero, (rows, columns) = tensors[names[SCALE]], tensors.get(f"{stem}.{ZERO}"), codes.shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    fits = scale.numel == 1 or (scale.rows == rows and scale.numel == rows * groups)
    if scale.dtype not in SCALE_DTYPES or not fits or not rows * columns or columns % groups:
        raise _misfit(scale, codes)
    if zero is not None and (zero.dtype, zero.shape) != ("I8", scale.shape):
        raise _misfit(zero, codes)
    return PlainWeight(
        presented(codes, codes.key, codes.shape, config),
        names,
        groups=groups,
        is_scalar=scale.numel == 1,
    )


def _misfit(info: TensorInfo, codes: TensorInfo) -> SourceError:
    return SourceError(
        f"{info.key}: {info.dtype} {list(info.shape)} does not fit {codes.key} {codes.dtype} "
        f"{list(codes.shape)}, neither per tensor or channel nor in groups of columns. {REMEDY}"
    )
