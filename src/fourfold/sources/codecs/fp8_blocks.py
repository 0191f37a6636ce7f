# SPDX-License-Identifier: Apache-2.0
"""FP8 in blocks, as DeepSeek, Qwen, GLM, MiniMax and others publish it.

    <linear>.weight            F8_E4M3         [out, in]
    <linear>.weight_scale_inv  F32, BF16, E8M0 [⌈out/128⌉, ⌈in/128⌉]      transformers
    <linear>.weight_scale                      [⌈out/128⌉, ⌈in/128⌉]      compressed-tensors
    <linear>.weight_scale                      [⌈out/128⌉, 1, ⌈in/128⌉, 1] ModelOpt
    <linear>.scale, <linear>.qscale_weight     [⌈out/128⌉, ⌈in/128⌉]      DeepSeek, Mistral
    <experts>.gate_up_proj, <experts>.gate_up_proj_scale_inv: fused, with a first dimension more

A configuration may state another block size (`weight_block_size`, `block_structure`). A group of
each row may also be a block: [out, in/group].
"""

from __future__ import annotations

from fourfold.sources.codecs.fp8 import FP8Codec, Kind


class FP8Blocks(FP8Codec):
    """Reads FP8 weights with a scale for each block."""

    name = "fp8_blocks"
    title = "FP8 (blocks)"
    kind = Kind.BLOCK
