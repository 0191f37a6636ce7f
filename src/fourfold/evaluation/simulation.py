"""W4A4 inside a model: what quantized linear layers read is rounded to NVFP4, as in an engine.

Every quantized layer has an `input_scale`; engines fuse layers that read the same activation, and
take the largest scale of a layer's experts. So here each input site has one scale, the largest.
An `nn.Linear` is given rounded inputs by a hook. An experts module runs transformers' own
function, shown what its two matrix products are about to read (`models/expert_hooks.py`). That is
set up anew for each call of the module, so that nothing of it is left in the model's configuration,
and several models can be simulated at once.

Weights must be dequantized ones. The KV cache stays as it is.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from fourfold.errors import ModelError, SourceError, UsageError
from fourfold.formats.nvfp4.activations import fake_quantize
from fourfold.models.expert_hooks import Product, Rows, watch_experts
from fourfold.models.experts import ExpertsModule, Projection
from fourfold.models.inventory import Inventory, LinearWeight
from fourfold.models.module_tree import ModuleTree
from fourfold.models.roles import Role
from fourfold.sources.decoded import DecodedSource


@dataclass(frozen=True)
class Sites:
    """Where a model's inputs are rounded: module paths in memory, and the scales there."""

    linears: Mapping[str, float]
    experts: Mapping[str, Mapping[Product, float]]

    def __len__(self) -> int:
        return len(self.linears) + sum(map(len, self.experts.values()))


class Simulation:
    """The rounding of a model's activations: on from the beginning, until `remove`."""

    def __init__(self, model: nn.Module, tree: ModuleTree, sites: Sites) -> None:
        self.sites = sites
        self.calls: Counter[str] = Counter()
        """How often each module's input was rounded, by path."""
        self._stack = ExitStack()
        for path, scale in sites.linears.items():
            hook = model.get_submodule(path).register_forward_pre_hook(
                partial(self._round_linear, path, scale), with_kwargs=True
            )
            self._stack.callback(hook.remove)
        for path, scales in sites.experts.items():
            watch = _Rounding(path, scales, self.calls)
            experts = _RoundedExperts(model.get_submodule(path), tree.experts[path], watch)
            experts.put_on()
            self._stack.callback(experts.take_off)

    def remove(self) -> None:
        """Give the model its exact activations back."""
        self._stack.close()

    def _round_linear(
        self, path: str, scale: float, _: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self.calls[path] += 1
        if args:
            return (fake_quantize(args[0], scale), *args[1:]), kwargs
        return args, kwargs | {"input": fake_quantize(kwargs["input"], scale)}

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a model whose activations are simulated cannot be copied: the copy would be without. "
            "Call model.fourfold_simulation.remove() first, or load it again."
        )


class _Rounding:
    """Rounds what an experts module's two products are given: a `Watch`."""

    all_experts = False

    def __init__(self, path: str, scales: Mapping[Product, float], calls: Counter[str]) -> None:
        self.path, self.scales, self.calls = path, scales, calls

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        self.calls[f"{self.path}.{rows.product}"] += 1
        return fake_quantize(rows.x, self.scales[rows.product])


_WATCHING = threading.RLock()
"""Watching changes what transformers' configurations say, for the time of a call."""


class _RoundedExperts:
    """Stands in for the forward of one experts module."""

    def __init__(self, module: nn.Module, layout: ExpertsModule, watch: _Rounding) -> None:
        self.module, self.layout, self.watch = module, layout, watch
        self.before = module.__dict__.get("forward")

    def put_on(self) -> None:
        self.module.forward = self

    def take_off(self) -> None:
        """The module's forward is what it was."""
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _WATCHING:
            self.take_off()
            try:
                with watch_experts(self.module, {"": self.layout}, self.watch):
                    return self.module.forward(*args, **kwargs)
            finally:
                self.put_on()


def check_w4a4(checkpoint: DecodedSource) -> None:
    """Refuse a checkpoint whose weights alone are quantized."""
    if not checkpoint.input_scales:
        raise UsageError(
            f"{checkpoint.folder}: its weights alone are quantized (W4A16), so there are no "
            "activations to simulate. Leave simulate_activations out."
        )


def find_sites(checkpoint: DecodedSource, inventory: Inventory, tree: ModuleTree) -> Sites:
    """Where in the model each `input_scale` of the checkpoint belongs.

    Raises UsageError for a checkpoint without any, SourceError where a single one is missing,
    ModelError where a quantized layer has no place in the model.
    """
    check_w4a4(checkpoint)
    linears = [linear for linear in inventory.linears if linear.name in checkpoint.linears]
    _check_all_found(checkpoint, linears)
    scales = _largest_by_site(checkpoint, linears)
    plain: dict[str, float] = {}
    experts: dict[str, dict[Product, float]] = defaultdict(dict)
    for linear in linears:
        scale = scales[linear.input_site]
        if linear.expert is not None and linear.module in tree.experts:
            experts[linear.module][_product(linear)] = scale
        elif linear.role is not Role.MTP:
            for path in _modules_of(linear, tree):
                plain[path] = max(scale, plain.get(path, 0.0))
    for path in experts:
        _check_whole(path, linears, inventory)
    return Sites(plain, experts)


def _check_all_found(checkpoint: DecodedSource, linears: list[LinearWeight]) -> None:
    lost = sorted(checkpoint.linears.keys() - {linear.name for linear in linears})
    if lost:
        raise ModelError(
            f"{checkpoint.folder}: {lost[0]}: quantized, but no linear layer of the model "
            f"({len(lost)} such). Does config.json belong to this checkpoint?"
        )


def _largest_by_site(checkpoint: DecodedSource, linears: list[LinearWeight]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for linear in linears:
        scale = checkpoint.input_scales.get(linear.name)
        if scale is None:
            raise SourceError(
                f"{linear.name}.input_scale: missing, while {len(checkpoint.input_scales)} are "
                "there. The checkpoint is incomplete: quantize the model again."
            )
        largest[linear.input_site] = max(scale, largest.get(linear.input_site, 0.0))
    return largest


def _check_whole(path: str, linears: list[LinearWeight], inventory: Inventory) -> None:
    """The experts of a module share one input: they are quantized together, or not at all."""
    quantized = [linear for linear in linears if linear.module == path]
    every = [linear for linear in inventory.linears if linear.module == path]
    if len(quantized) != len(every):
        raise ModelError(
            f"{path}: {len(quantized)} of {len(every)} linear layers of its experts are quantized; "
            "engines take all or none. Quantize the model again."
        )


def _product(linear: LinearWeight) -> Product:
    return Product.DOWN if linear.projection is Projection.DOWN else Product.GATE_UP


def _modules_of(linear: LinearWeight, tree: ModuleTree) -> list[str]:
    """The `nn.Linear` modules that a weight of the checkpoint becomes: one, or parts of it."""
    targets = tree.conversion.targets(tree.conversion.place(linear.region.key))
    return [path for name in targets if (path := name.removesuffix(".weight")) in tree.linears] or [
        linear.module
    ]
