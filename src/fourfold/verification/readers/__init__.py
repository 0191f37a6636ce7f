# SPDX-License-Identifier: Apache-2.0
"""The layouts that `verify` reads: one reader each.

A reader says how a layout names and encodes the tensors of a quantized linear, and what its
configuration files state. It is written from the layout's published description and shares no code
with `fourfold.layouts`, which writes: a mistake there must not be repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold.errors import UnreadableError
from fourfold.verification.readers.base import LayoutReader
from fourfold.verification.readers.compressed_tensors import CompressedTensorsReader
from fourfold.verification.readers.modelopt import ModelOptReader

READERS: dict[str, type[LayoutReader]] = {
    "modelopt": ModelOptReader,
    "compressed-tensors": CompressedTensorsReader,
}
"""The readers by layout. A new layout is one more file with a reader, and one more entry here."""


def reader_of(folder: Path, config: Mapping[str, Any]) -> LayoutReader:
    """Return the reader of the checkpoint in `folder`, by what its configuration says."""
    # ModelOpt's reader comes last: it also takes a checkpoint whose `quant_method` is wrong or
    # missing, because that is a finding.
    for reader in reversed(READERS.values()):
        if reader.recognizes(folder, config):
            return reader.open(folder, config)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method is None:
        raise UnreadableError(
            f"{folder}: not an NVFP4 checkpoint (config.json has no quantization_config). Quantize "
            "the model first, and give the output's folder."
        )
    raise UnreadableError(
        f"{folder}: in the {method} layout. verify reads these layouts: {', '.join(READERS)}."
    )
