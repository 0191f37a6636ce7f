"""How a quantized checkpoint is laid out in files, so that inference engines load it."""

from fourfold.layouts.base import (
    LAYOUTS,
    CheckpointContents,
    Layout,
    TensorSpec,
    marker_files,
    quantization_of,
)

__all__ = [
    "LAYOUTS",
    "CheckpointContents",
    "Layout",
    "TensorSpec",
    "marker_files",
    "quantization_of",
]
