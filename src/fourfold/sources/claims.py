# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint the codecs can decode, and whether anything quantized is left.

What a codec does not claim is read as it is, so a tensor that belongs to a quantized weight and is
left over must end the run: its bytes would be taken for values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fourfold.errors import SourceError
from fourfold.formats.kv_cache import KVFormat
from fourfold.layouts.recognition import (
    is_target,
    stated_quantizations,
    targets_of,
    with_nested,
)
from fourfold.models.mtp import is_mtp, stack_of
from fourfold.sources.codecs.base import CODECS, EncodedWeight, TensorCodec
from fourfold.storage.json_files import read_json
from fourfold.storage.names import HF_QUANT_CONFIG
from fourfold.storage.safetensors_header import FLOATS, TensorInfo
from fourfold.storage.source import Source

_SCALES = re.compile(
    r"\.(weight_scale(_2|_inv)?|input_scale|weight_packed|weight_global_scale|weight_zero_point"
    r"|qweight|qzeros)$|_(blocks|scales|scale_inv)$"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LISTS = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers", "skip_modules")
"""Names that tools give to the list of modules that they leave unquantized."""


@dataclass(frozen=True)
class Claims:
    """What codecs claim of a checkpoint's tensors."""

    weights: Mapping[str, EncodedWeight] = field(default_factory=dict)
    """The weights under the names that they are presented under."""
    codecs: Mapping[str, TensorCodec] = field(default_factory=dict)
    """The codec of each of these weights."""
    hidden: Collection[str] = frozenset()
    """The stored tensors that are not presented."""
    left: Mapping[str, TensorInfo] = field(default_factory=dict)
    """The stored tensors that are presented as they are."""


def claim(stored: Source) -> Claims:
    """Let the codecs claim tensors of a checkpoint.

    Raises:
        SourceError: Parts of a weight are missing or do not fit each other.
    """
    weights: dict[str, EncodedWeight] = {}
    codecs: dict[str, TensorCodec] = {}
    hidden, left = set[str](), dict(stored.tensors)
    for codec in CODECS.values():
        claimed = codec.claim(stored.config, left)
        if not claimed:
            continue
        weights |= claimed
        codecs |= dict.fromkeys(claimed, codec)
        taken = {key for weight in claimed.values() for key in weight.stored}
        hidden |= taken | set(codec.hidden(left))
        left = {key: info for key, info in left.items() if key not in hidden}
    return Claims(weights, codecs, hidden, left)


def check_none_left(claims: Claims) -> None:
    """Check that every tensor of a quantized weight is claimed.

    Raises:
        SourceError: A tensor belongs to a quantized weight that no codec claims, or says that the
            values of a weight are not those of the model.
    """
    for key, info in claims.left.items():
        if key.endswith(".pre_quant_scale"):
            raise SourceError(
                f"{key} in {info.file.name}: the weight beside it was scaled for inputs that are "
                "multiplied by this (AWQ, SmoothQuant), which cannot be undone here. Give the BF16 "
                "checkpoint."
            )
        if _looks_quantized(info):
            raise SourceError(
                f"{key} in {info.file.name}: {info.dtype}, of a weight that is not "
                f"{_titles(claims)}, as others are. Parts of it may be missing: download the "
                "checkpoint again, or give the BF16 checkpoint."
            )


def check_converted_whole(stored: Source, claims: Claims) -> None:
    """Check that a checkpoint is not one that a tool has converted in part.

    Raises:
        SourceError: A weight is not quantized while others of its kind are, and the configuration
            does not say so.
    """
    for key in _passed_over(stored, claims):
        info = claims.left[key]
        raise SourceError(
            f"{key} in {info.file.name}: {info.dtype}, while other weights of its kind are "
            f"{_titles(claims)}, and the configuration does not list it as unquantized. The folder "
            "may be converted in part: download the checkpoint again, or list the module in "
            "quantization_config."
        )


def _titles(claims: Claims) -> str:
    return " or ".join(dict.fromkeys(codec.title for codec in claims.codecs.values()))


def _looks_quantized(info: TensorInfo) -> bool:
    is_packed = info.key.endswith((".weight", "weight_packed")) and info.dtype not in FLOATS
    return is_packed or info.dtype.startswith(("F8", "F6", "F4")) or bool(_SCALES.search(info.key))


def _passed_over(stored: Source, claims: Claims) -> Iterator[str]:
    """Yield weights as they were trained whose kind, names without numbers, is decoded elsewhere.

    MTP layers do not count: tools leave them out without a word.
    """
    entries = list(quantization_entries(stored))  # a file that cannot be read is an error
    kinds = {_NUMBER.sub("*", key) for key in claims.weights}
    plain = [key for key in claims.left if _NUMBER.sub("*", key) in kinds]
    if not plain:
        return
    if any(entry.get("quantized_layers") for entry in entries):
        return  # it lists what is quantized
    targets = [target for entry in entries for target in _targets(entry)]
    names_modules = any("." in target for target in targets)  # and not classes alone
    lists = (entry.get(name) for entry in entries for name in _LISTS)
    listed = [str(module) for modules in lists if isinstance(modules, list) for module in modules]
    stacks = {stack_of(key) for key in claims.weights}
    counts = (part.get("num_hidden_layers") for part in with_nested(stored.config))
    layers = next((count for count in counts if isinstance(count, int)), 1 << 62)
    for key in plain:
        if is_mtp(key, stacks, layers) or _is_listed(key, listed):
            continue
        module = key.removesuffix(".weight")
        if not names_modules or any(is_target(target, module) for target in targets):
            yield key


def kv_cache_format(entries: Iterable[Mapping[str, Any]]) -> KVFormat | None:
    """Return the format of the KV cache that `quantization_entries` state; None for that of the
    model, and for one that is not known here."""
    for entry in entries:
        scheme = entry.get("kv_cache_scheme")
        named = str(entry.get("kv_cache_quant_algo") or "").upper()
        if isinstance(scheme, Mapping):
            form = f"{scheme.get('type')} {scheme.get('num_bits')}"
            named = {"float 8": "FP8", "float 4": "NVFP4"}.get(form, "")
        if named in ("FP8", "NVFP4"):
            return "fp8" if named == "FP8" else "nvfp4"
    return None


def quantization_entries(stored: Source) -> Iterator[Mapping[str, Any]]:
    """Yield what config.json, its nested parts, and ModelOpt's file say of the quantization."""
    yield from stated_quantizations(stored.config)
    if (stored.folder / HF_QUANT_CONFIG).is_file():
        yield from with_nested(read_json(stored.folder / HF_QUANT_CONFIG))


def _targets(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield the targets of all groups of compressed-tensors."""
    groups = entry.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        yield from targets_of(group) if isinstance(group, dict) else ()


def _is_listed(key: str, entries: Iterable[str]) -> bool:
    """True if an entry matches a tensor in the way of any tool that writes such lists."""
    module = key.rpartition(".")[0]
    for entry in entries:
        if entry.startswith("re:"):
            if is_target(entry, module):
                return True
        elif entry and (entry in module or fnmatchcase(module, entry) or fnmatchcase(key, entry)):
            return True
    return False
