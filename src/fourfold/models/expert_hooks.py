# SPDX-License-Identifier: Apache-2.0
"""Hooks on the inputs of the matrix products inside an experts module.

Every expert computes two products in a row: gate and up read the hidden states, down reads the
activation's output. Both inputs are passed to a `Watch`, which may replace them, in all classes:

- Decorated classes run transformers' own function with a proxy as the module. The proxy behaves
  as the module does, but passes the activation's output to the watch before it returns it. Nothing
  is computed twice, so the outputs are those of the default implementation, bit for bit.
- Classes that transformers does not decorate, and models that have the eager forward only, run
  their own forward under a mode that recognizes products with the experts' parameters, and the
  indexing that selected the tokens' rows for them.

Shapes: T tokens, H hidden size, K experts of a token, R rows (a token and one of its experts),
E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fourfold.models.experts import ExpertsModule, Part, Projection
from fourfold.models.internals import ExpertsFunction, experts_function, experts_kind
from fourfold.models.roles import EXPERTS_CLASS


class Product(StrEnum):
    """One of the two matrix products of an expert."""

    GATE_UP = "gate_up"
    DOWN = "down"


@dataclass(frozen=True)
class Rows:
    """The input rows of one matrix product of an experts module."""

    path: str
    product: Product
    x: Tensor
    """[R, in], or [T, in] if a row goes to several experts."""
    experts: Tensor
    """int64 [R], or [T, K]: the experts of each row."""
    tokens: Tensor | None
    """int64 [R]: the token of each row; None if that is not known."""
    of: int
    """The number of tokens in the whole input."""
    is_counted: bool
    """True for exactly one call per row and product: gate and up may be computed separately, from
    the same rows."""
    is_whole: bool = False
    """True if these are the rows of all experts, so that no other call has any of this product."""


class Watch(Protocol):
    """Receives the input rows of every product, and returns those to compute with."""

    all_experts: bool
    """True to send every token to every expert as well, besides the routed rows."""

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        """Return `rows.x`, or a replacement of the same shape and dtype."""


ALL_EXPERTS_ROWS = 1 << 14
"""Rows at a time when every token is sent through every expert."""


@contextmanager
def watch_experts(
    model: nn.Module,
    experts: Mapping[str, ExpertsModule],
    watch: Watch,
    *,
    rows_at_a_time: int = ALL_EXPERTS_ROWS,
) -> Iterator[None]:
    """Call `watch` with the inputs of the experts modules at these paths inside the context.

    Where every token is sent through every expert, a product has `rows_at_a_time` rows at most.
    """
    modules = {path: model.get_submodule(path) for path in experts}
    paths = {id(module): path for path, module in modules.items()}
    decorated = [module for module in modules.values() if experts_kind(module) is not None]
    with ExitStack() as stack:
        stack.enter_context(
            experts_function(decorated, partial(_watched, watch, paths, rows_at_a_time))
        )
        for path, module in modules.items():
            if experts_kind(module) is None:
                whole = _outermost(model, path)
                stack.enter_context(_under_mode(whole, module, experts[path], watch))
        yield


def _outermost(model: nn.Module, path: str) -> nn.Module:
    """The experts module at a path, or the one around it, if that selects the rows (DBRX)."""
    around = model.get_submodule(path.rpartition(".")[0])
    is_experts = EXPERTS_CLASS.search(type(around).__name__) is not None
    return around if is_experts else model.get_submodule(path)


def unwatchable(model: nn.Module, experts: Iterable[str]) -> list[str]:
    """Return the paths of experts modules that cannot send every token to every expert."""
    return [path for path in experts if experts_kind(model.get_submodule(path)) is None]


def _watched(
    watch: Watch,
    paths: Mapping[int, str],
    rows_at_a_time: int,
    default: ExpertsFunction,
    kind: str,
) -> ExpertsFunction:
    """The function that runs in place of `default` as the experts modules' forward."""

    def run(
        module: Any, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, first: int | None
    ) -> Tensor:
        """Call the watch and compute. `first`: the first token's index in an all-experts pass."""
        path, routed = paths[id(module)], first is None
        expert_R, token_R = _row_order(kind, index_TK)
        every_T, begin = torch.arange(len(hidden_TH), device=hidden_TH.device), first or 0
        rows = Rows(
            path, Product.GATE_UP, hidden_TH, index_TK, every_T + begin, tokens, True, routed
        )
        shown_TH = watch(rows, is_routed=routed)

        def inner(inner_RI: Tensor) -> Tensor:
            rows = Rows(
                path, Product.DOWN, inner_RI, expert_R, token_R + begin, tokens, True, routed
            )
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
            step = max(1, rows_at_a_time // count)
            for first in range(0, tokens, step):
                part_TH = hidden_TH[first : first + step]
                index_TE = every_E.expand(len(part_TH), count)
                no_TE = torch.zeros_like(index_TE, dtype=weights_TK.dtype)
                run(module, part_TH, index_TE, no_TE, first)
        return out_TH

    return forward


def _row_order(kind: str, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The expert and the token of each row, in the order of an implementation's rows."""
    expert_R = index_TK.reshape(-1)
    order_R = torch.arange(len(expert_R), device=expert_R.device)
    if kind != "batched_mm":
        expert_R, order_R = torch.sort(expert_R)
    return expert_R, order_R // index_TK.shape[-1]


class _Proxy:
    """Behaves as an experts module, but passes the activation's output through `inner`."""

    def __init__(self, module: Any, inner: Callable[[Tensor], Tensor]) -> None:
        self._module, self._inner = module, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._inner(self._module._apply_gate(gate_up))

    def act_fn(self, up: Tensor) -> Tensor:
        """Called only by functions without a gate; otherwise `_apply_gate` calls the module's."""
        return self._inner(self._module.act_fn(up))


@contextmanager
def _under_mode(
    whole: nn.Module, module: nn.Module, layout: ExpertsModule, watch: Watch
) -> Iterator[None]:
    """Run the forward of `whole` under a mode that recognizes the parameters of `module`."""
    before = whole.__dict__.get("forward")
    forward = whole.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _KnownWeights(module, layout, watch):
            return forward(*args, **kwargs)

    whole.forward = watched
    try:
        yield
    finally:
        if before is None:
            del whole.forward
        else:
            whole.forward = before


class _KnownWeights(TorchFunctionMode):
    """Recognizes products `x @ w` in which `w` is (a part of) one of the experts' parameters."""

    def __init__(self, module: nn.Module, layout: ExpertsModule, watch: Watch) -> None:
        super().__init__()
        self.module, self.layout, self.watch = module, layout, watch
        self.casts: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        """A part cast to another dtype → the part itself."""
        self.taken: MutableMapping[Tensor, tuple[Tensor, int]] = WeakTensorKeyDictionary()
        """Rows indexed out of a matrix → their indices, and the number of rows of the matrix."""
        self.last: tuple[int, tuple[Tensor, int]] | None = None
        """The expert whose rows came last, and the note on these rows."""

    @property
    def parts(self) -> Mapping[int, tuple[Tensor, Part]]:
        """The parameters by their present storage, which changes if they are offloaded."""
        by_storage: dict[int, tuple[Tensor, Part]] = {}
        for part in self.layout.parts:
            if not part.is_bias:
                parameter = getattr(self.module, part.parameter)
                by_storage.setdefault(parameter.untyped_storage()._cdata, (parameter, part))
        return by_storage

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            weight = self.casts.get(args[1], args[1])
            known = self.parts.get(weight.untyped_storage()._cdata)
            if known is not None:
                args = (self._show(args[0], weight, *known), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and result is not args[0]:
            self._follow(args[0], result)
        elif func is Tensor.__getitem__ and _is_rows(*args):
            self.taken[result] = args[1], len(args[0])
        return result

    def _follow(self, tensor: Tensor, cast: Tensor) -> None:
        if tensor.untyped_storage()._cdata in self.parts:
            self.casts[cast] = tensor
        if (rows := self.taken.get(tensor)) is not None:
            self.taken[cast] = rows

    def _show(self, x: Tensor, weight: Tensor, parameter: Tensor, part: Part) -> Tensor:
        product = Product.DOWN if part.projection is Projection.DOWN else Product.GATE_UP
        is_counted = product is Product.DOWN or part.parameter == self.layout.parts[0].parameter
        shown = x.reshape(-1, x.shape[-1])
        experts, tokens, of = self._rows(x, weight, parameter)
        rows = Rows(self.layout.path, product, shown, experts, tokens, of, is_counted)
        replaced = self.watch(rows, is_routed=True)
        # If nothing was replaced, return `x` itself: another mode may have a note on it.
        return x if replaced is shown else replaced.reshape(x.shape)

    def _rows(
        self, x: Tensor, weight: Tensor, parameter: Tensor
    ) -> tuple[Tensor, Tensor | None, int]:
        """Each row's expert, its token if that is known, and the number of tokens."""
        if weight.ndim == 3:
            return _every_token(x)
        expert = self._expert(weight, parameter)
        tokens, of = self._tokens(expert, x) or (None, x.shape[-2])
        return torch.full((x.shape[-2],), expert, device=x.device), tokens, of

    def _expert(self, weight: Tensor, parameter: Tensor) -> int:
        start = int(weight.storage_offset()) - int(parameter.storage_offset())
        elements = parameter.numel() // (
            len(parameter) if parameter.ndim == 3 else self.layout.num_experts
        )
        return start // elements

    def _tokens(self, expert: int, x: Tensor) -> tuple[Tensor, int] | None:
        """The tokens of an expert's rows and the number of all tokens, or None if unknown.

        Down reads the rows that gate and up have read.
        """
        known = self.taken.get(x)
        if known is not None:
            self.last = expert, known
        elif self.last is not None and self.last[0] == expert:
            known = self.last[1]
        return known if known is not None and len(known[0]) == len(x) else None


def _every_token(x_ETI: Tensor) -> tuple[Tensor, Tensor, int]:
    """If all tokens go through all experts: each row's expert and token, and the token count."""
    count, of = x_ETI.shape[:2]
    expert_ET = torch.arange(count, device=x_ETI.device)[:, None].expand(count, of)
    token_ET = torch.arange(of, device=x_ETI.device).expand(count, of)
    is_used_ET = x_ETI.ne(0).any(-1)  # rows of tokens that are not routed to the expert are zero
    return expert_ET.masked_fill(~is_used_ET, -1).reshape(-1), token_ET.reshape(-1), of


def _is_rows(matrix: object, index: object) -> bool:
    """True if `matrix[index]` selects rows of a matrix."""
    return (
        isinstance(matrix, Tensor)
        and isinstance(index, Tensor)
        and (matrix.ndim, index.ndim, index.dtype) == (2, 1, torch.int64)
    )


_CASTS = {Tensor.float, Tensor.to, Tensor.type}

_PRODUCTS = {
    F.linear, torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm,
    Tensor.__matmul__,
}  # fmt: skip
