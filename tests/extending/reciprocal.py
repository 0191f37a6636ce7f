# SPDX-License-Identifier: Apache-2.0
"""A layout in one file: own tensor names, global scales stored as reciprocals of shape [1].

What writes the layout and what verifies it share no line, as with the layouts of fourfold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import LAYOUTS, CheckpointContents, Layout
from fourfold.models.peculiarities import Peculiarities
from fourfold.verification.checkpoint import Checkpoint
from fourfold.verification.readers import READERS
from fourfold.verification.readers.base import (
    BLOCK_SCALE,
    GLOBAL_SCALE,
    INPUT_SCALE,
    W4A16,
    WEIGHT,
    LayoutReader,
    QuantConfig,
)
from fourfold.verification.rules import Finding


class Reciprocal(Layout):
    """Names every part `packed.<part>`, and lists what is quantized in a file of its own."""

    name = "reciprocal"
    marker_files = ("packed.json",)
    suffixes = {  # noqa: RUF012
        "nvfp4": {
            "codes": "packed_codes",
            "block_scale": "packed_scale",
            "global_scale": "packed_divisor",
            "input_scale": "packed_input_divisor",
        },
        "int8_rows": {"codes": "packed_codes", "row_scale": "packed_scale"},
        "int8_blocks": {"codes": "packed_codes", "row_scale": "packed_scale"},
    }

    def encoded(self, part: str, spec: tuple[str, tuple[int, ...]]) -> tuple[str, tuple[int, ...]]:
        return ("F32", (1,)) if part in ("global_scale", "input_scale") else spec

    def encode(self, part: str, value: float, scheme: Scheme) -> np.ndarray[Any, Any]:
        return 1 / super().encode(part, value, scheme)

    def is_leftover(self, name: str, dtype: str) -> bool:
        return ".packed_" in name

    def kv_scale_names(self, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
        return {}

    def ignore(
        self, quantized: Sequence[str], kept: Sequence[str], peculiar: Peculiarities
    ) -> list[str]:
        return sorted(kept)

    def quantization_config(self, contents: CheckpointContents) -> dict[str, Any]:
        return {"quant_method": self.name, "ignore": list(contents.ignore)}

    def config_files(self, contents: CheckpointContents) -> dict[str, dict[str, Any]]:
        return {"packed.json": {name: str(scheme) for name, scheme in contents.schemes.items()}}

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        entry = config.get("quantization_config")
        return isinstance(entry, Mapping) and entry.get("quant_method") == self.name


class ReciprocalReader(LayoutReader):
    leaves: ClassVar[Mapping[str, str]] = {
        WEIGHT: "packed_codes",
        BLOCK_SCALE: "packed_scale",
        GLOBAL_SCALE: "packed_divisor",
        INPUT_SCALE: "packed_input_divisor",
    }
    leftover = re.compile(r"_amax$")

    def __init__(self, ignore: Sequence[str]) -> None:
        self._ignore = tuple(ignore)

    @property
    def quant(self) -> QuantConfig:
        return QuantConfig(algo=W4A16, kv_cache=None, ignore=self._ignore, layers={})

    @classmethod
    def recognizes(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        return config.get("quantization_config", {}).get("quant_method") == "reciprocal"

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any]) -> LayoutReader:
        return cls(config["quantization_config"]["ignore"])

    def check(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        return iter(())

    def scale(self, part: str, value: float) -> float:
        return 1 / value


def register() -> None:
    """Make the layout known by its name."""
    LAYOUTS[Reciprocal.name] = Reciprocal()
    READERS[Reciprocal.name] = ReciprocalReader
