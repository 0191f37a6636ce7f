# SPDX-License-Identifier: Apache-2.0
"""The layout of NVIDIA ModelOpt, as vLLM, SGLang and TensorRT-LLM read it.

    config.json            {"quantization_config": {"quant_method", "quant_algo", "ignore", …}}
    hf_quant_config.json   {"quantization": {"quant_algo", "exclude_modules", …}}      (nested)

Both files state the quantization. Both are parsed into a `ModelOptConfig`, so that they can be
compared field by field. vLLM and SGLang follow config.json and fall back to the other file;
TensorRT-LLM follows hf_quant_config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fourfold.errors import UnreadableError
from fourfold.formats.base import FORMATS
from fourfold.storage.json_files import read_json
from fourfold.storage.names import CONFIG
from fourfold.verification.readers.base import (
    MIXED,
    PARTS,
    W4A4,
    W4A16,
    LayoutReader,
    QuantConfig,
    prefixes,
)
from fourfold.verification.rules import Finding, finding

if TYPE_CHECKING:
    from fourfold.verification.checkpoint import Checkpoint

HF_CONFIG = "hf_quant_config.json"
KNOWN_ALGOS = (W4A4, W4A16, MIXED)


@dataclass(frozen=True)
class ModelOptConfig(QuantConfig):
    """The quantization as one of the two files states it."""

    file: str
    nested: bool
    """True if it is in the form of hf_quant_config.json."""
    method: str | None
    group_size: int | None
    layer_group_sizes: Mapping[str, int]
    groups: Mapping[str, Any]


class ModelOptReader(LayoutReader):
    """Reads a checkpoint in ModelOpt's layout."""

    leaves: ClassVar[Mapping[str, str]] = {part: part for part in PARTS}
    leftover = re.compile(
        r"(_amax|_quantizer(\..*)?|\.weight_packed|\.weight_global_scale|\.input_global_scale"
        r"|\.pre_quant_scale|\.weight_zero_point)$"
    )

    def __init__(self, flat: ModelOptConfig | None, nested: ModelOptConfig | None) -> None:
        """`flat` is from config.json, `nested` from hf_quant_config.json; one may be missing."""
        self.flat, self.nested = flat, nested
        self.configs = [quant for quant in (flat, nested) if quant is not None]
        self.quant = self.configs[0]

    @classmethod
    def recognizes(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Return True unless the configuration states another layout, or nothing."""
        stated = config.get("quantization_config")
        if isinstance(stated, Mapping):
            return stated.get("quant_method") != "compressed-tensors"
        return (folder / HF_CONFIG).is_file()

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any]) -> ModelOptReader:
        """Parse both files."""
        flat = nested = None
        if isinstance(config.get("quantization_config"), dict):
            flat = parse(config["quantization_config"], CONFIG)
        if (folder / HF_CONFIG).is_file():
            nested = parse(read_json(folder / HF_CONFIG), HF_CONFIG)
        reader = cls(flat, nested)
        algos = [algo for x in reader.configs for algo in (x.algo or "", *x.layers.values())]
        if not any("NVFP4" in algo for algo in algos):
            says = ", ".join(f"{x.file} says {x.algo or x.method}" for x in reader.configs)
            raise UnreadableError(
                f"{folder}: not an NVFP4 checkpoint ({says}). Quantize the model first, and give "
                "the output's folder."
            )
        return reader

    def check(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        """Yield the findings on the two files."""
        yield from self._check_presence()
        yield from self._check_agreement()
        yield from self._check_quantization()
        yield from self._check_quantized_layers(checkpoint)

    def _check_presence(self) -> Iterator[Finding]:
        """Both files state the quantization."""
        flat = self.flat
        if flat is None:
            algo = self.quant.algo
            rule = "config-nested-w4a16" if algo == W4A16 else "config-only-nested"
            yield finding(rule, CONFIG, f"no quantization_config; {HF_CONFIG} says {algo}")
        elif flat.nested and flat.algo == W4A16:
            yield finding("config-nested-w4a16", CONFIG, "quantization_config has the nested form")
        if self.nested is None:
            yield finding("hf-quant-config-missing", HF_CONFIG, "no such file")

    def _check_agreement(self) -> Iterator[Finding]:
        """config.json and hf_quant_config.json say the same."""
        flat, nested = self.flat, self.nested
        if flat is None or nested is None:
            return
        fields: dict[str, tuple[object, object]] = {
            "quant_algo": (flat.algo, nested.algo),
            "kv_cache": (flat.kv_cache, nested.kv_cache),
            "quantized_layers": (dict(flat.layers), dict(nested.layers)),
        }
        if flat.group_size is not None and nested.group_size is not None:
            fields["group_size"] = (flat.group_size, nested.group_size)
        for name, (here, there) in fields.items():
            if here != there:
                text = f"{name}: {_shown(here)} here, {_shown(there)} in {HF_CONFIG}"
                yield finding("config-disagrees", CONFIG, text)
        only_flat = sorted(set(flat.ignore) - set(nested.ignore))
        only_nested = sorted(set(nested.ignore) - set(flat.ignore))
        for names, where in ((only_flat, CONFIG), (only_nested, HF_CONFIG)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                text = f"ignore: {names[0]}{more} in {where} only"
                yield finding("config-disagrees", CONFIG, text)

    def _check_quantization(self) -> Iterator[Finding]:
        """Each file states a known method and algorithm, and fitting groups."""
        flat = self.flat
        for quant in self.configs:
            if quant.algo not in KNOWN_ALGOS:
                yield finding("quant-algo", quant.file, f"quant_algo {quant.algo}")
            yield from _group_sizes(quant)
        if flat is not None:
            if not (flat.method or "").startswith("modelopt"):
                yield finding("quant-method", CONFIG, f"quant_method {flat.method}")
            if flat.algo in (W4A4, W4A16):
                yield from _groups(flat)

    def _check_quantized_layers(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        """Under MIXED_PRECISION, the names in the configuration are those of the tensors."""
        quant = self.quant
        if quant.algo != MIXED:
            return
        for name, linear in checkpoint.linears.items():
            if linear.algo is None or "NVFP4" not in linear.algo:
                text = f"packed like NVFP4, quantized_layers says {linear.algo or 'nothing'}"
                yield finding("quantized-layers", name, text)
        around = {prefix for name in checkpoint.quantized for prefix in prefixes(name)}
        for layer in sorted(quant.layers.keys() - around):
            text = f"quantized_layers says {quant.layers[layer]}, no tensor of it is quantized"
            yield finding("quantized-layers", layer, text)


def parse(document: Mapping[str, Any], file: str) -> ModelOptConfig:
    """Parse a quantization_config, or the whole of hf_quant_config.json."""
    nested = isinstance(document.get("quantization"), dict)
    body = document["quantization"] if nested else document
    names = body.get("exclude_modules" if nested else "ignore") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnreadableError(f"{file}: its list of ignored modules is not a list of names")
    layers = body.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise UnreadableError(f"{file}: quantized_layers is not a table of modules")
    return ModelOptConfig(
        file=file,
        nested=nested,
        method=_text(document.get("quant_method")),
        algo=_text(body.get("quant_algo")),
        group_size=_number(body.get("group_size")),
        kv_cache=_kv_cache(body),
        ignore=tuple(names),
        layers={name: str(entry.get("quant_algo")) for name, entry in layers.items()},
        layer_group_sizes={
            name: entry["group_size"] for name, entry in layers.items() if "group_size" in entry
        },
        groups={name: _table(entry) for name, entry in _table(body.get("config_groups")).items()},
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _number(value: object) -> int | None:
    """A number, None for None, and -1 for anything else."""
    return value if isinstance(value, int) else None if value is None else -1


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _kv_cache(body: Mapping[str, Any]) -> str | None:
    named = body.get("kv_cache_quant_algo")
    if named:
        return str(named)
    scheme = body.get("kv_cache_scheme")
    if not isinstance(scheme, dict):
        return None if scheme is None else str(scheme)
    form = f"{scheme.get('type', 'float')} {scheme.get('num_bits')}"
    return {"float 8": "FP8", "float 4": "NVFP4"}.get(form, form)


def _shown(value: object) -> str:
    text = "nothing" if value in (None, {}) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _group_sizes(quant: ModelOptConfig) -> Iterator[Finding]:
    if quant.group_size not in (None, FORMATS["nvfp4"].block):
        yield finding("group-size", quant.file, f"group_size {quant.group_size}")
    for layer, size in sorted(quant.layer_group_sizes.items()):
        if "NVFP4" in quant.layers[layer] and size != FORMATS["nvfp4"].block:
            yield finding("group-size", layer, f"group_size {size} in {quant.file}")


def _groups(quant: ModelOptConfig) -> Iterator[Finding]:
    for name, group in sorted(quant.groups.items()):
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not _is_nvfp4(weights):
            yield finding("config-groups", CONFIG, f"{name}.weights: {_shown(weights)}")
        fits = _is_nvfp4(inputs) if quant.algo == W4A4 else not inputs
        if not fits:
            text = f"{name}.input_activations: {_shown(inputs)}, while quant_algo is {quant.algo}"
            yield finding("config-groups", CONFIG, text)


def _is_nvfp4(scheme: Mapping[str, Any] | None) -> bool:
    return isinstance(scheme, dict) and (
        scheme.get("num_bits"),
        scheme.get("type"),
        scheme.get("group_size"),
    ) == (4, "float", FORMATS["nvfp4"].block)
