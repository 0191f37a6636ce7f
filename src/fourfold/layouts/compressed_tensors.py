# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors layout: that of llm-compressor, which vLLM, SGLang and transformers read.

    <linear>.weight_packed        U8       [out, in/2]   two E2M1 codes a byte, low nibble first
    <linear>.weight_scale         F8_E4M3  [out, in/16]  block scales
    <linear>.weight_global_scale  F32      [1]           the reciprocal of the global scale
    <linear>.input_global_scale   F32      [1]           W4A4 only: (6·448) / largest input
    <attention>.k_scale, .v_scale F32      [1]           calibrated FP8 KV cache: amax / 448

    FP8   <linear>.weight F8_E4M3 [out, in], .weight_scale F32: [1] with .input_scale F32 [1],
          [out, 1] for channels, [⌈out/128⌉, in/128] for blocks; U8 [out, in/32] for MXFP8

A value is code · (block scale / weight_global_scale), in FP8 code · scale: reciprocals belong to
NVFP4 alone. `config.json` gets one more key, `quantization_config`, and is otherwise the source's;
there is no other configuration file. Every kind of scheme is a group of `config_groups`; the
targets of several groups are explicit.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourfold._version import __version__
from fourfold.errors import PlanError
from fourfold.formats.base import Spec
from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import CheckpointContents, Layout, check_some_nvfp4, layers_of_keys
from fourfold.models import config_groups
from fourfold.models.config_groups import LIBRARY, LINEAR, head_targets, write_targets
from fourfold.models.peculiarities import Peculiarities

_LEFTOVER = re.compile(
    r"(_amax|_quantizer(\..*)?|\.weight_scale_2|\.input_scale|\.pre_quant_scale"
    r"|\.weight_zero_point|\.weight_shape|\.weight_g_idx)$"
)


@dataclass(frozen=True)
class Stored:
    """How this layout describes a weight format."""

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str | None, Mapping[str, Any] | None]
    """By the format that activations are rounded to; None for 16 bits."""


