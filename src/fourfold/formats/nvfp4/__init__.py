"""Tensors in, tensors out: E2M1 codes, E4M3 block scales, NVFP4 tensors and their kernels.

Nothing here knows of checkpoints, models or recipes, and nothing is imported but `errors`.
"""

from fourfold.formats.nvfp4.tensors import (
    BLOCK_SIZE,
    BlockScaleCensus,
    NVFP4Tensor,
    QuantizeStats,
    ScaleAlgorithm,
    amax,
    amaxes,
    block_scale_census,
    dequantize,
    dequantize_into,
    error_energy,
    global_scale,
    quantize,
    quantize_batch_into,
    quantize_into,
    warm_up,
    workspace_bytes,
)

__all__ = [
    "BLOCK_SIZE",
    "BlockScaleCensus",
    "NVFP4Tensor",
    "QuantizeStats",
    "ScaleAlgorithm",
    "amax",
    "amaxes",
    "block_scale_census",
    "dequantize",
    "dequantize_into",
    "error_energy",
    "global_scale",
    "quantize",
    "quantize_batch_into",
    "quantize_into",
    "warm_up",
    "workspace_bytes",
]
