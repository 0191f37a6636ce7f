"""See, and change if need be, what the matrix products of an experts module are given.

Two products follow each other in every expert: gate and up read the hidden states, down reads
what the activation made of them. Both inputs are shown to a `Watch`, whatever the class:

- Decorated classes run transformers' own function with a proxy as the module. The proxy answers
  as the module does, but what its activation gives is shown before the function goes on. Nothing
  is computed anew, so the outputs are those of the default implementation, bit for bit.
- Classes that transformers does not decorate, and models that only know the eager forward, run
  their own forward under a mode that recognizes products with their parameters, and which rows
  of the tokens were taken for them.

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
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fourfold.models.experts import ExpertsModule, Part, Projection
from fourfold.models.internals import ExpertsFunction, experts_function, experts_kind
from fourfold.models.roles import EXPERTS_CLASS


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
    """True for exactly one showing of each row to each product: gate and up may be computed one
    after the other, from the same rows."""


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
                whole = _outermost(model, path)
                stack.enter_context(_under_mode(whole, module, experts[path], watch))
        yield


def _outermost(model: nn.Module, path: str) -> nn.Module:
    """The experts module at a path, or the one around it, which chooses its rows (DBRX)."""
    around = model.get_submodule(path.rpartition(".")[0])
    is_experts = EXPERTS_CLASS.search(type(around).__name__) is not None
    return around if is_experts else model.get_submodule(path)


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
            rows = Rows(path, Product.DOWN, inner_RI, expert_R, token_R + begin, tokens, True)
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
def _under_mode(
    whole: nn.Module, module: nn.Module, layout: ExpertsModule, watch: Watch
) -> Iterator[None]:
    """The forward of `whole`, under a mode that knows the parameters of `module`."""
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


Note = TypeVar("Note")


class _Notes(Generic[Note]):
    """What is known of tensors, for as long as they live."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], Note]] = {}

    def put(self, tensor: Tensor, note: Note) -> None:
        identity = id(tensor)
        gone = weakref.ref(tensor, lambda _: self._notes.pop(identity, None))
        self._notes[identity] = gone, note

    def get(self, tensor: Tensor) -> Note | None:
        return self._notes[id(tensor)][1] if id(tensor) in self._notes else None


class _KnownWeights(TorchFunctionMode):
    """Recognizes products `x @ w` where `w` is one of the experts' parameters, or a part of one."""

    def __init__(self, module: nn.Module, layout: ExpertsModule, watch: Watch) -> None:
        super().__init__()
        self.module, self.layout, self.watch = module, layout, watch
        self.casts = _Notes[Tensor]()
        """Of a part in another dtype: the part itself."""
        self.taken = _Notes[tuple[Tensor, int]]()
        """Of rows that were taken from a matrix: their numbers, and how many it has."""
        self.last: tuple[int, tuple[Tensor, int]] | None = None
        """The expert whose rows were shown last, and what is known of them."""

    @property
    def parts(self) -> Mapping[int, tuple[Tensor, Part]]:
        """The parameters by their storage: as it is now, for an offloaded one comes and goes."""
        found: dict[int, tuple[Tensor, Part]] = {}
        for part in self.layout.parts:
            if not part.is_bias:
                parameter = getattr(self.module, part.parameter)
                found.setdefault(parameter.untyped_storage()._cdata, (parameter, part))
        return found

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
            self._follow(args[0], result)
        elif func is Tensor.__getitem__ and _is_rows(*args):
            self.taken.put(result, (args[1], len(args[0])))
        return result

    def _follow(self, tensor: Tensor, cast: Tensor) -> None:
        if tensor.untyped_storage()._cdata in self.parts:
            self.casts.put(cast, tensor)
        if (rows := self.taken.get(tensor)) is not None:
            self.taken.put(cast, rows)

    def _original(self, weight: Tensor) -> Tensor:
        known = self.casts.get(weight)
        return weight if known is None else known

    def _show(self, x: Tensor, weight: Tensor, parameter: Tensor, part: Part) -> Tensor:
        product = Product.DOWN if part.projection is Projection.DOWN else Product.GATE_UP
        is_counted = product is Product.DOWN or part.parameter == self.layout.parts[0].parameter
        shown = x.reshape(-1, x.shape[-1])
        experts, tokens, of = self._rows(x, weight, parameter)
        rows = Rows(self.layout.path, product, shown, experts, tokens, of, is_counted)
        given = self.watch(rows, is_routed=True)
        return x if given is shown else given.reshape(x.shape)  # x: another mode may know it

    def _rows(
        self, x: Tensor, weight: Tensor, parameter: Tensor
    ) -> tuple[Tensor, Tensor | None, int]:
        """Each row's expert, its token if that is known, and of how many tokens they are."""
        if weight.ndim == 3:
            return _every_token(x)
        expert = self._expert(weight, parameter)
        tokens, of = self._tokens(expert, x) or (None, x.shape[-2])
        return torch.full((x.shape[-2],), expert, device=x.device), tokens, of

    def _expert(self, weight: Tensor, parameter: Tensor) -> int:
        start = int(weight.storage_offset()) - int(parameter.storage_offset())
        each = parameter[0].numel() if parameter.ndim == 3 else (
            parameter.numel() // self.layout.num_experts
        )  # fmt: skip
        return start // each

    def _tokens(self, expert: int, x: Tensor) -> tuple[Tensor, int] | None:
        """The tokens of an expert's rows, and of how many they are, as far as that is known.

        Down reads the rows that gate and up have read.
        """
        known = self.taken.get(x)
        if known is not None:
            self.last = expert, known
        elif self.last is not None and self.last[0] == expert:
            known = self.last[1]
        return known if known is not None and len(known[0]) == len(x) else None


def _every_token(x_ETI: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where all tokens go through all experts: each row's expert and token, and how many tokens."""
    count, of = x_ETI.shape[:2]
    expert_ET = torch.arange(count, device=x_ETI.device)[:, None].expand(count, of)
    token_ET = torch.arange(of, device=x_ETI.device).expand(count, of)
    is_used_ET = x_ETI.ne(0).any(-1)  # a token's row is zero where it is not routed
    return expert_ET.masked_fill(~is_used_ET, -1).reshape(-1), token_ET.reshape(-1), of


def _is_rows(matrix: object, index: object) -> bool:
    """Whether `matrix[index]` takes some rows of a matrix."""
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
