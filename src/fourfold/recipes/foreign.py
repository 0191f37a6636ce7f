# SPDX-License-Identifier: Apache-2.0
"""Recipes of other tools, said in fourfold's keys.

fourfold does not run them: they name quantizer modules and parts of their own library. But what
most of them say, a recipe of fourfold can say, too, and the error shows it.

    ModelOpt        quantize: {algorithm, quant_cfg: [{quantizer_name, cfg | enable}, {$import}]},
                    the older quant_cfg: {pattern: {num_bits, …}}, and names such as
                    general/ptq/nvfp4_default-kv_fp8_cast or NVFP4_DEFAULT_CFG
    llm-compressor  …Modifiers with targets, scheme and ignore

A pattern over ModelOpt's quantizers becomes the roles that it covers. `$import`s are known by the
last name of their path. docs/from-modelopt.md has the whole table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

ALL_ROLES = ("experts", "shared_experts", "mlp", "attention", "linear_attention")
_MLPS = ALL_ROLES[:3]

NVFP4 = "nvfp4"


class NoEquivalentError(Exception):
    """The recipe says something that no recipe of fourfold can say. The message names it."""


@dataclass(frozen=True)
class Translation:
    """A recipe of another tool."""

    tool: str
    recipe: Mapping[str, Any] | None
    """The same in fourfold's keys; None if there is no such recipe."""
    why_not: str = ""


def translate(data: Mapping[Any, Any]) -> Translation | None:
    """Return what a YAML mapping says in fourfold's keys; None if no other tool is recognized."""
    modifiers = dict(_modifiers(data))
    if modifiers:
        return _translation("llm-compressor", lambda: _from_llm_compressor(modifiers))
    is_modelopt = (
        isinstance(data.get("quantize"), Mapping)
        or "quant_cfg" in data
        or "auto_quantize" in data
        or isinstance(data.get("metadata"), Mapping)
    )
    return _translation("ModelOpt", lambda: _from_modelopt(data)) if is_modelopt else None


_BODIES: Mapping[str, tuple[tuple[str, ...], bool, str]] = {
    "nvfp4": (ALL_ROLES, True, "max"),
    "nvfp4_default": (ALL_ROLES, True, "max"),
    "nvfp4_mse": (ALL_ROLES, True, "mse"),
    "nvfp4_w4a4_weight_mse_fp8_sweep": (ALL_ROLES, True, "mse"),
    "nvfp4_mlp_only": (_MLPS, True, "max"),
    "nvfp4_mlp_only_mse": (_MLPS, True, "mse"),
    "nvfp4_experts_only": (("experts",), True, "max"),
    "nvfp4_experts_only_mse": (("experts",), True, "mse"),
    "nvfp4_weight_only": (ALL_ROLES, False, "max"),
    "w4a16_nvfp4": (ALL_ROLES, False, "max"),
    "nvfp4_w4a16": (ALL_ROLES, False, "max"),
    "nvfp4a16": (ALL_ROLES, False, "max"),
}
"""Names of recipes: roles, whether activations are quantized, and how scales are chosen."""

KVCacheEntry = Mapping[str, str] | None
"""The value of `kv_cache` in a recipe of fourfold; None for `none`."""

_CAST = {"format": "fp8", "scale": "cast"}
_CALIBRATED = {"format": "fp8", "scale": "calibrated"}
_NVFP4_CAST = {"format": "nvfp4", "scale": "cast"}

_KV_CACHES: Mapping[str, KVCacheEntry] = {
    "": None, "none": None, "fp16": None, "fp8": _CALIBRATED, "fp8_cast": _CAST,
    "nvfp4_cast": _NVFP4_CAST,
}  # fmt: skip

_CONSTANT_AMAX = 2688
"""That of an input scale of 1."""


def translate_name(name: str) -> Translation | None:
    """Return what another tool's name of a recipe or scheme means; None if it is not known."""
    last = PurePosixPath(name).name.lower().removesuffix("_cfg")
    body, _, kv_cache = last.partition("-kv_")
    if body not in _BODIES or kv_cache not in _KV_CACHES:
        return None
    roles, has_activations, scale = _BODIES[body]
    recipe = _recipe(roles, scale, has_activations, _KV_CACHES[kv_cache], ())
    return Translation("ModelOpt" if "a16" not in body[-3:] else "llm-compressor", recipe)


def _translation(tool: str, read: Any) -> Translation:
    try:
        return Translation(tool, read())
    except NoEquivalentError as reason:
        return Translation(tool, None, str(reason))
    except (TypeError, ValueError, AttributeError, RecursionError):
        return Translation(tool, None, "it could not be read")


