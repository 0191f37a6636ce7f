"""Observers: they see what linear layers, experts and caches are given, and change nothing.

Everything is a running maximum or a count on the model's own device; values are read once, when a
layer is done. NaN and Inf are kept as Inf, so that they are found then. Rows of padding are left
out wherever a row's token is known.

Shapes: T tokens of a call, R rows, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.calibration.statistics import ExpertsStatistics, LinearStatistics, Statistics
from fourfold.errors import ObservationError
from fourfold.models.experts import ExpertsModule
from fourfold.models.watching import Product, Rows, watch_experts


class Observers:
    """Takes statistics of the experts modules and linear layers at some paths of a model."""

    def __init__(
        self,
        model: nn.Module,
        experts: Mapping[str, ExpertsModule],
        linears: Iterable[str],
        *,
        all_experts: bool = False,
    ) -> None:
        self.model, self.all_experts = model, all_experts
        self.layouts, self.paths = dict(experts), tuple(linears)
        self.experts: dict[str, dict[str, Tensor]] = {}
        self.linears: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.kv: dict[str, Tensor] = {}
        self.mask_T: Tensor | None = None
        """Which tokens of the present call are no padding; None where all are."""
        self.shape = torch.Size()
        """[B, S] of the present call, where some are padding."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, the model is observed; afterwards it is as it was before, also after an error."""
        with ExitStack() as stack:
            for path in self.paths:
                hook = self.model.get_submodule(path).register_forward_pre_hook(
                    partial(self._see_linear, path), with_kwargs=True
                )
                stack.callback(hook.remove)
            stack.enter_context(watch_experts(self.model, self.layouts, self))
            yield

    def see(self, attention_mask: Tensor | None) -> None:
        """A call goes on whose tokens are these. attention_mask: [B, S]; 0 where padded."""
        self.mask_T = None
        if attention_mask is not None and not bool(attention_mask.all()):
            self.mask_T, self.shape = attention_mask.reshape(-1).bool(), attention_mask.shape

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        """An experts module is about to multiply."""
        amax_R = _row_amax(rows.x.detach())
        experts = rows.experts
        if experts.ndim == 2:
            amax_R = amax_R[:, None].expand(experts.shape)
        valid = (experts >= 0) & (experts < self.layouts[rows.path].num_experts)
        if self.mask_T is not None and rows.tokens is not None and rows.of == len(self.mask_T):
            kept_R = self.mask_T.to(valid.device)[rows.tokens]
            valid &= kept_R[:, None] if experts.ndim == 2 else kept_R
        found = self._of(rows.path, rows.x.device)
        chosen = experts[valid]
        found[rows.product].scatter_reduce_(0, chosen, amax_R[valid], "amax")
        if rows.is_counted and is_routed:
            found["tokens"] += torch.bincount(chosen, minlength=len(found["tokens"]))
        return rows.x

    def _of(self, path: str, device: torch.device) -> dict[str, Tensor]:
        if path not in self.experts:
            count = self.layouts[path].num_experts
            self.experts[path] = {
                product: torch.zeros(count, dtype=torch.float32, device=device)
                for product in Product
            } | {"tokens": torch.zeros(count, dtype=torch.int64, device=device)}
        return self.experts[path]

    def _see_linear(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        amax = _row_amax(x.detach())
        amax_R = amax.reshape(-1)
        if self.mask_T is not None and amax.shape[:2] == self.shape:
            rows_of_a_token = amax[0, 0].numel()  # several, where a layer works on groups
            amax_R = amax_R[self.mask_T.to(amax.device).repeat_interleave(rows_of_a_token)]
        elif self.mask_T is not None and len(amax_R) == len(self.mask_T):
            amax_R = amax_R[self.mask_T.to(amax.device)]
        if amax_R.numel():
            self.rows[path] = self.rows.get(path, 0) + amax_R.numel()
            self.linears[path] = _larger(self.linears.get(path), amax_R.max())

    def see_kv(self, layer: str, keys: Tensor, values: Tensor) -> None:
        """Attention gives its cache these keys and values, `[B, heads, S, width]` each."""
        pair = torch.stack([self._kv_amax(keys), self._kv_amax(values)])
        self.kv[layer] = _larger(self.kv.get(layer), pair)

    def _kv_amax(self, states: Tensor) -> Tensor:
        amax_BS = _row_amax(states.transpose(1, 2).flatten(2)).reshape(-1)
        if self.mask_T is not None and len(amax_BS) == len(self.mask_T):
            amax_BS = amax_BS[self.mask_T.to(amax_BS.device)]
        return amax_BS.max() if amax_BS.numel() else amax_BS.new_zeros(())

    def take(self, statistics: Statistics) -> None:
        """Move what was found into `statistics`. Raises `ObservationError` for NaN and Inf."""
        for path, found in self.experts.items():
            amaxes = [_finite(f"{path}.{each}", found[each]) for each in Product]
            statistics.experts[path] = ExpertsStatistics(found["tokens"].cpu(), *amaxes)
        for path, amax in self.linears.items():
            value = float(_finite(path, amax))
            statistics.linears[path] = LinearStatistics(value, self.rows[path])
        for path, pair in self.kv.items():
            key, value = _finite(f"{path}: keys and values", pair).tolist()
            statistics.kv[path] = (key, value)
        for each in (self.experts, self.linears, self.rows, self.kv):
            each.clear()


def _row_amax(x: Tensor) -> Tensor:
    """The largest magnitude of each row, float32; NaN becomes Inf."""
    amax: Tensor = torch.linalg.vector_norm(x, math.inf, dim=-1).float()
    return amax.nan_to_num(nan=math.inf, posinf=math.inf)


def _larger(before: Tensor | None, now: Tensor) -> Tensor:
    return now if before is None else torch.maximum(before, now)


def _finite(what: str, amax: Tensor) -> Tensor:
    if not bool(torch.isfinite(amax).all()):
        raise ObservationError(
            f"{what}: NaN or Inf among the activations. "
            "Is the checkpoint damaged, or does the model overflow in its dtype?"
        )
    return amax.cpu()
