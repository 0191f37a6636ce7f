# SPDX-License-Identifier: Apache-2.0
"""What AWQ and GPTQ have in common: packed codes that lie transposed, inputs first.

    <linear>.qweight  I32             AWQ [in, out/8] · GPTQ [in·bits/32, out]
    <linear>.qzeros   I32             [groups, out·bits/32]
    <linear>.scales   F16, BF16, F32  [groups, out]
    <linear>.g_idx    I32             [in], GPTQ only: the group of each input

Rows of the presented weight are outputs, so some rows need a part of every stored row. They are
decoded from a few inputs at a time. The product is taken in the dtype of the scales, as AutoAWQ and
GPTQModel do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fourfold.errors import SourceError
from fourfold.layouts.recognition import stated_quantizations
from fourfold.sources.codecs.base import REMEDY, EncodedWeight, ReadRows, TensorCodec, presented
from fourfold.sources.codecs.integers import (
    CHUNK,
    SCALE_DTYPES,
    check_finite,
    groups_of,
)
from fourfold.storage.safetensors_header import TensorInfo

_FORM_NAMES = ("packing_format", "checkpoint_format", "format", "version")
"""Names that AutoRound, AutoGPTQ, GPTQModel and AutoAWQ give to the form of a checkpoint."""

CODES, ZEROS, SCALES, INDEX = "qweight", "qzeros", "scales", "g_idx"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransposedWeight(EncodedWeight):
    """One weight that is stored with its inputs first."""

    groups: int
    zero_offset: int
    """What is added to a stored zero."""


class TransposedIntegers(TensorCodec):
    """Reads weights that are stored with their inputs first.

    Attributes:
        bits: The bits of a code.
        inputs_per_row: The inputs that a row of `qweight` holds.
        outputs_per_word: The outputs that one of its words holds.
        methods: The tools that store weights so, as `quant_method` names them.
        zero_offsets: What is added to stored zeros, by the form that a configuration states; the
            first is meant if it states none. Shapes do not show it, so other forms are not claimed.
    """

    bits: ClassVar[int]
    inputs_per_row: ClassVar[int]
    outputs_per_word: ClassVar[int]
    methods: ClassVar[tuple[str, ...]]
    zero_offsets: ClassVar[Mapping[str, int]]

    @abstractmethod
    def unpack(self, words: torch.Tensor, out: torch.Tensor) -> None:
        """Spread words of `qweight` over U8 codes [outputs, inputs]."""

    @abstractmethod
    def unpack_zeros(self, words: torch.Tensor) -> torch.Tensor:
        """Return the stored zeros in words of `qzeros`: I32 [groups, outputs]."""

    def claim(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> Mapping[str, EncodedWeight]:
        offset = _zero_offset(self, config)
        if offset is None:
            return {}
        return {
            (key := f"{info.key.rpartition('.')[0]}.weight"): _weight(
                self, key, info, tensors, offset, config
            )
            for info in tensors.values()
            if info.key.endswith(f".{CODES}") and _is_stored_so(self, info, tensors)
        }

    def decode(
        self, weight: EncodedWeight, start: int, stop: int, read: ReadRows, out: torch.Tensor
    ) -> None:
        assert isinstance(weight, TransposedWeight)
        from fourfold.sources.codecs import int_cpu  # imports numba

        inputs, outputs = weight.info.shape[1], stop - start
        width = -(-inputs // weight.groups)
        groups = torch.empty(0, dtype=torch.int32)
        if INDEX in weight.parts:
            index = read(weight.parts[INDEX], 0, inputs)
            groups = groups_of(weight.parts[INDEX], index, width, weight.groups)
        scales = read(weight.parts[SCALES], 0, weight.groups)[:, start:stop].T.contiguous()
        check_finite(weight.parts[SCALES], scales)
        zeros = self._zeros(weight, start, stop, read)
        first_word, last_word = start // self.outputs_per_word, -(-stop // self.outputs_per_word)
        skipped = start - first_word * self.outputs_per_word
        wide = (last_word - first_word) * self.outputs_per_word
        step = max(1, CHUNK // (wide * self.inputs_per_row)) * self.inputs_per_row
        for left in range(0, inputs, step):
            size = min(step, inputs - left)
            codes = torch.empty(wide, size, dtype=torch.uint8)
            rows = left // self.inputs_per_row, (left + size) // self.inputs_per_row
            words = read(weight.parts[CODES], *rows)[:, first_word:last_word]
            self.unpack(words.contiguous(), codes)
            int_cpu.decode(
                codes[skipped : skipped + outputs],
                scales,
                zeros,
                out,
                bits=8,
                width=width,
                groups=groups.numpy(),
                left=left,
            )

    def _zeros(
        self, weight: TransposedWeight, start: int, stop: int, read: ReadRows
    ) -> torch.Tensor:
        """The zeros of some outputs: float32 [outputs, groups]."""
        per_word = 32 // self.bits
        first, last = start // per_word, -(-stop // per_word)
        words = read(weight.parts[ZEROS], 0, weight.groups)[:, first:last]
        ones = sum(1 << shift for shift in range(0, 32, self.bits))
        words = words + ones * weight.zero_offset  # of a whole word: a carry undoes a borrow
        zeros = self.unpack_zeros(words)[:, start - first * per_word :][:, : stop - start]
        return zeros.T.float().contiguous()


def _zero_offset(codec: TransposedIntegers, config: Mapping[str, Any]) -> int | None:
    """What is added to stored zeros; None if a configuration states another form."""
    stated = next(stated_quantizations(config), {})
    method = str(stated.get("quant_method") or codec.methods[0]).lower().removeprefix("intel/")
    names = (str(stated[name]).lower() for name in _FORM_NAMES if stated.get(name))
    form = next(names, next(iter(codec.zero_offsets)))
    return codec.zero_offsets.get(form) if method in codec.methods else None


def _is_stored_so(
    codec: TransposedIntegers, codes: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> bool:
    """By the outputs, which the scales show; and the bits of a code, which the zeros show.

    Raises:
        SourceError: There are zeros, but no scales.
    """
    stem = codes.key.rpartition(".")[0]
    scales, zeros = (tensors.get(f"{stem}.{part}") for part in (SCALES, ZEROS))
    if scales is None and zeros is not None and codes.dtype == "I32":
        raise SourceError(f"{stem}.{SCALES}: missing beside {codes.key}. {REMEDY}")
    if codes.dtype != "I32" or len(codes.shape) != 2 or scales is None or len(scales.shape) != 2:
        return False
    outputs = codes.shape[1] * codec.outputs_per_word
    is_so = scales.shape[1] == outputs
    if zeros is None or len(zeros.shape) != 2:
        return is_so and codec.bits == 4
    return is_so and zeros.shape[1] * 32 == outputs * codec.bits


def _weight(
    codec: TransposedIntegers,
    key: str,
    codes: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    offset: int,
    config: Mapping[str, Any],
) -> TransposedWeight:
    """Describe a weight, whose parts must fit each other."""
    stem = key.removesuffix(".weight")
    names = {part: f"{stem}.{part}" for part in (CODES, ZEROS, SCALES, INDEX)}
    names = {part: name for part, name in names.items() if name in tensors}
    if ZEROS not in names:
        raise SourceError(f"{stem}.{ZEROS}: missing beside {codes.key}. {REMEDY}")
    scales = tensors[names[SCALES]]
    inputs, (groups, outputs) = codes.shape[0] * codec.inputs_per_row, scales.shape
    wanted: dict[str, tuple[int, ...]] = {
        SCALES: (groups, outputs),
        ZEROS: (groups, outputs * codec.bits // 32),
    }
    wanted |= {INDEX: (inputs,)} if INDEX in names else {}
    dtypes: dict[str, tuple[str, ...]] = {SCALES: SCALE_DTYPES, ZEROS: ("I32",)}
    for part, shape in wanted.items():
        info = tensors[names[part]]
        if info.shape != shape or info.dtype not in dtypes.get(part, ("I32", "I64")):
            raise _misfit(info, codes)
    if not inputs * groups * outputs or (inputs % groups and INDEX not in names):
        raise _misfit(scales, codes)
    return TransposedWeight(
        presented(codes, key, (outputs, inputs), config), names, groups=groups, zero_offset=offset
    )


def _misfit(info: TensorInfo, codes: TensorInfo) -> SourceError:
    return SourceError(
        f"{info.key}: {info.dtype} {list(info.shape)} does not fit {codes.key} "
        f"{list(codes.shape)}. {REMEDY}"
    )
