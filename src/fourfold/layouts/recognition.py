# SPDX-License-Identifier: Apache-2.0
"""Recognize a checkpoint that is quantized already, whoever quantized it.

Its tensors decide: a configuration may be stale, and several tools leave the format out of
config.json. The configuration and the files beside it only give the format its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fourfold.errors import SourceError
from fourfold.storage.names import CONFIG
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.source import Source

FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Files that tools leave beside the weights, and the tools' names."""

TENSORS = {
    "_blocks": "MXFP4",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_scale_2": "NVFP4",
    ".weight_scale": "FP8",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
"""Endings of the names of tensors that formats add or pack into."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""The entries of config.json, or of a part of it, that state a quantization. Early checkpoints of
compressed-tensors have the second."""

PACKED = {"U8", "I8", "U32", "I32", "F4"}
"""Dtypes that a quantized weight may have, and a weight as it was trained may not."""


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """Return what a config.json says about an earlier quantization; None if it says nothing."""
    for stated in stated_quantizations(config):
        return str(stated.get("quant_algo") or stated.get("quant_method") or "unknown")
    entry = config.get("quantization")  # MLX
    if isinstance(entry, dict) and "bits" in entry:
        return f"MLX, {entry['bits']} bits"
    return None


def stated_quantizations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what a config.json and the parts of it state about a quantization.

    Raises:
        SourceError: An entry is no object.
    """
    for part in with_nested(config):
        for name in QUANTIZATION_KEYS:
            stated = part.get(name)
            if not isinstance(stated, dict | None):
                raise SourceError(
                    f"{CONFIG}: {name} holds a JSON {type(stated).__name__}, not an object. "
                    "Download it again, or remove the entry if the weights are not quantized."
                )
            if stated:
                yield stated


def with_nested(entries: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and its parts, such as that of the text model."""
    yield entries
    yield from (value for value in entries.values() if isinstance(value, dict))


def targets_of(group: Mapping[str, Any]) -> list[str]:
    """Return what a group of compressed-tensors quantizes: classes, modules, and `re:` patterns."""
    targets = group.get("targets")
    return [str(target) for target in targets] if isinstance(targets, list) else []


def is_target(target: str, module: str) -> bool:
    """True if a target of compressed-tensors, or an entry of its `ignore`, names a module.

    Raises:
        SourceError: It is no regular expression, though it begins as one.
    """
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        raise SourceError(
            f"{CONFIG}: {target} in quantization_config is no regular expression: {error}. Mend it."
        ) from error


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json, and the parts of it, without what they state about a quantization."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def check_not_quantized(source: Source) -> None:
    """Check that weights are as they were trained.

    Raises:
        SourceError: They are quantized, or the configuration says that they are.
    """
    stated = quantization_of(source.config)
    packed = next(filter(_is_packed, source.tensors.values()), None)
    evidence = None if packed is None else next(_evidence(source.tensors), None)
    name = stated or (evidence and (next(_files(source), None) or evidence))
    if name is None:
        return
    if packed is not None:
        raise SourceError(
            f"{packed.key} in {packed.file.name}: {packed.dtype}, quantized already ({name}) in a "
            "form that cannot be decoded here. Start from the BF16, FP16 or FP32 checkpoint."
        )
    first = next(iter(source.tensors.values()))
    raise SourceError(
        f"{source.folder / CONFIG}: says that the weights are quantized ({name}), but "
        f"{first.key} is {first.dtype}, and no other is quantized either. If they were "
        "dequantized, remove its quantization_config."
    )


def _evidence(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Yield the names of formats for tensors that no training leaves behind."""
    yield from (name for ending, name in TENSORS.items() if _any_ends(tensors, ending))
    dtypes = {info.dtype for info in tensors.values() if len(info.shape) > 1}
    if "U32" in dtypes:
        yield "MLX"
    if any(dtype.startswith("F8") for dtype in dtypes):
        yield "FP8"


def _is_packed(info: TensorInfo) -> bool:
    return len(info.shape) > 1 and (info.dtype in PACKED or info.dtype.startswith("F8"))


def _any_ends(tensors: Mapping[str, TensorInfo], ending: str) -> bool:
    return any(key.endswith(ending) for key in tensors)


def _files(source: Source) -> Iterator[str]:
    return (tool for file, tool in FILES.items() if (source.folder / file).is_file())
