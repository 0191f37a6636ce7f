# SPDX-License-Identifier: Apache-2.0
"""INT4 and INT8 as AutoGPTQ and GPTQModel store them.

    <linear>.qweight  I32  [in·bits/32, out]         <linear>.scales  F16  [groups, out]
    <linear>.qzeros   I32  [groups, out·bits/32]     <linear>.g_idx   I32  [in]

A word of `qweight` holds the codes of successive inputs, lowest bits first, and one of `qzeros`
those of successive outputs. The format `gptq` stores zeros less one, modulo 16 or 256; the format
`gptq_v2` stores them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fourfold.sources.codecs.integers import unpacked
from fourfold.sources.codecs.transposed import TransposedIntegers

_OFFSETS = {"gptq": 1, "gptq_v2": 0}


class GPTQIntegers(TransposedIntegers):
    """Reads GPTQ weights of one width."""

    outputs_per_word = 1

    def unpack(self, words: torch.Tensor, out: torch.Tensor) -> None:
        from fourfold.sources.codecs import int_cpu  # imports numba

        int_cpu.unpack_gptq(words, out, bits=self.bits)

    def unpack_zeros(self, words: torch.Tensor) -> torch.Tensor:
        return unpacked(words, self.bits)

    def zero_offset(self, config: Mapping[str, Any]) -> int | None:
        stated = config.get("quantization_config")
        form = stated.get("checkpoint_format") if isinstance(stated, dict) else None
        return _OFFSETS.get(str(form or "gptq").lower())


class INT4GPTQ(GPTQIntegers):
    """Reads GPTQ weights of 4 bits."""

    name = "int4_gptq"
    title = "INT4 (GPTQ)"
    bits = 4
    inputs_per_row = 8


class INT8GPTQ(GPTQIntegers):
    """Reads GPTQ weights of 8 bits."""

    name = "int8_gptq"
    title = "INT8 (GPTQ)"
    bits = 8
    inputs_per_row = 4
