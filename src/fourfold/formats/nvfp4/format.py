# SPDX-License-Identifier: Apache-2.0
"""NVFP4 as a weight format: its parts, and the kernels behind the common interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fourfold.formats import nvfp4
from fourfold.formats.base import Spec, WeightFormat
from fourfold.formats.nvfp4 import from_mxfp4
from fourfold.formats.nvfp4.activations import fake_quantize

CODES, BLOCK_SCALE, GLOBAL_SCALE = "codes", "block_scale", "global_scale"
INPUT_SCALE = "input_scale"


class NVFP4(WeightFormat):
    """E2M1 codes, an E4M3 scale for each 16 inputs, and a float32 scale for each scale group."""

    name = "nvfp4"
    title = "NVFP4"
    block = nvfp4.BLOCK_SIZE
    scales = frozenset(nvfp4.ScaleAlgorithm)
    group_part = GLOBAL_SCALE
    source_ratios = {"U8": 4}  # noqa: RUF012
    worst_error = 0.35
    """Trained weights have an error near 0.1; heavy tails reach 0.2."""
    smallest = 2.0**-10
    """Weights whose amax is below this multiple of the global scale become 0 or ±0.5 times the
    smallest block scale, 2⁻⁹, whatever scale is chosen."""
    negligible = nvfp4.GLOBAL_SCALE_MIN
    """2⁻¹¹⁷, where global scales end: products with it vanish in any sum."""
    holds_mxfp4 = True
    has_batches = True
    rounds_activations = True
    input_block = nvfp4.BLOCK_SIZE

    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        rows, width = shape
        return {
            CODES: ("U8", (rows, width // 2)),
            BLOCK_SCALE: ("F8_E4M3", (rows, width // self.block)),
            GLOBAL_SCALE: ("F32", ()),
        }

    def amax(self, weight: Tensor, *, name: str) -> float:
        return nvfp4.amax(weight, name=name)

    def group_scale(self, amax: float) -> float:
        return nvfp4.global_scale(amax)

    def quantize(
        self,
        w_OI: Tensor,
        out: Mapping[str, Tensor],
        *,
        scale: str,
        group_scale: float | None,
        name: str,
    ) -> tuple[float, float]:
        assert group_scale is not None
        return nvfp4.quantize_into(
            w_OI, out[CODES], out[BLOCK_SCALE], scale=scale, global_scale=group_scale, name=name
        )

    def dequantize(
        self, parts: Mapping[str, Tensor], group_scale: float | None, out_OI: Tensor
    ) -> None:
        assert group_scale is not None
        nvfp4.dequantize_into(parts[CODES], parts[BLOCK_SCALE], group_scale, out_OI)

    def error(
        self, w_OI: Tensor, parts: Mapping[str, Tensor], group_scale: float | None
    ) -> tuple[float, float]:
        assert group_scale is not None
        return nvfp4.error_energy(w_OI, parts[CODES], parts[BLOCK_SCALE], group_scale)

    def scale_of_mxfp4(self, low: int, high: int) -> float | None:
        return from_mxfp4.global_scale(low, high)

    def from_mxfp4(
        self, codes: Tensor, exponents: Tensor, group_scale: float, out: Mapping[str, Tensor]
    ) -> None:
        out[CODES].copy_(codes)
        out[BLOCK_SCALE].copy_(from_mxfp4.block_scales(exponents, group_scale))

    def is_lost(self, amax: float, group_scale: float | None) -> bool:
        assert group_scale is not None
        return 0 < amax < group_scale * self.smallest

    def warm_up(self, dtype: torch.dtype, scale: str, device: torch.device | str = "cpu") -> None:
        nvfp4.warm_up(dtype, scale, device=device)

    def amaxes(self, w_NX: Tensor) -> Tensor:
        return nvfp4.amaxes(w_NX)

    def quantize_batch(
        self,
        w_NX: Tensor,
        out: Sequence[Tensor],
        *,
        scale: str,
        group_scales: Tensor,
        workspace: Tensor,
    ) -> Tensor:
        codes, block_scale = out
        parts = w_NX, codes, block_scale
        return nvfp4.quantize_batch_into(
            *parts, scale=scale, global_scales=group_scales, workspace=workspace
        )

    def workspace_bytes(self, count: int, numel: int) -> int:
        return nvfp4.workspace_bytes(count, numel)

    def input_parts(self) -> dict[str, Spec]:
        return {INPUT_SCALE: ("F32", ())}

    def input_scale(self, amax: float) -> float:
        return nvfp4.global_scale(amax)

    def round_activations(
        self, x: Tensor, input_scale: Tensor | float | None, out: Tensor | None = None
    ) -> Tensor:
        assert input_scale is not None
        return fake_quantize(x, input_scale, out)
