# SPDX-License-Identifier: Apache-2.0
"""How a quantized weight is stored: the interface of a weight format, and the registry.

A format splits a weight `[out, in]` into **parts**: tensors such as codes and block scales. Most
parts, the **row parts**, have one row for each row of the weight, or for each `row_block` of them,
so that a large weight can be quantized in pieces.
At most one part, the **group part**, is a single number that all weights of a scale group share
(NVFP4's global scale), because engines fuse these weights into one.

The format says what the numbers mean. Which tensors of a checkpoint hold the parts is the layout's
business (`layouts.base`); how scales and codes are chosen is the algorithm's (`algorithms.base`).

Shapes: O rows (outputs), I columns (inputs), N weights of one size, X elements of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from fourfold.formats.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Spec = tuple[str, tuple[int, ...]]
"""A tensor's dtype, as safetensors names it, and its shape."""


class WeightFormat(ABC):
    """A way to store a weight in fewer bits.

    Buffers of row parts are passed as uint8 matrices `[rows of the part, bytes of a row]`, whatever
    its dtype; a format may view them as that dtype.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """The name as messages write it."""
    block: ClassVar[int]
    """The input dimension of a weight must be a multiple of this."""
    row_block: ClassVar[int] = 1
    """A weight is cut into pieces at multiples of this many rows; the last piece may have any."""
    scales: ClassVar[frozenset[str]]
    """The ways to choose scales that `quantize` knows, for algorithms that work row by row."""
    group_part: ClassVar[str | None] = None
    """The part that all weights of a scale group share; None if there is no such part."""
    source_ratios: ClassVar[Mapping[str, int]] = {}
    """Bytes of a 16-bit source for each byte of a part, by the dtype of the part. Only dtypes that
    nothing but packed codes has: shards are balanced by it, from the dtypes alone."""
    worst_error: ClassVar[float]
    """A relative error ‖w − ŵ‖/‖w‖ above this means that the format cannot hold the weight."""
    negligible: ClassVar[float] = 0.0
    """A weight that reaches no more than this is as good as 0, whatever it lies beside."""

    # ------------------------------------------------------------------------------- geometry

    @abstractmethod
    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """Return the parts of a weight `[out, in]`, the group part included."""

    def row_parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """Return the parts that have rows as the weight has, a row for each or for some of them."""
        return {part: spec for part, spec in self.parts(shape).items() if part != self.group_part}

    # --------------------------------------------------------------------------------- weights

    @abstractmethod
    def amax(self, weight: Tensor, *, name: str) -> float:
        """Return the largest magnitude of a weight.

        Raises:
            NonFiniteError: The weight holds NaN or Inf; the message names `name`.
        """

    def group_scale(self, amax: float) -> float | None:
        """Return the number that a scale group shares, given the largest magnitude in it."""
        return None

    @abstractmethod
    def quantize(
        self,
        w_OI: Tensor,
        out: Mapping[str, Tensor],
        *,
        scale: str,
        group_scale: float | None,
        name: str,
    ) -> tuple[float, float]:
        """Quantize rows of a weight into the buffers of its row parts.

        Args:
            w_OI: bf16, fp16 or fp32 rows `[rows, in]`, contiguous along `in`.
            out: Buffers by part, uint8 `[rows of the part, bytes of a row]`.
            scale: How scales are chosen, one of `scales`.
            group_scale: What `group_scale` returned for the scale group.
            name: The weight's name, for messages.

        Returns:
            Σ(w − ŵ)² and Σw².
        """

    @abstractmethod
    def dequantize(
        self, parts: Mapping[str, Tensor], group_scale: float | None, out_OI: Tensor
    ) -> None:
        """Fill `out_OI`, contiguous float32 or bf16, with the weight that the parts stand for."""

    @abstractmethod
    def error(
        self, w_OI: Tensor, parts: Mapping[str, Tensor], group_scale: float | None
    ) -> tuple[float, float]:
        """Return Σ(w − ŵ)² and Σw² for rows of a weight and of its parts."""

    def fp8_block(self, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Return the rows and columns that share a scale, if this format is FP8; else None."""
        return None

    def holds_fp8(self, scales: Tensor) -> bool:
        """True if the format can store these multipliers, float32 [n], as they are."""
        return bool((scales.isfinite() & (scales > 0)).all())

    def from_fp8(self, codes: Tensor, scales: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fill the buffers of the row parts with rows that are FP8 already.

        Args:
            codes: E4M3 codes, U8 [rows, in].
            scales: float32 [blocks of rows, blocks of columns], each for a `fp8_block`.
            out: Buffers by part, uint8.
        """
        raise NotImplementedError

    holds_mxfp4: ClassVar[bool] = False
    """True if this format can hold codes of MXFP4 as they are."""

    def scale_of_mxfp4(self, low: int, high: int) -> float | None:
        """Return the group scale under which this format holds a scale group of MXFP4 exactly.

        Args:
            low: The smallest biased exponent of its blocks, those aside whose codes are all 0.
            high: The largest.

        Returns:
            None if the format does not hold it exactly.
        """
        return None

    def from_mxfp4(
        self, codes: Tensor, exponents: Tensor, group_scale: float, out: Mapping[str, Tensor]
    ) -> None:
        """Fill the buffers of the row parts with rows that `scale_of_mxfp4` has a scale for.

        Args:
            codes: E2M1 codes, U8 [rows, in/2], the low half of a byte first.
            exponents: U8 [rows, in/32]; any for blocks whose codes are all 0.
            group_scale: What `scale_of_mxfp4` returned.
            out: Buffers by part, uint8 `[rows, bytes of a row]`.
        """
        raise NotImplementedError

    def is_lost(self, amax: float, group_scale: float | None) -> bool:
        """True if a weight is so small beside its scale group that its codes say nothing."""
        return False

    def warm_up(self, dtype: torch.dtype, scale: str, device: torch.device | str = "cpu") -> None:
        """Compile the kernels for weights of `dtype`, so that a thread can do so early."""
        return

    # -------------------------------------------------------------------- many weights on a GPU

    has_batches: ClassVar[bool] = False
    """True if weights can be quantized many at a time on a GPU. The bytes of a weight's row parts
    then depend only on the number of its elements: a weight may be passed as one long row, and
    `row_block` is 1."""

    def amaxes(self, w_NX: Tensor) -> Tensor:
        """Return the largest magnitudes, float32 [N] on the device, which is not waited for; not
        finite where a weight holds NaN or Inf."""
        raise NotImplementedError

    def quantize_batch(
        self,
        w_NX: Tensor,
        out: Sequence[Tensor],
        *,
        scale: str,
        group_scales: Tensor,
        workspace: Tensor,
    ) -> Tensor:
        """Quantize N weights without waiting for the device.

        Args:
            w_NX: Contiguous weights, one in each row.
            out: uint8 buffers `[N, bytes]` in the order of `row_parts`.
            scale: How scales are chosen, one of `scales`.
            group_scales: float32 [N].
            workspace: uint8, `workspace_bytes` of it, 8-byte aligned.

        Returns:
            Σ(w − ŵ)² and Σw² of each weight, float64 [N, 2]. Where one of them is not finite the
            bytes of that weight are void, and `quantize` must quantize it.
        """
        raise NotImplementedError

    def workspace_bytes(self, count: int, numel: int) -> int:
        """Return the bytes that `quantize_batch` needs for `count` weights of `numel` elements."""
        return 0

    # ----------------------------------------------------------------------------- activations

    input_block: ClassVar[int | None] = None
    """The consecutive inputs that share a scale which engines choose below the stored one; None
    if they choose none, or store none."""
    rounds_activations: ClassVar[bool] = False
    """True if engines can round the inputs of linear layers to this format."""

    def input_parts(self) -> dict[str, Spec]:
        """Return the parts that inputs in this format add to a weight; empty if an engine chooses
        all scales itself."""
        return {}

    def input_scale(self, amax: float) -> float:
        """Return the scale of inputs whose largest magnitude is `amax`."""
        raise NotImplementedError

    def round_activations(
        self, x: Tensor, input_scale: Tensor | float | None, out: Tensor | None = None
    ) -> Tensor:
        """Return activations `[.., in]` as an engine sees them, in their own dtype.

        Args:
            x: bf16, fp16 or fp32.
            input_scale: The scale of the inputs; None if `input_parts` is empty.
            out: A contiguous tensor like `x` to write into; `x` itself is allowed.
        """
        raise NotImplementedError


FORMATS: Registry[WeightFormat] = Registry(
    {
        "nvfp4": "fourfold.formats.nvfp4.format:NVFP4",
        "fp8": "fourfold.formats.fp8.format:FP8",
        "fp8_channel": "fourfold.formats.fp8.format:FP8Channel",
        "fp8_block": "fourfold.formats.fp8.format:FP8Block",
        "mxfp8": "fourfold.formats.fp8.format:MXFP8",
    }
)
"""The weight formats by name."""


def source_ratio(dtype: str) -> int:
    """Return how many bytes of a 16-bit source become one byte of a tensor of `dtype`."""
    return max((fmt.source_ratios.get(dtype, 1) for fmt in FORMATS.values()), default=1)
