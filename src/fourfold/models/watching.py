"""See, and change if need be, what the matrix products of an experts module are given.

Two products follow each other in every expert: gate and up read the hidden states, down reads
what the activation made of them. Both inputs are shown to a `Watch`, whatever the class:

- Decorated classes run transformers' own function with a proxy as the module. The proxy answers
  as the module does, but what its activation gives is shown before the function goes on. Nothing
  is computed anew, so the outputs are those of the default implementation, bit for bit.
- Classes that transformers does not decorate, and models that only know the eager forward, run
  their own forward under a mode that recognizes products with their parameters.

Shapes: T tokens, H hidden size, K experts of a token, R rows (a token and one of its experts),
E experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fourfold.models.experts import ExpertsModule, Part, Projection
from fourfold.models.internals import ExpertsFunction, experts_function, experts_kind


class Product(StrEnum):
    """One of the two matrix products of an expert."""

    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass(frozen=True)
class Rows:
    """What one matrix product of an experts module is given."""

    path: str
    product: Product
    x: Tensor
    """[R, in], or [T, in] where a row goes to several experts."""
    experts: Tensor
    """int64 [R], or [T, K]: the experts of each row."""
    tokens: Tensor | None
    """int64 [R]: which token each row is; None where that is not known."""
    of: int
    """How many tokens there are in all."""
    is_counted: bool
    """Whether these rows are the ones to count tokens by; a product may be made in parts."""


class Watch(Protocol):
    """Is shown every product's rows, and gives what the product is to be given instead."""

    all_experts: bool
    """Whether to show also, beside what is routed, every token to every expert."""

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        """`rows.x`, or what to use in its place (of the same shape and dtype)."""


@contextmanager
def watch_experts(
    model: nn.Module, experts: Mapping[str, ExpertsModule], watch: Watch
) -> Iterator[None]:
    """Within, `watch` is shown what the experts modules at these paths are given."""
    modules = {path: model.get_submodule(path) for path in experts}
    paths = {id(module): path for path, module in modules.items()}
    decorated = [module for module in modules.values() if experts_kind(module) is not None]
    with ExitStack() as stack:
        stack.enter_context(experts_function(decorated, partial(_watched, watch, paths)))
        for path, module in modules.items():
            if experts_kind(module) is None:
                stack.enter_context(_under_mode(module, experts[path], watch))
        yield


def unwatchable(model: nn.Module, experts: Iterable[str]) -> list[str]:
    """Paths of experts modules that cannot show every token to every expert."""
    return [path for path in experts if experts_kind(model.get_submodule(path)) is None]


ALL_EXPERTS_ROWS = 1 << 14
"""Rows at a time when every token is sent through every expert."""


