# SPDX-License-Identifier: Apache-2.0
"""The layout of compressed-tensors, as llm-compressor writes it and engines read it.

    config.json   {"quantization_config": {"quant_method": "compressed-tensors", "format",
                   "quantization_status", "config_groups": {name: {"targets", "weights", …}},
                   "ignore", "kv_cache_scheme"}}

Global and input scales of NVFP4 are stored as reciprocals of shape [1]. A group of FP8 has tensors
of other names, and multipliers:

    <linear>.weight F8_E4M3 [out, in]     .weight_scale
    strategy tensor, static inputs        F32 [1], and .input_scale F32 [1]
    strategy channel, inputs by token     F32 [out, 1]
    strategy block, inputs by 128         F32 [⌈out/128⌉, ⌈in/128⌉]
    mxfp8-quantized                       U8 [out, in/32]

A checkpoint with groups in other formats is not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fourfold.errors import UnreadableError
from fourfold.models.config_groups import Groups, Stated, check
from fourfold.models.engines import Mismatch
from fourfold.models.peculiarities import Peculiarities
from fourfold.storage.names import CONFIG, HF_QUANT_CONFIG
from fourfold.verification.fp8 import ALGOS, Algo
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

METHOD, MIXED_FORMAT = "compressed-tensors", "mixed-precision"
NVFP4_FORMAT, FLOAT_FORMAT, MX_FORMAT = (
    "nvfp4-pack-quantized",
    "float-quantized",
    "mxfp8-quantized",
)
NO_GROUP = "no group"

Allowed = Mapping[str, tuple[object, ...]]
"""The arguments of weights or inputs, and what they may be."""


def _float(
    bits: int, strategy: str, size: int | None = None, **more: tuple[object, ...]
) -> Allowed:
    return {
        "num_bits": (bits,),
        "type": ("float",),
        "strategy": (strategy,),
        "group_size": (size,),
        "symmetric": (True,),
        "dynamic": (False,),
        **more,
    }


@dataclass(frozen=True)
class Form:
    """How a group describes one algorithm."""

    algo: str
    format: str
    weights: Allowed
    inputs: Allowed | None


_FP4 = _float(4, "tensor_group", 16, scale_dtype=("torch.float8_e4m3fn", None))
_MX = _float(8, "group", 32, scale_dtype=("torch.uint8",))

FORMS = (
    Form(W4A4, NVFP4_FORMAT, _FP4, {**_FP4, "dynamic": ("local",)}),
    Form(W4A16, NVFP4_FORMAT, _FP4, None),
    Form("FP8", FLOAT_FORMAT, _float(8, "tensor"), _float(8, "tensor")),
    Form(
        "FP8_PER_CHANNEL_PER_TOKEN",
        FLOAT_FORMAT,
        _float(8, "channel"),
        _float(8, "token", dynamic=(True,)),
    ),
    Form(
        "FP8_PB_WO",
        FLOAT_FORMAT,
        _float(8, "block", block_structure=([128, 128],)),
        _float(8, "group", 128, dynamic=(True,)),
    ),
    Form("MXFP8", MX_FORMAT, _MX, {**_MX, "dynamic": (True,)}),
)
CACHE: Allowed = {
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
    forms: Mapping[str, Form]
    """What each group describes."""

    def algo_of(self, linear: str) -> str | None:
        """Return the algorithm of the group that names a linear, whatever `ignore` says of it."""
        form = self.forms.get(self.group_of(linear))
        return form.algo if form else None if self.algo == MIXED else self.algo

    def group_of(self, linear: str) -> str:
        """Return the group whose targets name a linear, or its class."""
        return self.groups.naming(linear) or self.groups.of_class(linear) or NO_GROUP


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
    fp8: ClassVar[Mapping[str, Algo]] = {
        "FP8": ALGOS["FP8"],
        "FP8_PER_CHANNEL_PER_TOKEN": replace(
            ALGOS["FP8_PER_CHANNEL_PER_TOKEN"], scales=lambda rows, _: ((rows, 1),)
        ),
        "FP8_PB_WO": replace(
            ALGOS["FP8_PB_WO"], scales=lambda rows, columns: ((-(-rows // 128), columns // 128),)
        ),
        "MXFP8": ALGOS["MXFP8"],
    }
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
        return stated.get("quant_method") == METHOD or stated.get("format") == NVFP4_FORMAT

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any]) -> CompressedTensorsReader:
        stated = config["quantization_config"]
        groups = stated.get("config_groups")
        groups = groups if isinstance(groups, dict) else {}
        ignore = _names(stated.get("ignore") or [], "ignore")
        targets, forms = {}, {}
        for name, group in groups.items():
            form = _form_of(group, stated)
            if form is None:
                raise UnreadableError(
                    f"{folder}: {name} of config_groups is neither in NVFP4 nor in FP8, which is "
                    f"all that verify reads in the {METHOD} layout."
                )
            targets[name] = _names(group.get("targets") or [], f"targets of {name}")
            forms[name] = form
        kinds = {form.algo for form in forms.values()}
        if not kinds & {W4A4, W4A16}:
            says = ", ".join(sorted(kinds)) or "nothing"
            raise UnreadableError(
                f"{folder}: not an NVFP4 checkpoint (config_groups of quantization_config say "
                f"{says}). Quantize the model first, and give the output's folder."
            )
        quant = GroupsConfig(
            algo=kinds.pop() if len(kinds) == 1 else MIXED,
            kv_cache=_kv_cache(stated.get("kv_cache_scheme")),
            ignore=tuple(ignore),
            layers={},
            stated=Stated(targets, ignore),
            groups=Groups.of(targets, ignore),
            forms=forms,
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
        yield from self._check_format()
        for name, group in stated["config_groups"].items():
            yield from self._check_group(name, group, self.config.forms[name])
        for name, linear in checkpoint.linears.items():
            if linear.algo not in (W4A4, W4A16, None):
                text = f"packed as NVFP4, in a group of {linear.algo}"
                yield finding("config-targets", name, text)
        if (scheme := stated.get("kv_cache_scheme")) is not None:
            faults = _faults(scheme, CACHE, {})
            if faults:
                yield finding("kv-cache-scheme", CONFIG, ", ".join(faults))

    def _check_format(self) -> Iterator[Finding]:
        """The format of the whole is that of all groups, or says that they differ."""
        formats = {form.format for form in self.config.forms.values()}
        wanted = formats.pop() if len(formats) == 1 else MIXED_FORMAT
        if self.stated.get("format") != wanted:
            text = f"format {self.stated.get('format')}, should be {wanted}"
            yield finding("config-format", CONFIG, text)

    def _check_group(self, name: str, group: Mapping[str, Any], form: Form) -> Iterator[Finding]:
        stored = group.get("format") or self.stated.get("format")
        if stored != form.format and (group.get("format") or len(self.config.forms) > 1):
            text = f"{name}: format {stored}, should be {form.format}"
            yield finding("config-format", CONFIG, text)
        for part, allowed in (("weights", form.weights), ("input_activations", form.inputs)):
            args = group.get(part)
            if allowed is None:
                if args:
                    text = f"{name}.{part}: {args!s:.80}, while the weights are {form.algo}"
                    yield finding("config-groups", CONFIG, text)
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
        own = {name: self.config.group_of(name) for name in quantized}
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


def _form_of(group: object, stated: Mapping[str, Any]) -> Form | None:
    """What a group means to describe, be it right or wrong in a detail: the form with the fewest
    faults, if the format is that of the form or all else looks like it."""
    if not isinstance(group, dict):
        return None
    stored = group.get("format") or stated.get("format")
    weights, inputs = group.get("weights"), group.get("input_activations")

    def faults(form: Form) -> int:
        count = len(_faults(weights, form.weights, DEFAULTS)) + (stored != form.format)
        if form.inputs is None or not inputs:
            return count + (bool(form.inputs) != bool(inputs))
        return count + len(_faults(inputs, form.inputs, DEFAULTS))

    form = min(FORMS, key=faults)
    stated_of = weights if isinstance(weights, dict) else {}
    is_alike = bool(inputs) == bool(form.inputs) and all(
        stated_of.get(key) in form.weights[key] for key in ("num_bits", "type", "strategy")
    )
    return form if stored == form.format or is_alike else None


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