def _recipe(
    roles: Iterable[str],
    scale: str,
    has_activations: bool,
    kv_cache: KVCacheEntry,
    keep: Iterable[str],
    amax: str = "max",
) -> dict[str, Any]:
    """A recipe of fourfold, with its keys in the usual order."""
    ordered = [role for role in ALL_ROLES if role in set(roles)]
    kept = list(dict.fromkeys(keep))
    return {
        "weights": {"format": NVFP4, "scale": scale},
        "activations": {"format": NVFP4, "amax": amax} if has_activations else "none",
        "kv_cache": "none" if kv_cache is None else dict(kv_cache),
        "quantize" if ordered == ["experts"] else "quantize_if_present": ordered,
        **({"keep": kept} if kept else {}),
    }


# ------------------------------------------------------------------------------------- patterns

_SCOPES = (
    (re.compile(r"shared_expert"), ("shared_experts",)),
    (re.compile(r"experts|block_sparse_moe"), ("experts",)),
    (re.compile(r"linear_attn|linear_attention"), ("linear_attention",)),
    (re.compile(r"mixer\.(up|down)_proj"), ("mlp",)),
    (re.compile(r"mlp\*?$"), _MLPS),
    (re.compile(r"(self_attn|attention|attn)\*?$"), ("attention",)),
)
"""Words in patterns, and the roles that a pattern with the word covers. The first one decides."""

_NEVER_QUANTIZED = re.compile(
    r"router|gate(?!_proj|_up)|lm_head|output_layer|conv1d|in_proj_[ab]|proj_out|vision|visual"
    r"|embed|multi_modal|norm|^\*?mtp|^output\b",
    re.IGNORECASE,
)
"""Modules that ModelOpt and llm-compressor list to leave them alone, and fourfold never touches."""


def _roles_of(scope: str) -> tuple[str, ...] | None:
    """The roles that a pattern over module names covers; None if it is narrower than a role."""
    text = scope.strip("*.")
    if not text:
        return ALL_ROLES
    if re.search(r"layers\.\d|_proj$|\d", text) and not re.search(r"mixer\.", text):
        return None
    return next((roles for pattern, roles in _SCOPES if pattern.search(text)), None)


# ------------------------------------------------------------------------------------- ModelOpt


def _numerics(name: str) -> dict[str, Any]:
    return {"$import": name}


def _both(scope: str, numerics: str) -> list[dict[str, Any]]:
    return [
        {"quantizer_name": f"{scope}{kind}_quantizer", "cfg": _numerics(numerics)}
        for kind in ("weight", "input")
    ]


_ALL_DISABLED: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
_KV = "*[kv]_bmm_quantizer"
_EXPERTS = _both("*.experts.*", NVFP4)
_MLP = [*_both("*mlp*", NVFP4), *_EXPERTS]
_WEIGHTS = [{"quantizer_name": "*weight_quantizer", "cfg": _numerics(NVFP4)}]

_UNITS: Mapping[str, list[dict[str, Any]]] = {
    "base_disable_all": _ALL_DISABLED,
    "default_disabled_quantizers": [],
    "disabled_quantizers": [],
    "w4a4_nvfp4_nvfp4": _both("*", NVFP4),
    "w4_nvfp4": _WEIGHTS,
    "experts_nvfp4": _EXPERTS,
    "block_sparse_moe_nvfp4": _both("*block_sparse_moe*", NVFP4),
    "mixer_mlp_nvfp4": _both("*.mixer.up_proj.", NVFP4),
    "kv_fp8": [{"quantizer_name": _KV, "cfg": _numerics("fp8")}],
    "kv_fp8_cast": [
        {"quantizer_name": _KV, "cfg": {**_numerics("fp8"), "use_constant_amax": True}}
    ],
    "kv_nvfp4_cast": [
        {"quantizer_name": _KV, "cfg": {**_numerics(NVFP4), "use_constant_amax": True}}
    ],
}
"""Parts of ModelOpt's library of recipes, by the last name of their path."""

_PRESETS: Mapping[str, tuple[str, list[dict[str, Any]]]] = {
    "nvfp4": ("max", _both("*", NVFP4)),
    "nvfp4_experts_only": ("max", _EXPERTS),
    "nvfp4_mlp_only": ("max", _MLP),
    "nvfp4_w4a4_weight_mse_fp8_sweep": ("mse", _both("*", NVFP4)),
    "w4a16_nvfp4": ("max", _WEIGHTS),
}
"""Its presets: algorithm and quantizers."""


