# SPDX-License-Identifier: Apache-2.0
"""How a quantized checkpoint stores its weights, and how to read them: the `TensorCodec` interface.

    stored     experts.0.up_proj.{weight U8, weight_scale F8_E4M3, weight_scale_2 F32}
    presented  experts.0.up_proj.weight  BF16 [out, in]

A codec looks at the configuration and the headers of a checkpoint, claims the tensors that it can
read, and says under which name, dtype and shape it presents each weight. Later it is asked for a
range of rows of one weight. A weight has any number of dimensions: a fused tensor of experts
[experts, in, out] is one weight, whose rows are experts.

To add a codec, write one module with a subclass and name it in `CODECS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from fourfold.errors import DamagedError
from fourfold.formats.registry import Registry
from fourfold.formats.scheme import Scheme
from fourfold.layouts.recognition import with_nested
from fourfold.storage.safetensors_header import COMPUTE_DTYPES, TORCH_DTYPES, TensorInfo, nbytes_of
from fourfold.storage.source import FP8Weight, Slab

ReadRows = Callable[[str, int, int], torch.Tensor]
"""Reads rows `start:stop` of the first dimension of a stored tensor; a scalar has one row."""

FLOAT_DTYPES = {str(TORCH_DTYPES[name]).removeprefix("torch."): name for name in COMPUTE_DTYPES}
"""The dtypes that weights can be presented in, by PyTorch's name: `bfloat16` → `BF16`."""

REMEDY = "Download the checkpoint again, or give the BF16 one."

QUANTIZED_TWICE = (
    "weights that were quantized to 4 bits lose again; start from the checkpoint that they were "
    "made from, if you have it, or convert the checkpoint with `layout`, which keeps their codes"
)


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """One weight of a quantized checkpoint."""

    info: TensorInfo
    """The weight as it is presented. Its place in a file is that of the first part."""
    parts: Mapping[str, str]
    """The stored tensors that it is decoded from, under the codec's own names; none is presented.
    The first one takes the weight's place in the order of tensors."""
    input_scale: str | None = None
    """The stored tensor that scales the layer's quantized inputs, if there is one."""

    @property
    def stored(self) -> Iterator[str]:
        """The names of all stored tensors that belong to this weight."""
        yield from self.parts.values()
        if self.input_scale is not None:
            yield self.input_scale


class InputRounding(NamedTuple):
    """How engines round the inputs of a quantized linear layer."""

    format: str
    """A name in `FORMATS`."""
    scale: float | None
    """The scale that the checkpoint stores; None if engines choose it for each input."""


class StoredParts(NamedTuple):
    """A weight whose stored tensors are those of a format here."""

    scheme: Scheme
    rows: Mapping[str, str]
    """The stored tensors with the format's row parts, of the same bytes."""
    numbers: Mapping[str, float]
    """The parts of weight and inputs that are single numbers."""


class TensorCodec(ABC):
    """One way to store quantized weights.

    Attributes:
        name: The codec's key in `CODECS`.
        title: What messages call weights in this form.
        remark: What a user should know who quantizes weights in this form; empty if nothing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    remark: ClassVar[str] = ""

    @abstractmethod
    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        """Find the weights that this codec can decode; reads no tensor.

        Args:
            config: The content of config.json.
            tensors: The checkpoint's tensors that no other codec has claimed.

        Returns:
            The weights by the name under which they are presented; empty if there are none.

        Raises:
            SourceError: If parts of a weight are missing or do not fit each other.
        """

    @abstractmethod
    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        """Decode rows `start:stop` of a weight into `out`. Must be safe for many threads.

        Args:
            weight: One that this codec has claimed.
            start: The first row, of the presented weight's first dimension.
            stop: The row after the last.
            read: Reads rows of a stored tensor. Only those that are needed may be read, so that
                the memory used follows the rows and not the weight.
            out: A contiguous tensor of these rows' shape: bfloat16, float16 or float32.
        """

    def input_rounding(self, weight: EncodedWeight, read: ReadRows) -> InputRounding | None:
        """Return how engines round the inputs of a weight; None if they keep 16 bits."""
        return None

    def fp8(self, weight: EncodedWeight, read: ReadRows) -> FP8Weight | None:
        """Return the codes and scales of a matrix in FP8; None for any other weight."""
        return None

    def stored_parts(self, weight: EncodedWeight, read: ReadRows) -> StoredParts | None:
        """Return a weight's tensors as the parts of a format; None if no format here has them."""
        return None

    def hidden(self, tensors: Mapping[str, TensorInfo]) -> Collection[str]:
        """Return further tensors that exist for quantization only, such as scales of KV caches."""
        return ()


