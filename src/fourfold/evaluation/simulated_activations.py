# SPDX-License-Identifier: Apache-2.0
"""Quantized activations inside a transformers model: the inputs of quantized linear layers are
rounded to NVFP4 or FP8, as engines do.

Engines fuse layers that read the same activation and use the largest of their input scales; the
experts of a layer share the largest, too. So each input site has one scale here, or none where
engines choose it for each input. A hook rounds the
inputs of an `nn.Linear`. An experts module runs transformers' own function, with its inputs
rounded before both matrix products (`models/expert_hooks.py`). That is set up for each call, so
that nothing of it stays in the model's configuration and several models can be simulated at once.

The weights must be dequantized already. The KV cache is rounded beside the inputs, where the
checkpoint asks for one (`simulated_kv_cache.py`).
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from fourfold.calibration.kv_cache import KVCache
from fourfold.errors import ModelError, SourceError, UsageError
from fourfold.evaluation.simulated_kv_cache import RoundedCaches, find_kv_cache
from fourfold.formats.base import FORMATS
from fourfold.models.expert_hooks import Product, Rows, watch_experts
from fourfold.models.experts import ExpertsModule, Projection
from fourfold.models.inventory import Inventory, LinearWeight
from fourfold.models.module_tree import ModuleTree
from fourfold.models.roles import Role
from fourfold.sources.codecs.base import InputRounding
from fourfold.sources.codecs.nvfp4 import NVFP4Codec
from fourfold.sources.decoded import DecodedSource


@dataclass(frozen=True)
class Sites:
    """How the inputs of a model's modules are rounded, by path in memory."""

    linears: Mapping[str, InputRounding]
    experts: Mapping[str, Mapping[Product, InputRounding]]
    kv_cache: KVCache | None = None


class Simulation(ExitStack):
    """Rounds a model's activations until `remove`; also a context manager."""

    def __init__(self, model: nn.Module, tree: ModuleTree, sites: Sites) -> None:
        super().__init__()
        self.sites = sites
        self.calls: Counter[str] = Counter()
        """The number of times that each input was rounded, by path."""
        for path, rounding in sites.linears.items():
            hook = model.get_submodule(path).register_forward_pre_hook(
                partial(self._round_linear, path, rounding), with_kwargs=True
            )
            self.callback(hook.remove)
        for path, roundings in sites.experts.items():
            watch = _Rounding(path, roundings, self.calls)
            experts = _RoundedExperts(model.get_submodule(path), tree.experts[path], watch)
            self.callback(experts.take_off)
        if sites.kv_cache is not None:
            layers = {path: model.get_submodule(path) for path in tree.layers}
            self.enter_context(RoundedCaches(model, layers, sites.kv_cache, self.calls))

    def remove(self) -> None:
        """Return the model to exact activations."""
        self.close()

    def _round_linear(
        self, path: str, rounding: InputRounding, _: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self.calls[path] += 1
        if args:
            return (_rounded(args[0], rounding), *args[1:]), kwargs
        return args, kwargs | {"input": _rounded(kwargs["input"], rounding)}

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "A model whose activations are simulated cannot be copied: the copy would not be "
            "simulated. Call model.fourfold_simulation.remove() first, or load it again."
        )


class _Rounding:
    """Rounds the inputs of an experts module's two matrix products: a `Watch`."""

    all_experts = False

    def __init__(
        self, path: str, roundings: Mapping[Product, InputRounding], calls: Counter[str]
    ) -> None:
        self.path, self.roundings, self.calls = path, roundings, calls

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        self.calls[f"{self.path}.{rows.product}"] += 1
        rounding = self.roundings.get(rows.product)
        return rows.x if rounding is None else _rounded(rows.x, rounding)


def _rounded(x: Tensor, rounding: InputRounding) -> Tensor:
    return FORMATS[rounding.format].round_activations(x, rounding.scale)


_WATCHING = threading.RLock()
"""Held during a call of experts, which changes the configuration that transformers reads."""


class _RoundedExperts:
    """Replaces the forward of one experts module. Other threads wait while one computes."""

    def __init__(self, module: nn.Module, layout: ExpertsModule, watch: _Rounding) -> None:
        self.module, self.layout, self.watch = module, layout, watch
        self.own_forward, self.exact = module.__dict__.get("forward"), module.forward
        self.is_watched = False
        module.forward = self

    def take_off(self) -> None:
        """Restore the module's own forward."""
        if self.own_forward is None:
            del self.module.forward
        else:
            self.module.forward = self.own_forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _WATCHING:
            if self.is_watched:  # this thread's own call below
                return self.exact(*args, **kwargs)
            self.is_watched = True
            try:
                with watch_experts(self.module, {"": self.layout}, self.watch):
                    return self.module.forward(*args, **kwargs)
            finally:
                self.is_watched = False


