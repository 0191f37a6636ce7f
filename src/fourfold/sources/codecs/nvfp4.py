# SPDX-License-Identifier: Apache-2.0
"""What both layouts of NVFP4 have in common: a weight's tensors, by the layer's name.

    codes U8 [out, in/2] · block scales E4M3 [out, in/16] · a float32 number for the whole weight
    and, for quantized activations only, one for the layer's inputs

Rows of a weight are decoded from the same rows of the codes and block scales.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from fourfold.errors import DamagedError, SourceError
from fourfold.formats.nvfp4 import BLOCK_SIZE
from fourfold.formats.nvfp4 import format as nvfp4
from fourfold.formats.scheme import Scheme
from fourfold.sources.codecs.base import (
    QUANTIZED_TWICE,
    REMEDY,
    EncodedWeight,
    InputRounding,
    ReadRows,
    StoredParts,
    TensorCodec,
    presented,
)
from fourfold.storage.safetensors_header import FLOATS, TensorInfo

CODES, BLOCK_SCALE, NUMBER = "codes", "block scales", "global scale"
"""The parts of a weight, under which an `EncodedWeight` has its tensors."""

NAN_E4M3 = 0x7F

KV_SCALES = ("k_scale", "v_scale", "q_scale")


def check_block_scales(name: str, scales: torch.Tensor) -> None:
    """Check that block scales in E4M3 are numbers, and not negative.

    Raises:
        DamagedError: One is not.
    """
    codes = scales.view(torch.uint8)
    if codes.numel() and int(codes.max()) >= NAN_E4M3:  # negative ones follow it
        value = float(scales.view(torch.float8_e4m3fn)[codes >= NAN_E4M3][0].float())
        raise DamagedError(f"{name}: {value}; a block scale must be 0 or positive. {REMEDY}")


class NVFP4Codec(TensorCodec):
    """A codec of weights in NVFP4. Another layout can hold them without a change.

    Attributes:
        leaves: The last names of the tensors with codes, block scales and the weight's number.
        input_leaf: The last name of the number for the layer's inputs.
    """

    remark = QUANTIZED_TWICE
    leaves: ClassVar[tuple[str, str, str]]
    input_leaf: ClassVar[str]

    @abstractmethod
    def multiplier(self, name: str, read: ReadRows) -> float:
        """Return the scale that the stored number `name` stands for."""

    def read_rows(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read rows of a weight: codes U8 [rows, in/2], and block scales E4M3 [rows, in/16].

        Raises:
            DamagedError: A block scale is negative or NaN.
        """
        codes, block_scales = (read(name, start, stop) for name in self.row_parts(weight))
        check_block_scales(weight.parts[BLOCK_SCALE], block_scales)
        return codes, block_scales

    def row_parts(self, weight: EncodedWeight) -> tuple[str, str]:
        """Return the stored tensors with codes and block scales."""
        return weight.parts[CODES], weight.parts[BLOCK_SCALE]

    def global_scale(self, weight: EncodedWeight, read: ReadRows) -> float:
        """Return the scale of a whole weight."""
        return self.multiplier(weight.parts[NUMBER], read)

    def input_scale(self, weight: EncodedWeight, read: ReadRows) -> float | None:
        """Return the scale of a layer's quantized inputs; None for W4A16."""
        return None if weight.input_scale is None else self.multiplier(weight.input_scale, read)

    def input_rounding(self, weight: EncodedWeight, read: ReadRows) -> InputRounding | None:
        scale = self.input_scale(weight, read)
        return None if scale is None else InputRounding("nvfp4", scale)

    def stored_parts(self, weight: EncodedWeight, read: ReadRows) -> StoredParts:
        rows = dict(zip((nvfp4.CODES, nvfp4.BLOCK_SCALE), self.row_parts(weight), strict=True))
        numbers = {nvfp4.GLOBAL_SCALE: self.global_scale(weight, read)}
        input_scale = self.input_scale(weight, read)
        if input_scale is None:
            return StoredParts(Scheme("nvfp4", "max"), rows, numbers)
        numbers[nvfp4.INPUT_SCALE] = input_scale
        return StoredParts(Scheme("nvfp4", "max", "nvfp4"), rows, numbers)

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        return [key for key in tensors if key.rpartition(".")[2] in KV_SCALES]

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        stems = dict.fromkeys(
            stem
            for stem, _, leaf in (key.rpartition(".") for key in tensors)
            if leaf in self.leaves[1:] and self._is_stored_so(stem, tensors)
        )
        return {f"{stem}.weight": self._weight(stem, config, tensors) for stem in stems}

    def _is_stored_so(self, stem: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """By the weight's number, or, if that is lost, by the dtypes of the other parts."""
        codes, scales, number = (tensors.get(f"{stem}.{leaf}") for leaf in self.leaves)
        if number is not None:
            return True
        dtypes = [None if info is None else info.dtype for info in (codes, scales)]
        return dtypes == ["U8", "F8_E4M3"]

    def _weight(
        self, stem: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> EncodedWeight:
        """Describe a layer's weight, whose parts must fit each other."""
        names = [f"{stem}.{leaf}" for leaf in self.leaves]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise SourceError(
                f"{missing[0]}: missing, while other parts of that layer are there. The checkpoint "
                "is incomplete: download it again, or quantize the model again."
            )
        codes, scales, number = (tensors[name] for name in names)
        rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
        fits = 2 * half % BLOCK_SIZE == 0 and scales.shape == (rows, 2 * half // BLOCK_SIZE)
        dtypes = (codes.dtype, scales.dtype, number.dtype)
        if dtypes != ("U8", "F8_E4M3", "F32") or not fits or not rows * half or number.numel != 1:
            raise SourceError(
                f"{stem}: codes {codes.dtype} {list(codes.shape)}, block scales {scales.dtype} "
                f"{list(scales.shape)}, global scale {number.dtype} {list(number.shape)}: not "
                "NVFP4. Download the checkpoint again, or quantize the model again."
            )
        of_inputs = f"{stem}.{self.input_leaf}"
        scale = tensors.get(of_inputs)
        if scale is not None and (scale.dtype not in FLOATS or scale.numel != 1):
            raise SourceError(
                f"{of_inputs}: {scale.dtype} {list(scale.shape)}, where NVFP4 has one float. "
                f"{REMEDY}"
            )
        return EncodedWeight(
            presented(codes, f"{stem}.weight", (rows, 2 * half), config),
            dict(zip((CODES, BLOCK_SCALE, NUMBER), names, strict=True)),
            of_inputs if of_inputs in tensors else None,
        )
