# SPDX-License-Identifier: Apache-2.0
"""How a quantized checkpoint is laid out in files, so that inference engines load it."""

from fourfold.layouts.base import LAYOUTS, marker_files
from fourfold.layouts.recognition import quantization_of

__all__ = ["LAYOUTS", "marker_files", "quantization_of"]
