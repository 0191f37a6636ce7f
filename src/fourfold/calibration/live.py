# SPDX-License-Identifier: Apache-2.0
"""Calibration of a model that is in memory already: the caller's own loop runs it.

    quantize(model, OUT, recipe, forward_loop=lambda model: [model(**batch) for batch in data])

The observers are those of the streamed run and see the same activations, so the same data gives the
same bytes. The whole model runs at once, so the statistics of all layers are in memory together.

Ranks that share a sharded model each run their own part of the data; amaxes are then reduced by
maximum, counts and moments by sum. Afterwards one layer after the other is gathered in memory, and
rank 0 writes it: it alone has the moments.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from fourfold.calibration.data import CalibrationData, digest_batch
from fourfold.calibration.kv_cache import record_updates, recording_cache, usual_cache
from fourfold.calibration.observers import Observers
from fourfold.calibration.padding import pad_ids, text_mask
from fourfold.calibration.reading import ending_at_the_head, observing, read_batch
from fourfold.calibration.scales import ActivationScales, model_summary
from fourfold.calibration.statistics import (
    DataSummary,
    Sites,
    Statistics,
    data_summary,
    is_kept,
    merged,
)
from fourfold.errors import ObservationError
from fourfold.events import BatchCalibrated, OnEvent, ignore
from fourfold.models.internals import runnable
from fourfold.planning import Plan, slabs_of
from fourfold.storage.source import Source

ForwardLoop = Callable[[Any], object]
"""Calls the model on calibration data, any number of times."""

PIECE = 1 << 21
"""Elements of a moment that ranks exchange at a time."""


def held_layers(plan: Plan, source: Source) -> Iterator[int | None]:
    """Bring one decoder layer after the other into memory, then (None) the non-layer tensors.

    All ranks that share the model must iterate together; only rank 0 keeps what it gathers.
    """
    for layer in (*range(len(plan.inventory.layer_paths)), None):
        shards = (plan.shards[number] for number in plan.shards_of(layer))
        jobs = (job for shard in shards for job in shard.jobs)
        keys = dict.fromkeys(key for job in jobs for key, *_ in slabs_of(job))
        source.hold(keys, keep=source.rank == 0)
        try:
            yield layer
        finally:
            source.release()


def observe_live(
    plan: Plan,
    source: Source,
    forward_loop: ForwardLoop | CalibrationData,
    on_event: OnEvent = ignore,
) -> ActivationScales:
    """Observe a model in memory while it reads data; return the scales of all ranks' activations.

    Meanwhile the model is in evaluation mode and computes no gradients; afterwards it is as before.

    Raises:
        ObservationError: If the loop does not call the model, or an input site saw no tokens.
            Errors of the loop itself are passed on.
    """
    with source.agreeing():
        statistics = _observed(plan, source, forward_loop, on_event)
    if source.is_sharded:
        statistics = _of_all_ranks(source, statistics)
    scales = ActivationScales(plan, statistics)
    scales.check_all()
    return scales


def _of_all_ranks(source: Source, mine: Statistics) -> Statistics:
    """Merge what the ranks that share a model have seen; rank 0 alone gets the large statistics."""
    large: Sites = {
        site: {name: tensor for name, tensor in state.items() if not is_kept(name)}
        for site, state in mine.sites.items()
    }
    mine.drop_large()
    all_ranks: list[Statistics] = source.gather(mine)
    if len({rank.data.digest for rank in all_ranks}) == 1:  # they have read the same
        statistics = all_ranks[0]
    else:
        statistics = merged(all_ranks)
        _sum_up(source, large)
    for site, state in large.items() if source.rank == 0 else ():
        statistics.sites[site] |= state
    return statistics


def _sum_up(source: Source, large: Sites) -> None:
    """Add the sums of all ranks to those of rank 0, a piece at a time; ranks may lack some."""
    mine = {(site, name): x for site, state in large.items() for name, x in state.items()}
    layouts: dict[tuple[str, str], tuple[torch.Size, torch.dtype]] = {}
    for of_rank in source.gather({key: (x.shape, x.dtype) for key, x in mine.items()}):
        layouts |= of_rank
    for site, name in sorted(layouts):
        shape, dtype = layouts[site, name]
        if source.rank == 0 and (site, name) not in mine:
            mine[site, name] = torch.zeros(shape, dtype=dtype)
            large.setdefault(site, {})[name] = mine[site, name]
        sums = mine[site, name].view(-1) if (site, name) in mine else None
        for start in range(0, shape.numel(), PIECE):
            part = slice(start, start + PIECE)
            # A copy, because a view would be sent with all that it is a view of.
            pieces = source.gather(None if sums is None else sums[part].clone())
            if source.rank == 0 and sums is not None:
                for of_rank in pieces[1:]:
                    if of_rank is not None:
                        sums[part] += of_rank


def _observed(
    plan: Plan, source: Source, forward_loop: ForwardLoop | CalibrationData, on_event: OnEvent
) -> Statistics:
    """Return the statistics of this process."""
    calls = _SeenCalls()
    # Of data that all ranks read, one of them needs to see everything.
    large = source.rank == 0 or not isinstance(forward_loop, CalibrationData)
    with evaluating(source.model), ExitStack() as stack:
        observers = stack.enter_context(
            observing(plan, source.model, source.module_tree, large=large)
        )
        stack.enter_context(_watching_calls(plan, source, observers, calls))
        if isinstance(forward_loop, CalibrationData):
            _read(source, forward_loop, on_event)
        else:
            forward_loop(source.model)
    if not calls.samples:
        raise ObservationError(
            "forward_loop: the model itself was never called with input_ids. Call it on your data: "
            "`model(input_ids=…)`, not a part of it."
        )
    all_experts = plan.recipe.calibration.all_experts
    if isinstance(forward_loop, CalibrationData):
        summary = data_summary(forward_loop, all_experts=all_experts)
    else:
        summary = calls.summary(all_experts)
    statistics = Statistics(summary, model=model_summary(plan))
    observers.take(statistics)
    return statistics


def _read(source: Source, data: CalibrationData, on_event: OnEvent) -> None:
    """Call the model on calibration data.

    Ranks that share the model all read all of the data, because a call gathers layers from all of
    them. Their statistics are equal then.
    """
    model = runnable(source.model)
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    # In a sharded model, a call that does not end would leave layers gathered.
    ending = nullcontext() if source.is_sharded else ending_at_the_head(model)
    with ending:
        count, tokens = len(data.batches), 0
        for number, batch in enumerate(data.batches):
            on_event(BatchCalibrated(0, 0, number, count, tokens, data.tokens))
            read_batch(model, batch, device)
            tokens += int(batch.attention_mask.sum())
        on_event(BatchCalibrated(0, 0, count, count, tokens, data.tokens))


class _SeenCalls:
    """Describes the data that the model was called on, as `CalibrationData` does."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.samples = self.seq = self.tokens = 0

    def add(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        mask = torch.ones_like(input_ids) if mask is None else mask
        digest_batch(self.digest, input_ids.cpu(), mask.cpu())
        self.samples += input_ids.shape[0]
        self.seq = max(self.seq, input_ids.shape[-1])
        self.tokens += int(mask.sum())

    def summary(self, all_experts: bool) -> DataSummary:
        digest = self.digest.hexdigest()
        return DataSummary("forward_loop", digest, self.samples, self.seq, self.tokens, all_experts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; afterwards it is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _watching_calls(
    plan: Plan, source: Source, observers: Observers, calls: _SeenCalls
) -> Iterator[None]:
    """Record ids and mask of each call, and keys and values if the KV cache is calibrated."""
    current_layer = ""

    def record(keys: torch.Tensor, values: torch.Tensor) -> None:
        observers.see_kv(current_layer, keys, values)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        arguments = signature.bind_partial(*args, **kwargs).arguments
        ids = arguments.get("input_ids")
        mask = _mask_of(ids, arguments.get("attention_mask"), pads)
        observers.see(mask)
        if isinstance(ids, torch.Tensor):
            calls.add(ids, mask)
        if plan.kv_scales:
            cache = arguments.get("past_key_values")
            if cache is None:
                # The caller may read the cache that the model returns, unless it asked for none.
                is_returned = arguments.get("use_cache") is not False
                cache = usual_cache(model) if is_returned else recording_cache(model, record)
                kwargs = kwargs | {"past_key_values": cache, "use_cache": True}
            if not hasattr(cache, "record"):
                stack.callback(record_updates(cache, record))
        return args, kwargs

    def enter(path: str, *_: Any) -> None:
        nonlocal current_layer
        current_layer = path

    model = runnable(source.model)
    generation = getattr(model, "generation_config", None)
    pads = pad_ids(source.config, {} if generation is None else generation.to_dict())
    signature = inspect.signature(model.forward)
    with ExitStack() as stack:
        stack.enter_context(model.register_forward_pre_hook(before, with_kwargs=True))
        for path in plan.inventory.layer_paths:
            layer = source.model.get_submodule(path)
            stack.enter_context(layer.register_forward_pre_hook(partial(enter, path)))
        yield


def _mask_of(ids: Any, mask: Any, pads: frozenset[int]) -> torch.Tensor | None:
    """Return the mask [B, S] of the tokens of a call; None if there is no padding.

    If the call has no mask, its model reads pads as text; they are left out of the statistics.
    """
    if not isinstance(ids, torch.Tensor):
        return None
    if mask is None:
        return text_mask(ids, pads)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise ObservationError(
            "forward_loop: attention_mask is not a tensor of shape [batch, sequence], so padding "
            "cannot be told from text. Give such a mask, or leave it out if nothing is padded."
        )
    return mask[:, -ids.shape[1] :]
