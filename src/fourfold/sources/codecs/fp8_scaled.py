# SPDX-License-Identifier: Apache-2.0
"""FP8 per tensor or channel, and MXFP8, as ModelOpt, compressed-tensors and FBGEMM write them.

    <linear>.weight        F8_E4M3   [out, in]
    <linear>.weight_scale  F32, BF16 [], [1] or [1, 1] · [out] or [out, 1]
    <experts>.gate_up_proj and its scales: [], [E], [E, 1, 1] · [E, out], [E, 1, out], [E, out, 1]
    MXFP8                  U8, E8M0  [out, in/32] exponents

A fused gate_up_proj [E, 2·out, in] may have a scale for each half: [E, 2, 1].
"""

from __future__ import annotations

from fourfold.sources.codecs.fp8 import FP8Codec, Kind


class FP8Scaled(FP8Codec):
    """Reads FP8 weights with a scale for the whole weight, or for each channel."""

    name = "fp8_scaled"
    title = "FP8 (per tensor or channel)"
    kind = Kind.CHANNEL


class MXFP8(FP8Codec):
    """Reads FP8 weights with an exponent for each 32 weights of a row."""

    name = "mxfp8"
    title = "MXFP8"
    kind = Kind.MX