@dataclass
class _Quantizers:
    """The quantizers that some entries of a `quant_cfg` enable; a later entry wins."""

    imports: Mapping[str, str]
    weights: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)
    amaxes: set[str] = field(default_factory=set)
    kv_cache: KVCacheEntry = None
    keep: list[str] = field(default_factory=list)

    def add(self, entry: Mapping[str, Any]) -> None:
        if "$import" in entry:
            name = self._imported(entry["$import"])
            if name not in _UNITS:
                raise NoEquivalentError(f"{name}, a part of ModelOpt's library")
            for part in _UNITS[name]:
                self.add(part)
            return
        if "parent_class" in entry:
            return
        name, cfg = str(entry["quantizer_name"]), entry.get("cfg")
        if entry.get("enable") is False:
            self._disable(name)
        elif cfg is not None:
            self._enable(name, cfg)
        else:
            raise NoEquivalentError(f"{name} without a cfg")

    def _imported(self, name: object) -> str:
        return PurePosixPath(self.imports.get(str(name), str(name))).stem

    def _enable(self, name: str, cfg: Any) -> None:
        numerics = self._format_of(cfg)
        if "bmm_quantizer" in name:
            is_cast = bool(isinstance(cfg, Mapping) and cfg.get("use_constant_amax"))
            kv_caches = {("FP8", True): _CAST, ("FP8", False): _CALIBRATED,
                         (NVFP4, True): _NVFP4_CAST}  # fmt: skip
            if (numerics, is_cast) not in kv_caches or "[kv]" not in name:
                raise NoEquivalentError(f"{numerics} for {name}")
            self.kv_cache = kv_caches[numerics, is_cast]
            return
        scope, kind = _split(name)
        if kind is None or numerics != NVFP4:
            raise NoEquivalentError(f"{numerics} for {name}")
        amax = cfg.get("constant_amax")
        if amax is not None and (kind != "input" or amax != _CONSTANT_AMAX):
            raise NoEquivalentError(f"a constant amax of {amax} for {name}")
        if kind == "input":
            self.amaxes.add("max" if amax is None else "constant")
        roles = _roles_of(scope)
        if roles is None:
            raise NoEquivalentError(f"{name} alone (write it as a rule with names)")
        (self.weights if kind == "weight" else self.inputs).update(roles)

    def _disable(self, name: str) -> None:
        scope, kind = _split(name)
        if "bmm_quantizer" in name:
            self.kv_cache = None
        elif scope.strip("*.") in ("", "default"):
            for roles in (self.weights, self.inputs) if kind is None else (self._of(kind),):
                roles.clear()
        elif not _NEVER_QUANTIZED.search(scope):
            roles_off = _roles_of(scope)
            if roles_off is None:
                self.keep.append(scope if scope.endswith("*") else f"{scope}*")
                return
            for roles in (self.weights, self.inputs) if kind is None else (self._of(kind),):
                roles.difference_update(roles_off)

    def _of(self, kind: str) -> set[str]:
        return self.weights if kind == "weight" else self.inputs

    def _format_of(self, cfg: Any) -> str:
        """The name of a number format, with what fourfold calls nvfp4 recognized."""
        if not isinstance(cfg, Mapping):
            return "several formats"
        if "$import" in cfg:
            name = self._imported(cfg["$import"])
            return NVFP4 if name == "nvfp4_static" else name.upper() if name == "fp8" else name
        bits, blocks = _bits(cfg.get("num_bits")), cfg.get("block_sizes") or {}
        if bits == "e2m1":
            sizes = (blocks.get(-1, blocks.get("-1")), _bits(blocks.get("scale_bits")))
            return NVFP4 if sizes == (16, "e4m3") else f"E2M1 in blocks of {sizes[0]}"
        return "FP8" if bits == "e4m3" and not blocks else f"{bits} numbers"