def is_rounded(checkpoint: DecodedSource) -> bool:
    """True if engines round activations: the inputs of linear layers, or keys and values."""
    return bool(checkpoint.input_roundings) or checkpoint.kv_cache is not None


def check_rounded(checkpoint: DecodedSource) -> None:
    """Raise UsageError for a checkpoint whose activations are not quantized."""
    if not is_rounded(checkpoint):
        raise UsageError(
            f"{checkpoint.folder}: only its weights are quantized (W4A16), so there are no "
            "activations to simulate. Leave simulate_activations out."
        )


def find_sites(checkpoint: DecodedSource, inventory: Inventory, tree: ModuleTree) -> Sites:
    """Return the modules that the checkpoint's input scales belong to, and its KV cache."""
    check_rounded(checkpoint)
    kv_cache = find_kv_cache(checkpoint, inventory)
    if not checkpoint.input_roundings:
        return Sites({}, {}, kv_cache)
    stored = checkpoint.linears.keys()
    linears = [
        (linear, key)
        for linear in inventory.linears
        if (key := _key_of(linear, stored)) is not None
    ]
    _check_all_known(checkpoint, {key for _, key in linears})
    roundings = _by_site(checkpoint, linears)
    plain: dict[str, InputRounding] = {}
    experts: dict[str, dict[Product, InputRounding]] = defaultdict(dict)
    for linear, key in linears:
        own = checkpoint.input_roundings.get(key)
        if own is None:
            continue
        rounding = roundings[linear.input_site, own.format]
        if linear.expert is not None and linear.module in tree.experts:
            is_down = linear.projection is Projection.DOWN
            experts[linear.module][Product.DOWN if is_down else Product.GATE_UP] = rounding
        elif linear.role is not Role.MTP:
            for path in _modules_of(linear, tree):
                plain[path] = _larger(rounding, plain.get(path))
    for path in experts:
        _check_whole(path, [linear for linear, _ in linears], inventory)
    return Sites(plain, experts, kv_cache)


def _key_of(linear: LinearWeight, stored: Collection[str]) -> str | None:
    """The name of the quantized weight that is, or holds, a linear weight."""
    keys = linear.name, linear.region.key.removesuffix(".weight")
    return next((key for key in keys if key in stored), None)


def _check_all_known(checkpoint: DecodedSource, known: Collection[str]) -> None:
    unknown = sorted(checkpoint.linears.keys() - known)
    if unknown:
        raise ModelError(
            f"{checkpoint.folder}: {unknown[0]}: is quantized, but not a linear layer of the model "
            f"({len(unknown)} in all). Does config.json belong to this checkpoint?"
        )


def _by_site(
    checkpoint: DecodedSource, linears: Iterable[tuple[LinearWeight, str]]
) -> dict[tuple[str, str], InputRounding]:
    """How inputs are rounded, by input site and format, with the largest of the stored scales."""
    by_site: dict[tuple[str, str], InputRounding] = {}
    plain = []
    for linear, key in linears:
        rounding = checkpoint.input_roundings.get(key)
        if rounding is not None:
            place = linear.input_site, rounding.format
            by_site[place] = _larger(rounding, by_site.get(place))
        elif isinstance(checkpoint.codec_of(f"{linear.name}.weight"), NVFP4Codec):
            plain.append(linear)
    for linear in plain:
        if (linear.input_site, "nvfp4") in by_site:
            raise SourceError(
                f"{linear.name}.input_scale: is missing, while others that read the same input "
                "have one. The checkpoint is incomplete: quantize the model again."
            )
    return by_site


def _larger(one: InputRounding, other: InputRounding | None) -> InputRounding:
    """The one with the larger scale."""
    if one.scale is None or other is None or other.scale is None:
        return one
    return max(one, other, key=lambda rounding: rounding.scale or 0.0)


def _check_whole(path: str, linears: list[LinearWeight], inventory: Inventory) -> None:
    # Engines take all experts of a module in one format, or none.
    quantized = [linear for linear in linears if linear.module == path]
    every = [linear for linear in inventory.linears if linear.module == path]
    if len(quantized) != len(every):
        raise ModelError(
            f"{path}: {len(quantized)} of {len(every)} linear layers of its experts are quantized; "
            "engines take all or none. Quantize the model again."
        )


def _modules_of(linear: LinearWeight, tree: ModuleTree) -> list[str]:
    """The `nn.Linear` modules that a weight of the checkpoint becomes: one, or several."""
    targets = tree.conversion.targets(tree.conversion.place(linear.region.key))
    return [path for name in targets if (path := name.removesuffix(".weight")) in tree.linears] or [
        linear.module
    ]
