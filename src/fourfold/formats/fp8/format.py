# SPDX-License-Identifier: Apache-2.0
"""FP8 as weight formats: with a scale for a scale group, a row, a block or 32 inputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fourfold.formats import fp8, nvfp4
from fourfold.formats.base import Spec, WeightFormat
from fourfold.formats.fp8 import activations, reference
from fourfold.formats.fp8.reference import Block

CODES, SCALE, EXPONENTS = "codes", "scale", "exponents"
INPUT_SCALE = "input_scale"


class _FP8(WeightFormat):
    """E4M3 codes, and scales for blocks of some size."""

    scales = frozenset({"max"})
    worst_error = 0.1
    """A normal code is off by up to 1/16 of its weight; trained weights have an error near 0.027.
    Above 0.1 most of a weight lies below 2⁻⁶ of its scale, where E4M3 has no normal numbers."""
    negligible = fp8.SCALE_MIN
    """2⁻¹¹⁷, where scales end: products with it vanish in any sum."""
    rounds_activations = True

    @abstractmethod
    def _block(self, shape: torch.Size) -> Block:
        """The rows and columns that share a scale."""

    @abstractmethod
    def _choose(self, w_OI: Tensor, out: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        """Choose the scales of some rows, and store them: float32 [rows, columns] of blocks."""

    @abstractmethod
    def _stored(self, parts: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        """The scales that the parts hold: float32 [rows, columns] of blocks."""

    def fp8_block(self, shape: tuple[int, int]) -> tuple[int, int]:
        height, width = self._block(torch.Size(shape))
        return min(height, shape[0]), min(width, shape[1])

    def from_fp8(self, codes: Tensor, scales: Tensor, out: Mapping[str, Tensor]) -> None:
        out[CODES].copy_(codes)

    def amax(self, weight: Tensor, *, name: str) -> float:
        return nvfp4.amax(weight, name=name)

    def quantize(
        self,
        w_OI: Tensor,
        out: Mapping[str, Tensor],
        *,
        scale: str,
        group_scale: float | None,
        name: str,
    ) -> tuple[float, float]:
        scales_BC = self._choose(w_OI, out, group_scale)
        return fp8.quantize_into(w_OI, out[CODES], scales_BC, self._block(w_OI.shape), name=name)

    def dequantize(
        self, parts: Mapping[str, Tensor], group_scale: float | None, out_OI: Tensor
    ) -> None:
        scales_BC = self._stored(parts, group_scale)
        fp8.dequantize_into(parts[CODES], scales_BC, self._block(out_OI.shape), out_OI)

    def error(
        self, w_OI: Tensor, parts: Mapping[str, Tensor], group_scale: float | None
    ) -> tuple[float, float]:
        scales_BC = self._stored(parts, group_scale)
        return fp8.error_energy(w_OI, parts[CODES], scales_BC, self._block(w_OI.shape))

    def amaxes(self, w_NX: Tensor) -> Tensor:
        return nvfp4.amaxes(w_NX)

    def workspace_bytes(self, count: int, numel: int) -> int:
        return fp8.workspace_bytes(count, numel)

    def warm_up(self, dtype: torch.dtype, scale: str, device: torch.device | str = "cpu") -> None:
        fp8.warm_up(dtype, device)


class FP8(_FP8):
    """E4M3 codes, and a float32 scale for each scale group; a static scale of the inputs."""

    name = "fp8"
    title = "FP8"
    block = 16
    """What FP8 matrix products of CUDA need."""
    group_part = SCALE
    has_batches = True

    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        return {CODES: ("F8_E4M3", shape), SCALE: ("F32", ())}

    def group_scale(self, amax: float) -> float:
        return fp8.scale_of(amax)

    def _block(self, shape: torch.Size) -> Block:
        rows, width = shape
        return rows, width

    def _choose(self, w_OI: Tensor, out: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        return self._stored(out, group_scale)

    def _stored(self, parts: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        assert group_scale is not None
        return torch.tensor([[group_scale]], dtype=torch.float32, device=parts[CODES].device)

    def quantize_batch(
        self,
        w_NX: Tensor,
        out: Sequence[Tensor],
        *,
        scale: str,
        group_scales: Tensor,
        workspace: Tensor,
    ) -> Tensor:
        (codes,) = out
        return fp8.quantize_batch_into(w_NX, codes, group_scales, workspace)

    def input_parts(self) -> dict[str, Spec]:
        return {INPUT_SCALE: ("F32", ())}

    def input_scale(self, amax: float) -> float:
        return fp8.scale_of(amax)

    def round_activations(
        self, x: Tensor, input_scale: Tensor | float | None, out: Tensor | None = None
    ) -> Tensor:
        return activations.round_static(x, input_scale, out)


class _OwnScales(_FP8):
    """Float32 scales that are parts of the weight."""

    def _choose(self, w_OI: Tensor, out: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        scales_BC = reference.scales_of(fp8.block_amaxes(w_OI, self._block(w_OI.shape)))
        out[SCALE].copy_(scales_BC.view(torch.uint8))  # a buffer may begin at any byte
        return scales_BC

    def _stored(self, parts: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        return parts[SCALE].clone().view(torch.float32)

    def from_fp8(self, codes: Tensor, scales: Tensor, out: Mapping[str, Tensor]) -> None:
        super().from_fp8(codes, scales, out)
        out[SCALE].copy_(scales.contiguous().view(torch.uint8).view(out[SCALE].shape))


class FP8Channel(_OwnScales):
    """E4M3 codes, and a float32 scale for each row; the inputs have a scale for each token."""

    name = "fp8_channel"
    title = "FP8 (channels)"
    block = 16

    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        return {CODES: ("F8_E4M3", shape), SCALE: ("F32", shape[:1])}

    def _block(self, shape: torch.Size) -> Block:
        return 1, shape[1]

    def round_activations(
        self, x: Tensor, input_scale: Tensor | float | None, out: Tensor | None = None
    ) -> Tensor:
        return activations.round_dynamic(x, None, activations.token_scales, out)


class FP8Block(_OwnScales):
    """E4M3 codes, and a float32 scale for 128 × 128 weights, or for the rows that are left; the
    inputs have a scale for each 128 of a token."""

    name = "fp8_block"
    title = "FP8 (blocks)"
    block = 128
    row_block = 128

    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        rows, width = shape
        grid = -(-rows // self.row_block), width // self.block
        return {CODES: ("F8_E4M3", shape), SCALE: ("F32", grid)}

    def _block(self, shape: torch.Size) -> Block:
        return self.row_block, self.block

    def round_activations(
        self, x: Tensor, input_scale: Tensor | float | None, out: Tensor | None = None
    ) -> Tensor:
        return activations.round_dynamic(x, self.block, activations.group_scales, out)


class MXFP8(_FP8):
    """E4M3 codes, and a power of two for each 32 inputs; activations are rounded alike."""

    name = "mxfp8"
    title = "MXFP8"
    block = 32
    has_batches = True

    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        rows, width = shape
        return {CODES: ("F8_E4M3", shape), EXPONENTS: ("U8", (rows, width // self.block))}

    def _block(self, shape: torch.Size) -> Block:
        return 1, self.block

    def _choose(self, w_OI: Tensor, out: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        exponents = reference.exponents_of(fp8.block_amaxes(w_OI, self._block(w_OI.shape)))
        out[EXPONENTS].copy_(exponents)
        return reference.powers(exponents)

    def _stored(self, parts: Mapping[str, Tensor], group_scale: float | None) -> Tensor:
        return reference.powers(parts[EXPONENTS])

    def holds_fp8(self, scales: Tensor) -> bool:
        return super().holds_fp8(scales) and bool((torch.frexp(scales)[0] == 0.5).all())

    def from_fp8(self, codes: Tensor, scales: Tensor, out: Mapping[str, Tensor]) -> None:
        super().from_fp8(codes, scales, out)
        out[EXPONENTS].copy_(torch.frexp(scales)[1] - 1 + 127)

    def quantize_batch(
        self,
        w_NX: Tensor,
        out: Sequence[Tensor],
        *,
        scale: str,
        group_scales: Tensor,
        workspace: Tensor,
    ) -> Tensor:
        codes, exponents = out
        return fp8.quantize_batch_into(w_NX, codes, group_scales, workspace, exponents)

    def round_activations(
        self, x: Tensor, input_scale: Tensor | float | None, out: Tensor | None = None
    ) -> Tensor:
        return activations.round_dynamic(x, self.block, activations.mx_scales, out)