def _float(num_bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": "float", "symmetric": True, **more}


_FP4 = _float(
    4, group_size=16, strategy="tensor_group", scale_dtype="torch.float8_e4m3fn", dynamic=False
)
_TENSOR = _float(8, strategy="tensor", dynamic=False)
_MX = _float(8, group_size=32, strategy="group", scale_dtype="torch.uint8", dynamic=False)

STORED: Mapping[str, Stored] = {
    "nvfp4": Stored(
        "nvfp4-pack-quantized",
        _FP4,
        {None: None, "nvfp4": {**_FP4, "dynamic": "local", "observer": "static_minmax"}},
    ),
    "fp8": Stored("float-quantized", _TENSOR, {"fp8": {**_TENSOR, "observer": "static_minmax"}}),
    "fp8_channel": Stored(
        "float-quantized",
        _float(8, strategy="channel", dynamic=False),
        {"fp8_channel": _float(8, strategy="token", dynamic=True)},
    ),
    "fp8_block": Stored(
        "float-quantized",
        _float(8, strategy="block", block_structure=[128, 128], dynamic=False),
        {"fp8_block": _float(8, group_size=128, strategy="group", dynamic=True)},
    ),
    "mxfp8": Stored("mxfp8-quantized", _MX, {"mxfp8": {**_MX, "dynamic": True}}),
}
"""By weight format: the presets of the library."""

_SCALED = {"codes": "weight", "scale": "weight_scale"}

Kind = tuple[str, str | None]
"""The formats of weights and activations, which make a group."""


class CompressedTensors(Layout):
    """The layout that llm-compressor writes, by the library compressed-tensors."""

    name = LIBRARY
    kv_scale = ("F32", (1,))
    needs_kv_scales = True  # transformers takes 0
    suffixes = {  # noqa: RUF012
        "nvfp4": {
            "codes": "weight_packed",
            "block_scale": "weight_scale",
            "global_scale": "weight_global_scale",
            "input_scale": "input_global_scale",
        },
        "fp8": {**_SCALED, "input_scale": "input_scale"},
        "fp8_channel": _SCALED,
        "fp8_block": _SCALED,
        "mxfp8": {"codes": "weight", "exponents": "weight_scale"},
    }

    def check(self, schemes: Mapping[str, Scheme], peculiar: Peculiarities) -> None:
        for linear, scheme in schemes.items():
            stored = STORED.get(scheme.weights)
            if stored is None:
                raise PlanError(
                    f"{linear}: the {self.name} layout has no names for {scheme.weights} weights. "
                    f"Choose weights: {{format: {' | '.join(STORED)}}}."
                )
            if scheme.activations not in stored.inputs:
                none = "none, or " if None in stored.inputs else ""
                raise PlanError(
                    f"{linear}: the {self.name} layout cannot say {scheme}. "
                    f"Choose activations: {none}{{format: {scheme.weights}}}."
                )
        check_some_nvfp4(schemes)
        self._check_groups(schemes, peculiar)

    def _check_groups(self, schemes: Mapping[str, Scheme], peculiar: Peculiarities) -> None:
        """Raise `PlanError` unless every reader finds the group of every weight."""
        targets = {name: group["targets"] for name, group in _groups(schemes, peculiar).items()}
        names = dict(zip(_linears(schemes), targets, strict=True))
        own = {linear: names[_kind_of(scheme)] for linear, scheme in schemes.items()}
        for mismatch in config_groups.check(config_groups.Stated(targets, ()), own, (), peculiar):
            raise PlanError(
                f"{mismatch.engine}: {mismatch.module} would be {mismatch.found}: no targets tell "
                "the groups of the layout apart. Give it and what is called like it the same "
                "weights and activations in the recipe."
            )

    def encoded(self, part: str, spec: Spec) -> Spec:
        """As it is, but for single numbers [1], and scales of channels [out, 1]."""
        dtype, shape = spec
        return dtype, (*shape, 1) if len(shape) < 2 else shape

    def encode(self, part: str, value: float, scheme: Scheme) -> np.ndarray[Any, Any]:
        number = super().encode(part, value, scheme)
        return 1 / number if scheme.weights == "nvfp4" else number

    def is_leftover(self, name: str, dtype: str) -> bool:
        return bool(_LEFTOVER.search(name))

    def kv_scale_names(self, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
        return {
            module: (f"{module}.{self.k_scale}", f"{module}.{self.v_scale}")
            for module in layers_of_keys(linears)
        }

    def ignore(
        self, quantized: Sequence[str], kept: Sequence[str], peculiar: Peculiarities
    ) -> list[str]:
        return config_groups.write_ignore(quantized, kept, peculiar)

    def quantization_config(self, contents: CheckpointContents) -> dict[str, Any]:
        groups = _groups(contents.schemes, contents.peculiar)
        formats = list(dict.fromkeys(group["format"] for group in groups.values()))
        return {
            "quant_method": self.name,
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(contents.ignore),
            "kv_cache_scheme": None if contents.kv_cache is None else dict(_TENSOR),
            "global_compression_ratio": None,
            "producer": {"name": "fourfold", "version": __version__},
        }

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        entry = config.get("quantization_config")
        return isinstance(entry, Mapping) and entry.get("quant_method") == self.name


def _groups(schemes: Mapping[str, Scheme], peculiar: Peculiarities) -> dict[str, dict[str, Any]]:
    """The groups, in the order in which their weights come. One group alone targets all layers."""
    linears, groups = _linears(schemes), {}
    for number, (kind, names) in enumerate(linears.items()):
        stored = STORED[kind[0]]
        is_alone = len(linears) == 1
        if is_alone:
            targets = [LINEAR, *head_targets(names)]
        else:
            others = (name for other in linears if other != kind for name in linears[other])
            targets = write_targets(names, others, peculiar)
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": copy.deepcopy(stored.weights),
            "input_activations": copy.deepcopy(stored.inputs[kind[1]]),
            "output_activations": None,
            "format": stored.format,
        }
    return groups


def _linears(schemes: Mapping[str, Scheme]) -> Mapping[Kind, list[str]]:
    linears: dict[Kind, list[str]] = defaultdict(list)
    for linear, scheme in schemes.items():
        linears[_kind_of(scheme)].append(linear)
    return linears


def _kind_of(scheme: Scheme) -> Kind:
    return scheme.weights, scheme.activations
