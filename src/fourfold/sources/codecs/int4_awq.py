# SPDX-License-Identifier: Apache-2.0
"""INT4 as AutoAWQ (version `gemm`) and AutoRound store it.

    <linear>.qweight  I32  [in, out/8]      <linear>.scales  F16  [in/group, out]
    <linear>.qzeros   I32  [in/group, out/8]

A word holds the codes of eight outputs; from its lowest bits on, they are 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fourfold.sources.codecs.integers import LOSES_AGAIN, unpacked
from fourfold.sources.codecs.transposed import TransposedIntegers

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word the code of each of eight outputs lies."""


class INT4AWQ(TransposedIntegers):
    """Reads AWQ weights."""

    name = "int4_awq"
    title = "INT4 (AWQ)"
    remark = LOSES_AGAIN
    bits = 4
    inputs_per_row = 1
    outputs_per_word = 8
    methods = ("awq", "auto-round")
    zero_offsets: ClassVar = {"gemm": 0, "auto_round:auto_awq": 0}

    def unpack(self, words: torch.Tensor, out: torch.Tensor) -> None:
        from fourfold.sources.codecs import int_cpu  # imports numba

        int_cpu.unpack_awq(words, out)

    def unpack_zeros(self, words: torch.Tensor) -> torch.Tensor:
        return unpacked(words, self.bits).view(len(words), -1, 8)[..., _PLACES].flatten(-2)