def _watched(
    watch: Watch, paths: Mapping[int, str], default: ExpertsFunction, kind: str
) -> ExpertsFunction:
    def run(
        module: Any, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, first: int | None
    ) -> Tensor:
        """Show and run; `first` is the first token's number where all experts are wanted."""
        path, routed = paths[id(module)], first is None
        expert_R, token_R = _row_order(kind, index_TK)
        every_T, begin = torch.arange(len(hidden_TH), device=hidden_TH.device), first or 0
        rows = Rows(path, Product.GATE_UP, hidden_TH, index_TK, every_T + begin, tokens, True)
        shown_TH = watch(rows, is_routed=routed)

        def inner(inner_RI: Tensor) -> Tensor:
            rows = Rows(path, Product.DOWN, inner_RI, expert_R, token_R + begin, tokens, False)
            return watch(rows, is_routed=routed)

        return default(_Proxy(module, inner), shown_TH, index_TK, weights_TK)

    tokens = 0

    def forward(module: Any, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        nonlocal tokens
        if id(module) not in paths:
            return default(module, hidden_TH, index_TK, weights_TK)
        tokens = len(hidden_TH)
        out_TH = run(module, hidden_TH, index_TK, weights_TK, None)
        if watch.all_experts:
            count = int(module.num_experts)
            every_E = torch.arange(count, device=index_TK.device, dtype=index_TK.dtype)
            step = max(1, ALL_EXPERTS_ROWS // count)
            for first in range(0, tokens, step):
                part_TH = hidden_TH[first : first + step]
                index_TE = every_E.expand(len(part_TH), count)
                no_TE = torch.zeros_like(index_TE, dtype=weights_TK.dtype)
                run(module, part_TH, index_TE, no_TE, first)
        return out_TH

    return forward


def _row_order(kind: str, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The expert and the token of each row, in the order in which an implementation has them."""
    count = index_TK.shape[-1]
    expert_R = index_TK.reshape(-1)
    if kind == "batched_mm":
        token_R = torch.arange(len(expert_R), device=expert_R.device) // count
        return expert_R, token_R
    expert_R, order_R = torch.sort(expert_R)
    return expert_R, order_R // count


class _Proxy:
    """An experts module, whose activation's result is shown to `inner` first."""

    def __init__(self, module: Any, inner: Callable[[Tensor], Tensor]) -> None:
        self._module, self._inner = module, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._inner(self._module._apply_gate(gate_up))

    def act_fn(self, up: Tensor) -> Tensor:
        """Only functions without a gate call it; with one, `_apply_gate` is the module's own."""
        return self._inner(self._module.act_fn(up))


@contextmanager
def _under_mode(module: nn.Module, layout: ExpertsModule, watch: Watch) -> Iterator[None]:
    """The module's own forward, under a mode that knows its parameters."""
    before = module.__dict__.get("forward")
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _KnownWeights(module, layout, watch):
            return forward(*args, **kwargs)

    module.forward = watched
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _KnownWeights(TorchFunctionMode):
    """Recognizes products `x @ w` where `w` is one of the experts' parameters, or a part of one."""

    def __init__(self, module: nn.Module, layout: ExpertsModule, watch: Watch) -> None:
        super().__init__()
        self.layout, self.watch = layout, watch
        self.parts: dict[int, tuple[Tensor, Part]] = {}
        self.casts: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        """What became of a part in another dtype: by identity, with the part itself."""
        for part in layout.parts:
            if not part.is_bias:
                parameter = getattr(module, part.parameter)
                self.parts.setdefault(parameter.untyped_storage()._cdata, (parameter, part))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            weight = self._original(args[1])
            found = self.parts.get(weight.untyped_storage()._cdata)
            if found is not None:
                args = (self._show(args[0], weight, *found), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and result is not args[0]:
            self._remember(result, args[0])
        return result

    def _remember(self, cast: Tensor, weight: Tensor) -> None:
        if weight.untyped_storage()._cdata in self.parts:
            identity = id(cast)
            gone = weakref.ref(cast, lambda _: self.casts.pop(identity, None))
            self.casts[identity] = gone, weight

    def _original(self, weight: Tensor) -> Tensor:
        return self.casts[id(weight)][1] if id(weight) in self.casts else weight

    def _show(self, x: Tensor, weight: Tensor, parameter: Tensor, part: Part) -> Tensor:
        product = Product.DOWN if part.projection is Projection.DOWN else Product.GATE_UP
        is_counted = part.parameter == self.layout.parts[0].parameter
        count = self.layout.num_experts
        if weight.numel() == parameter.numel():
            rows_ER = torch.arange(count, device=x.device)[:, None].expand(count, x.shape[-2])
            tokens = torch.arange(x.shape[-2], device=x.device).expand(count, -1).reshape(-1)
            shown = x.reshape(-1, x.shape[-1])
            is_used = shown.ne(0).any(-1)  # a token's row is zero where it is not routed
            experts = rows_ER.reshape(-1).masked_fill(~is_used, -1)
        else:
            each = parameter.numel() // parameter.shape[0] if parameter.ndim == 3 else (
                parameter.numel() // count
            )  # fmt: skip
            start = weight.storage_offset() - parameter.storage_offset()
            shown, tokens = x.reshape(-1, x.shape[-1]), None
            experts = torch.full((len(shown),), start // each, device=x.device)
        rows = Rows(self.layout.path, product, shown, experts, tokens, x.shape[-2], is_counted)
        return self.watch(rows, is_routed=True).reshape(x.shape)


_CASTS = {Tensor.float, Tensor.to, Tensor.type}

_PRODUCTS = {
    F.linear, torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm,
    Tensor.__matmul__,
}  # fmt: skip
