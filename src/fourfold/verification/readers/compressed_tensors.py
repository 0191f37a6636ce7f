# SPDX-License-Identifier: Apache-2.0
"""The layout of compressed-tensors, as llm-compressor writes it and engines read it.

    config.json   {"quantization_config": {"quant_method": "compressed-tensors", "format",
                   "quantization_status", "config_groups": {name: {"targets", "weights", …}},
                   "ignore", "kv_cache_scheme"}}

Global and input scales are stored as reciprocals of shape [1]. A checkpoint with groups in other
formats than NVFP4 is not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fourfold.errors import UnreadableError
from fourfold.formats.base import FORMATS
from fourfold.models.config_groups import Groups, Stated, check
from fourfold.models.engines import Mismatch
from fourfold.models.peculiarities import Peculiarities
from fourfold.storage.names import CONFIG, HF_QUANT_CONFIG
from fourfold.verification.readers.base import (
    BLOCK_SCALE,
    GLOBAL_SCALE,
    INPUT_SCALE,
    MIXED,
    W4A4,
    W4A16,
    WEIGHT,
    LayoutReader,
    QuantConfig,
)
from fourfold.verification.rules import Finding, finding

if TYPE_CHECKING:
    from fourfold.verification.checkpoint import Checkpoint

METHOD, FORMAT = "compressed-tensors", "nvfp4-pack-quantized"
NO_GROUP = "no group"

WEIGHTS: Mapping[str, tuple[object, ...]] = {
    "num_bits": (4,),
    "type": ("float",),
    "strategy": ("tensor_group",),
    "group_size": (FORMATS["nvfp4"].block,),
    "symmetric": (True,),
    "dynamic": (False,),
    "scale_dtype": ("torch.float8_e4m3fn", None),
}
"""The arguments of NVFP4 weights, and what they may be."""
INPUTS = {**WEIGHTS, "dynamic": ("local",)}
CACHE: Mapping[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("tensor", "attn_head"),
    "symmetric": (True,),
    "dynamic": (False,),
}
DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
"""What an argument is that the configuration leaves out, but for `kv_cache_scheme`."""


@dataclass(frozen=True)
class GroupsConfig(QuantConfig):
    """The quantization as config.json states it."""

    stated: Stated
    groups: Groups
    """Those that are stated, for lookups."""
    algos: Mapping[str, str]
    """The algorithm of each group."""

    def algo_of(self, linear: str) -> str | None:
        stated = self.algos.get(self.groups.of_linear(linear) or "")
        return stated or (None if self.algo == MIXED else self.algo)


class CompressedTensorsReader(LayoutReader):
    """Reads a checkpoint in the layout of compressed-tensors."""

    leaves: ClassVar[Mapping[str, str]] = {
        WEIGHT: "weight_packed",
        BLOCK_SCALE: "weight_scale",
        GLOBAL_SCALE: "weight_global_scale",
        INPUT_SCALE: "input_global_scale",
    }
    leftover = re.compile(
        r"(_amax|_quantizer(\..*)?|\.weight_scale_2|\.input_scale|\.pre_quant_scale"
        r"|\.weight_zero_point|\.input_zero_point|\.weight_shape|\.weight_g_idx)$"
    )
    number: ClassVar[tuple[int, ...]] = (1,)
    kv_dtypes: ClassVar[Collection[str]] = ("F32", "BF16", "F16")

    def __init__(self, stated: Mapping[str, Any], quant: GroupsConfig) -> None:
        """`stated` is `quantization_config`, and `quant` what it means."""
        self.stated, self.quant, self.config = stated, quant, quant

    @classmethod
    def recognizes(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Return True if the method or the format is that of the library."""
        stated = config.get("quantization_config")
        if not isinstance(stated, Mapping):
            return False
        return stated.get("quant_method") == METHOD or stated.get("format") == FORMAT

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any]) -> CompressedTensorsReader:
        stated = config["quantization_config"]
        groups = stated.get("config_groups")
        groups = groups if isinstance(groups, dict) else {}
        ignore = _names(stated.get("ignore") or [], "ignore")
        targets, algos = {}, {}
        for name, group in groups.items():
            if not _claims_nvfp4(group, stated):
                raise UnreadableError(
                    f"{folder}: {name} of config_groups is not in NVFP4, which is all that verify "
                    f"reads in the {METHOD} layout."
                )
            targets[name] = _names(group.get("targets") or [], f"targets of {name}")
            algos[name] = W4A4 if group.get("input_activations") else W4A16
        if not groups:
            raise UnreadableError(
                f"{folder}: not an NVFP4 checkpoint (quantization_config has no config_groups). "
                "Quantize the model first, and give the output's folder."
            )
        kinds = set(algos.values())
        quant = GroupsConfig(
            algo=kinds.pop() if len(kinds) == 1 else MIXED,
            kv_cache=_kv_cache(stated.get("kv_cache_scheme")),
            ignore=tuple(ignore),
            layers={},
            stated=Stated(targets, ignore),
            groups=Groups.of(targets, ignore),
            algos=algos,
        )
        return cls(stated, quant)

    def check(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        """Yield the findings on `quantization_config`."""
        stated = self.stated
        if stated.get("quant_method") != METHOD:
            yield finding("quant-method", CONFIG, f"quant_method {stated.get('quant_method')}")
        if stated.get("quantization_status") != "compressed":
            text = f"quantization_status {stated.get('quantization_status')}"
            yield finding("config-status", CONFIG, text)
        if (checkpoint.folder / HF_QUANT_CONFIG).is_file():
            text = f"lies beside a config.json in the {METHOD} layout"
            yield finding("config-disagrees", HF_QUANT_CONFIG, text)
        for name, group in stated["config_groups"].items():
            yield from self._check_group(name, group)
        if (scheme := stated.get("kv_cache_scheme")) is not None:
            faults = _faults(scheme, CACHE, {})
            if faults:
                yield finding("kv-cache-scheme", CONFIG, ", ".join(faults))

    def _check_group(self, name: str, group: Mapping[str, Any]) -> Iterator[Finding]:
        stored = group.get("format") or self.stated.get("format")
        if stored != FORMAT:
            yield finding("config-format", CONFIG, f"{name}: format {stored}")
        for part, allowed in (("weights", WEIGHTS), ("input_activations", INPUTS)):
            args = group.get(part)
            if args is None and part == "input_activations":
                continue
            if isinstance(args, dict) and args.get("group_size") not in allowed["group_size"]:
                text = f"{name}.{part}: group_size {args.get('group_size')}"
                yield finding("group-size", CONFIG, text)
                continue
            if faults := _faults(args, allowed, DEFAULTS):
                yield finding("config-groups", CONFIG, f"{name}.{part}: {', '.join(faults)}")
        if group.get("output_activations"):
            yield finding("config-groups", CONFIG, f"{name}.output_activations: there are some")

    def mismatches(
        self,
        quantized: Collection[str],
        unquantized: Collection[str],
        peculiar: Peculiarities,
    ) -> list[Mismatch]:
        groups = self.config.groups
        own = {name: groups.naming(name) or groups.of_class(name) or NO_GROUP for name in quantized}
        return check(self.config.stated, own, unquantized, peculiar)

    def scale(self, part: str, value: float) -> float:
        """Return the reciprocal, rounded to float32 as engines do."""
        import numpy as np

        with np.errstate(divide="ignore", over="ignore"):
            return float(np.float32(1) / np.float32(value))


def _names(entries: object, what: str) -> list[str]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UnreadableError(f"{CONFIG}: {what} is not a list of names")
    return entries


def _claims_nvfp4(group: object, stated: Mapping[str, Any]) -> bool:
    """True if a group means to be in NVFP4, be it right or wrong in a detail."""
    if not isinstance(group, dict):
        return False
    stored = group.get("format") or stated.get("format")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return stored == FORMAT
    is_fp4 = (weights.get("num_bits"), weights.get("type")) == (4, "float")
    return stored == FORMAT or (is_fp4 and weights.get("strategy") == "tensor_group")


def _faults(
    args: object, allowed: Mapping[str, tuple[object, ...]], defaults: Mapping[str, object]
) -> list[str]:
    """The arguments that are none of the allowed values; True and 1 are not the same."""
    if not isinstance(args, dict):
        return [f"{args!r:.80}"]
    values = {key: args.get(key, defaults.get(key)) for key in allowed}
    return [
        f"{key} {value!r:.80}"
        for key, value in values.items()
        if not any(value is x or (type(value) is type(x) and value == x) for x in allowed[key])
    ]


def _kv_cache(scheme: object) -> str | None:
    if scheme is None:
        return None
    bits = (scheme.get("num_bits"), scheme.get("type")) if isinstance(scheme, dict) else None
    return "FP8" if bits == (8, "float") else str(scheme)[:80]