class MXFP4Codec(TensorCodec):
    """A codec of weights in MXFP4: E2M1 codes, and a power of two for each 32 inputs.

    Such weights can often be stored in NVFP4 without loss. `codes` and `exponents` are asked for
    one matrix [out, in] at a time: the weight itself, or one expert of it.
    """

    @abstractmethod
    def codes(
        self, weight: EncodedWeight, expert: int | None, rows: range, read: ReadRows
    ) -> torch.Tensor:
        """Return the codes of some outputs: U8 [rows, in/2], the low half of a byte first."""

    @abstractmethod
    def exponents(
        self, weight: EncodedWeight, expert: int | None, rows: range, read: ReadRows
    ) -> torch.Tensor:
        """Return the biased exponents of some outputs: U8 [rows, in/32], 127 for a scale of 1."""


CODECS: Registry[TensorCodec] = Registry(
    {
        "nvfp4_stacked": "fourfold.sources.codecs.nvfp4_stacked:StackedNVFP4",
        "modelopt_nvfp4": "fourfold.sources.codecs.modelopt_nvfp4:ModelOptNVFP4",
        "nvfp4_packed": "fourfold.sources.codecs.nvfp4_packed:NVFP4Packed",
        "mxfp4_gpt_oss": "fourfold.sources.codecs.mxfp4_gpt_oss:MXFP4GptOss",
        "mxfp4": "fourfold.sources.codecs.mxfp4:MXFP4",
        "int4_packed": "fourfold.sources.codecs.int4_packed:INT4Packed",
        "int8_packed": "fourfold.sources.codecs.int4_packed:INT8Packed",
        "int8_plain": "fourfold.sources.codecs.int8_plain:INT8Plain",
        "int4_awq": "fourfold.sources.codecs.int4_awq:INT4AWQ",
        "int4_gptq": "fourfold.sources.codecs.int4_gptq:INT4GPTQ",
        "int8_gptq": "fourfold.sources.codecs.int4_gptq:INT8GPTQ",
        "fp8_blocks": "fourfold.sources.codecs.fp8_blocks:FP8Blocks",
        "fp8_scaled": "fourfold.sources.codecs.fp8_scaled:FP8Scaled",
        "mxfp8": "fourfold.sources.codecs.fp8_scaled:MXFP8",
    }
)
"""The codecs by name. A tensor belongs to the first one that claims it."""


def presented(
    first: TensorInfo, key: str, shape: tuple[int, ...], config: Mapping[str, Any]
) -> TensorInfo:
    """Describe a weight as it is presented, in the place of the stored tensor `first`.

    Its dtype is the one that `config` names, BF16 if that names no floating-point dtype.
    """
    names = (
        str(part[key])
        for part in with_nested(config)
        for key in ("dtype", "torch_dtype")
        if key in part
    )
    dtype = next((FLOAT_DTYPES[name] for name in names if name in FLOAT_DTYPES), "BF16")
    return in_dtype(replace(first, key=key, shape=shape), dtype)


def in_dtype(info: TensorInfo, dtype: str) -> TensorInfo:
    """The same tensor in another dtype."""
    return replace(info, dtype=dtype, stop=info.start + nbytes_of(dtype, info.shape))


def positive_scale(name: str, scale: torch.Tensor) -> float:
    """Return a scalar scale; `DamagedError` unless it is positive and finite."""
    value = float(scale)
    if not (math.isfinite(value) and value > 0):
        raise DamagedError(
            f"{name}: {value}; a scale must be positive and finite. Quantize the model again."
        )
    return value


def slabs_for(
    weight: EncodedWeight, start: int, stop: int, tensors: Mapping[str, TensorInfo]
) -> Iterator[Slab]:
    """About the slabs of stored tensors that rows `start:stop` of a weight are decoded from."""
    rows = weight.info.rows
    for key in weight.parts.values():
        stored = tensors[key].rows
        yield key, start * stored // rows, -(-stop * stored // rows)