def _bits(value: object) -> str:
    """A number format in ModelOpt's spelling: e2m1, whether it was given as text or as [2, 1]."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"e{value[0]}m{value[1]}"
    return str(value).strip("()").lower()


def _split(name: str) -> tuple[str, str | None]:
    """A quantizer's pattern as the modules' pattern and weight or input (None for others)."""
    match = re.fullmatch(r"(?P<scope>.*?)(?P<kind>weight|input)_quantizer\*?", name)
    return (match["scope"], match["kind"]) if match else (name, None)


def _from_modelopt(data: Mapping[Any, Any]) -> dict[str, Any]:
    if "auto_quantize" in data:
        raise NoEquivalentError("auto_quantize, a search for each layer's format")
    kind = (data.get("metadata") or {}).get("recipe_type", "ptq")
    if kind != "ptq":
        raise NoEquivalentError(f"recipe_type {kind}")
    imports = {str(name): str(path) for name, path in (data.get("imports") or {}).items()}
    body = data.get("quantize", data)
    quantizers = _Quantizers(imports)
    if "$import" in body:
        preset = PurePosixPath(imports.get(body["$import"], body["$import"])).stem
        if preset not in _PRESETS:
            raise NoEquivalentError(f"{preset}, a preset of ModelOpt's library")
        algorithm, entries = _PRESETS[preset]
    elif "quant_cfg" not in body:
        raise NoEquivalentError("the missing quant_cfg")
    else:
        algorithm, entries = _algorithm(body.get("algorithm")), _entries(body["quant_cfg"])
    for entry in entries:
        quantizers.add(entry)
    if not quantizers.weights:
        raise NoEquivalentError("no weights in NVFP4")
    if quantizers.inputs and quantizers.inputs != quantizers.weights:
        raise NoEquivalentError("quantized inputs for only some of the quantized weights")
    amax, *others = sorted(quantizers.amaxes) if quantizers.inputs else ["max"]
    if others:
        raise NoEquivalentError("a constant amax for only some of the inputs")
    return _recipe(
        quantizers.weights,
        algorithm,
        bool(quantizers.inputs),
        quantizers.kv_cache,
        quantizers.keep,
        amax,
    )


def _entries(quant_cfg: Any) -> list[dict[str, Any]]:
    """The entries of a `quant_cfg`, in whichever form. Of a mapping, `default` comes first."""
    if not isinstance(quant_cfg, Mapping):
        return list(quant_cfg)
    names = sorted(quant_cfg, key=lambda name: name != "default")
    return [
        {"quantizer_name": name, "cfg": cfg, "enable": cfg.get("enable", True)}
        for name, cfg in ((name, quant_cfg[name]) for name in names)
        if not str(name).startswith("nn.")
    ]


def _algorithm(value: Any) -> str:
    name = value.get("method") if isinstance(value, Mapping) else value
    if name not in (None, "max", "mse"):
        raise NoEquivalentError(f"the algorithm {name}")
    return str(name or "max")


# ------------------------------------------------------------------------------- llm-compressor


def _modifiers(data: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """The entries whose keys end in `Modifier`, a few levels deep."""
    if isinstance(data, Mapping) and depth:
        for key, value in data.items():
            if isinstance(key, str) and key.endswith("Modifier"):
                yield key, value
            else:
                yield from _modifiers(value, depth - 1)


def _from_llm_compressor(modifiers: Mapping[str, Any]) -> dict[str, Any]:
    others = [name for name in modifiers if name != "QuantizationModifier"]
    if others:
        raise NoEquivalentError(others[0])
    modifier = modifiers["QuantizationModifier"]
    scheme, targets = _scheme_of(modifier)
    if scheme not in ("NVFP4", "NVFP4A16") or targets not in ("Linear", ["Linear"]):
        raise NoEquivalentError(f"scheme {scheme} for {targets}")
    roles, keep = set(ALL_ROLES), list[str]()
    for ignored in modifier.get("ignore") or ():
        pattern = _as_shell_pattern(ignored)
        if _NEVER_QUANTIZED.search(pattern):
            continue
        if (left_out := _roles_of(pattern)) is not None:
            roles.difference_update(left_out)
        elif re.search(r"[][(){}|+^$]", pattern):
            raise NoEquivalentError(f"ignore: {ignored}")
        else:
            keep.append(pattern)
    if not roles:
        raise NoEquivalentError("an ignore list of everything")
    kv_cache = _CALIBRATED if modifier.get("kv_cache_scheme") else None
    return _recipe(roles, "max", scheme == "NVFP4", kv_cache, keep)


def _scheme_of(modifier: Mapping[str, Any]) -> tuple[str, Any]:
    """A modifier's scheme and targets; of `config_groups`, where there is one group."""
    groups = list((modifier.get("config_groups") or {}).values())
    if not groups:
        return str(modifier.get("scheme")), modifier.get("targets", "Linear")
    weights, targets = groups[0].get("weights") or {}, groups[0].get("targets")
    form = (weights.get("num_bits"), weights.get("type"), weights.get("group_size"))
    if len(groups) > 1 or form != (4, "float", 16):
        raise NoEquivalentError(f"the {len(groups)} config_groups")
    return "NVFP4" if groups[0].get("input_activations") else "NVFP4A16", targets


def _as_shell_pattern(ignored: str) -> str:
    """A module's name, or `re:` and a regular expression, as a shell pattern where that can be."""
    if not ignored.startswith("re:"):
        return ignored
    text = ignored.removeprefix("re:").removeprefix("^").removesuffix("$")
    return text.replace(".*", "*").replace("\\.", ".")
