"""What a checkpoint says of its own quantization, in either of two forms.

    config.json            {"quantization_config": {"quant_method", "quant_algo", "ignore", …}}
    hf_quant_config.json   {"quantization": {"quant_algo", "exclude_modules", …}}      (nested)

Both are parsed into one `QuantConfig`, so that they can be compared field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.errors import UnreadableError

CONFIG = "config.json"
HF_CONFIG = "hf_quant_config.json"

W4A4, W4A16, MIXED = "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"
KNOWN_ALGOS = (W4A4, W4A16, MIXED)


@dataclass(frozen=True)
class QuantConfig:
    """One file's word on the quantization. `nested`: in hf_quant_config.json's form."""

    file: str
    nested: bool
    method: str | None
    algo: str | None
    group_size: int | None
    kv_cache: str | None
    """FP8, NVFP4, or None for a cache in the model's dtype."""
    ignore: tuple[str, ...]
    layers: Mapping[str, str]
    """MIXED_PRECISION only: module name → its quant_algo."""
    layer_group_sizes: Mapping[str, int]
    groups: Mapping[str, Any]

    @property
    def is_nvfp4(self) -> bool:
        """Whether any linear is said to be NVFP4."""
        return any("NVFP4" in algo for algo in (self.algo or "", *self.layers.values()))

    def algo_of(self, linear: str) -> str | None:
        """The quant_algo of one linear; of the layer or module around it, if that is listed."""
        if self.algo != MIXED:
            return self.algo
        name = linear
        while name and name not in self.layers:
            name = name.rpartition(".")[0]
        return self.layers.get(name)


def parse(document: Mapping[str, Any], file: str) -> QuantConfig:
    """A `QuantConfig` of a quantization_config, or of the whole of hf_quant_config.json."""
    nested = isinstance(document.get("quantization"), dict)
    body = document["quantization"] if nested else document
    names = body.get("exclude_modules" if nested else "ignore") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnreadableError(f"{file}: its list of ignored modules is no list of names")
    layers = body.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise UnreadableError(f"{file}: quantized_layers is no table of modules")
    return QuantConfig(
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
    """A number, None where there is nothing, and -1 for what is no number."""
    return value if isinstance(value, int) else None if value is None else -1


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _kv_cache(body: Mapping[str, Any]) -> str | None:
    named = body.get("kv_cache_quant_algo")
    if named:
        return str(named)
    scheme = _table(body.get("kv_cache_scheme"))
    return {"8": "FP8", "4": "NVFP4"}.get(str(scheme.get("num_bits")))
