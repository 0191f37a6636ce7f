# SPDX-License-Identifier: Apache-2.0
"""Weight formats in one file: INT8 codes with a float32 scale for each row, or for eight rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.errors import NonFiniteError
from fourfold.formats.base import FORMATS, Spec, WeightFormat


class Int8Rows(WeightFormat):
    """w ≈ code · scale of the row, codes from -127 to 127."""

    name = "int8_rows"
    title = "INT8"
    block = 1
    scales = frozenset({"max"})
    worst_error = 0.1

    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        rows, width = shape
        return {
            "codes": ("I8", (rows, width)),
            "row_scale": ("F32", (-(-rows // self.row_block), 1)),
        }

    def amax(self, weight: Tensor, *, name: str) -> float:
        largest = float(weight.abs().max())
        if not largest < float("inf"):
            raise NonFiniteError(f"{name}: holds NaN or Inf. Repair the source checkpoint.")
        return largest

    def quantize(
        self,
        w_OI: Tensor,
        out: Mapping[str, Tensor],
        *,
        scale: str,
        group_scale: float | None,
        name: str,
    ) -> tuple[float, float]:
        w_OI = w_OI.float()
        blocks = w_OI.abs().amax(dim=1, keepdim=True).split(self.row_block)
        scale_B1 = torch.stack([block.amax(dim=0) for block in blocks]).clamp(min=1e-30) / 127
        scale_O1 = self._of_rows(scale_B1, len(w_OI))
        codes_OI = (w_OI / scale_O1).round().to(torch.int8)
        out["codes"].view(torch.int8).copy_(codes_OI)
        out["row_scale"].copy_(scale_B1.view(torch.uint8))  # a buffer may begin at any byte
        difference = w_OI.double() - codes_OI.double() * scale_O1.double()
        return float(difference.square().sum()), float(w_OI.double().square().sum())

    def dequantize(
        self, parts: Mapping[str, Tensor], group_scale: float | None, out_OI: Tensor
    ) -> None:
        scale_B1 = parts["row_scale"].clone().view(torch.float32)
        scale_O1 = self._of_rows(scale_B1, len(out_OI))
        out_OI.copy_(parts["codes"].view(torch.int8).float() * scale_O1)

    def _of_rows(self, scale_B1: Tensor, rows: int) -> Tensor:
        return scale_B1.repeat_interleave(self.row_block, dim=0)[:rows]

    def error(
        self, w_OI: Tensor, parts: Mapping[str, Tensor], group_scale: float | None
    ) -> tuple[float, float]:
        back = torch.empty(w_OI.shape)
        self.dequantize(parts, group_scale, back)
        difference = w_OI.double() - back.double()
        return float(difference.square().sum()), float(w_OI.double().square().sum())


class Int8Blocks(Int8Rows):
    """w ≈ code · scale of eight rows, the last of which may be fewer."""

    name = "int8_blocks"
    row_block = 8


def register() -> None:
    """Make the formats known by their names."""
    for fmt in (Int8Rows(), Int8Blocks()):
        FORMATS[fmt.name] = fmt
