# SPDX-License-Identifier: Apache-2.0
"""A layout in one file: every format under the names that the codecs of sources know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fourfold.layouts.base import LAYOUTS, CheckpointContents, Layout
from fourfold.models.peculiarities import Peculiarities


class Plain(Layout):
    """ModelOpt's names, and FP8 as Hugging Face has it."""

    name = "plain"
    suffixes = {  # noqa: RUF012
        "nvfp4": {
            "codes": "weight",
            "block_scale": "weight_scale",
            "global_scale": "weight_scale_2",
            "input_scale": "input_scale",
        },
        "fp8": {"codes": "weight", "scale": "weight_scale", "input_scale": "input_scale"},
        "fp8_channel": {"codes": "weight", "scale": "weight_scale"},
        "fp8_block": {"codes": "weight", "scale": "weight_scale_inv"},
        "mxfp8": {"codes": "weight", "exponents": "weight_scale"},
    }

    def is_leftover(self, name: str, dtype: str) -> bool:
        return False

    def kv_scale_names(self, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
        return {}

    def ignore(
        self, quantized: Sequence[str], kept: Sequence[str], peculiar: Peculiarities
    ) -> list[str]:
        return sorted(kept)

    def quantization_config(self, contents: CheckpointContents) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            "ignore": list(contents.ignore),
            "quantized_layers": {name: str(x) for name, x in contents.schemes.items()},
        }

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        entry = config.get("quantization_config")
        return isinstance(entry, Mapping) and entry.get("quant_method") == self.name


def register() -> None:
    """Make the layout known by its name."""
    LAYOUTS[Plain.name] = Plain()
