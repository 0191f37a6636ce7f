# SPDX-License-Identifier: Apache-2.0
"""INT4 and INT8 as AutoGPTQ, GPTQModel and AutoRound store them.

    <linear>.qweight  I32  [in·bits/32, out]         <linear>.scales  F16  [groups, out]
    <linear>.qzeros   I32  [groups, out·bits/32]     <linear>.g_idx   I32  [in]

A word of `qweight` holds the codes of successive inputs, lowest bits first, and one of `qzeros`
those of successive outputs. The forms `gptq` and `auto_round:auto_gptq` store zeros less one,
subtracted from whole words, so that a zero of 0 borrows from the next; others store them as they
are.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fourfold.sources.codecs.integers import LOSES_AGAIN, unpacked
from fourfold.sources.codecs.transposed import TransposedIntegers


class GPTQIntegers(TransposedIntegers):
    """Reads GPTQ weights of one width."""

    outputs_per_word = 1
    methods = ("gptq", "auto-round")
    zero_offsets: ClassVar = {
        "gptq": 1,
        "gptq_v2": 0,
        "auto_round:auto_gptq": 1,
        "auto_round:gptqmodel": 0,
        "auto_round": 0,
    }

    def unpack(self, words: torch.Tensor, out: torch.Tensor) -> None:
        from fourfold.sources.codecs import int_cpu  # imports numba

        int_cpu.unpack_gptq(words, out, bits=self.bits)

    def unpack_zeros(self, words: torch.Tensor) -> torch.Tensor:
        return unpacked(words, self.bits)


class INT4GPTQ(GPTQIntegers):
    """Reads GPTQ weights of 4 bits."""

    name = "int4_gptq"
    title = "INT4 (GPTQ)"
    remark = LOSES_AGAIN
    bits = 4
    inputs_per_row = 8


class INT8GPTQ(GPTQIntegers):
    """Reads GPTQ weights of 8 bits."""

    name = "int8_gptq"
    title = "INT8 (GPTQ)"
    bits = 8
    inputs_per_row = 4
