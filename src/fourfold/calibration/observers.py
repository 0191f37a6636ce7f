# SPDX-License-Identifier: Apache-2.0
"""Observers: hooks that update statistics with what linear layers, experts and caches read.

They change nothing that the model computes. Statistics are accumulated on the model's own device
and moved to the CPU once, when a layer is done; the large ones of a model in memory, which has all
layers at a time, are accumulated on the CPU. Rows of padding are left out wherever it is known
which token a row belongs to.

Shapes: B samples of a call, S tokens of a sample, T = B·S tokens, R rows, I input features,
E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.calibration.statistics import Statistics
from fourfold.calibration.stream import RecordedRows, Stream
from fourfold.errors import ObservationError
from fourfold.models.expert_hooks import Rows, watch_experts
from fourfold.models.experts import ExpertsModule
from fourfold.statistics import KEPT, SMALL, STATISTICS, Site, State, Statistic


class Observers:
    """Collects statistics at experts modules, linear layers and KV caches of one model."""

    def __init__(
        self,
        model: nn.Module,
        experts: Mapping[str, ExpertsModule],
        linears: Iterable[str],
        *,
        all_experts: bool = False,
        statistics: Mapping[str, Collection[str]] | None = None,
        large_on_cpu: bool = False,
    ) -> None:
        """Prepare to observe a model; `attached` does it.

        Args:
            model: The model that will be called.
            experts: The experts modules to observe, by module path.
            linears: Paths of the linear layers to observe.
            all_experts: Whether every token is shown to every expert, besides those it is routed
                to. Token counts stay those of the router.
            statistics: Names of the statistics to collect, by site name; by default `SMALL` at
                every site.
            large_on_cpu: Whether all statistics but `KEPT` are summed up on the CPU, for a model
                that leaves no room for them on its own device.
        """
        self.model, self.all_experts = model, all_experts
        self.layouts, self.linears = dict(experts), tuple(linears)
        self.wanted, self.large_on_cpu = statistics, large_on_cpu
        self.states: dict[str, State] = {}
        """By site name, the tensors of all its statistics."""
        self.mask_T: Tensor | None = None
        """True for the tokens of the current call that are not padding; None if none is."""
        self.mask_shape = torch.Size()
        """[B, S] of the current call, if it has padding."""
        self.order: list[str] = []
        """The sites that were observed since `take`, in the order in which they were first."""
        self.stream: Stream | None = None
        """What stands in place of the statistics, while the model is run for something else."""
        self.ignored: str | None = None
        """The path of a module whose inside is not observed, while its layer is replayed."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the model inside the block; restore it afterwards, also after an error."""
        with ExitStack() as stack:
            for path in self.linears:
                module, see = self.model.get_submodule(path), partial(self._see_linear, path)
                stack.enter_context(module.register_forward_pre_hook(see, with_kwargs=True))
            stack.enter_context(watch_experts(self.model, self.layouts, self))
            yield

    def see(self, attention_mask: Tensor | None) -> None:
        """Note the mask `[B, S]`, 0 for padding, of the call that runs from now on."""
        self.mask_T = None
        if attention_mask is not None and not bool(attention_mask.all()):
            self.mask_T, self.mask_shape = attention_mask.reshape(-1).bool(), attention_mask.shape

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        """Observe rows that an experts module is about to multiply (`expert_hooks.Watch`)."""
        if self._is_ignored(rows.path):
            return rows.x
        x, experts = rows.x.detach(), rows.experts
        num_experts = self.layouts[rows.path].num_experts
        counts = (experts >= 0) & (experts < num_experts)
        if self.mask_T is not None and rows.tokens is not None and rows.of == len(self.mask_T):
            is_text_R = self.mask_T.to(counts.device)[rows.tokens]
            counts &= is_text_R[:, None] if experts.ndim == 2 else is_text_R
        site = Site(f"{rows.path}.{rows.product}", x.shape[-1], num_experts)
        experts = experts.masked_fill(~counts, -1)
        if self.stream is not None:
            shown = self.stream.round(site.name, x)
            if is_routed and rows.is_counted:
                self.stream.record(site.name, RecordedRows(shown, experts, rows.tokens))
                if rows.is_whole:
                    self.stream.check()
            return shown
        for statistic, state in self._states_of(site, x.device, rows.product):
            if self._applies(statistic, rows, is_routed):
                statistic.update(state, x, experts)
        return rows.x

    def _is_ignored(self, path: str) -> bool:
        return self.ignored is not None and f"{path}.".startswith(f"{self.ignored}.")

    def _applies(self, statistic: Statistic, rows: Rows, is_routed: bool) -> bool:
        """True if these rows count. A maximum may see a row twice; a sum may not."""
        if statistic.reduction == "max":
            return True
        counts_routing = statistic.is_routing or not self.all_experts
        return rows.is_counted and is_routed == counts_routing

    def _see_linear(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._is_ignored(path):
            return None
        x: Tensor = (args[0] if args else kwargs["input"]).detach()
        if self.stream is not None:
            shown = self.stream.round(path, x)
            self.stream.record(path, RecordedRows(self._without_padding(shown)))
            return ((shown, *args[1:]), kwargs) if args else (args, kwargs | {"input": shown})
        rows = self._without_padding(x)
        if not len(rows):
            return None
        for statistic, state in self._states_of(Site(path, x.shape[-1]), x.device):
            statistic.update(state, rows, None)
        return None

    def _without_padding(self, x: Tensor) -> Tensor:
        """The rows `[R, I]` of a linear layer's input, without padding where tokens are known."""
        rows = x.reshape(-1, x.shape[-1])
        if self.mask_T is None:
            return rows
        if x.ndim >= 3 and x.shape[:2] == self.mask_shape:
            groups = len(rows) // len(self.mask_T)  # several rows a token, in a grouped layer
            return rows[self.mask_T.to(x.device).repeat_interleave(groups)]
        if len(rows) == len(self.mask_T):
            return rows[self.mask_T.to(x.device)]
        return rows

    def see_kv(self, layer: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Observe keys and values `[B, heads, S, width]` that a decoder layer puts into its cache.

        Keys are those after rotary embedding; the width of values may be another. Returns what
        attention shall read instead, if a stream rounds them.
        """
        if self._is_ignored(layer):
            return None
        if self.stream is not None:
            return self.stream.round_states and self.stream.round_states(keys, values)
        for expert, states in enumerate((keys, values)):
            x = states.transpose(1, 2).flatten(2)
            rows = self._without_padding(x)
            site = Site(f"{layer}.kv", x.shape[-1], 2)
            for statistic, state in self._states_of(site, x.device, "kv"):
                numbers = torch.full((len(rows),), expert, device=x.device)
                statistic.update(state, rows, numbers)
        return None

    def _states_of(
        self, site: Site, device: torch.device, product: str | None = None
    ) -> Iterator[tuple[Statistic, State]]:
        """Each statistic that is collected at a site, and its state, which is made if need be."""
        if site.name not in self.states:
            self.order.append(site.name)
        for name in SMALL if self.wanted is None else self.wanted.get(site.name, ()):
            statistic = STATISTICS[name]
            if product is None or statistic.products is None or product in statistic.products:
                states, shapes = self.states.setdefault(site.name, {}), statistic.shapes(site)
                if not shapes.keys() <= states.keys():
                    on_cpu = self.large_on_cpu and name not in KEPT
                    states |= statistic.new(site, "cpu" if on_cpu else device)
                yield statistic, {tensor: states[tensor] for tensor in shapes}

    def take(self, statistics: Statistics) -> None:
        """Move what was collected into `statistics`; `ObservationError` if NaN or Inf is in it."""
        for site, states in self.states.items():
            statistics.sites[site] = {name: _finite(site, states[name]) for name in sorted(states)}
        self.states.clear()


def _finite(site: str, tensor: Tensor) -> Tensor:
    # Least and largest, which are NaN if any is: `isfinite` would copy a tensor that may be large.
    if tensor.is_floating_point() and not all(map(torch.isfinite, tensor.aminmax())):
        raise ObservationError(
            f"{site}: NaN or Inf among the activations. "
            "Is the checkpoint damaged, or does the model overflow in its dtype?"
        )
    return tensor.cpu()
