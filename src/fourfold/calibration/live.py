"""Calibration of a model that is live in memory: the caller's own loop runs it.

    quantize(model, OUT, recipe, forward_loop=lambda model: [model(**batch) for batch in data])

The same observers as in the streamed run see the same activations, so the same data gives the
same bytes. Ranks that share a sharded model run their own part of the data; amaxes are reduced by
maximum and counts by sum. Then layer after layer is brought into memory, for rank 0 to write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fourfold.calibration.calibrate import observing
from fourfold.calibration.data import digest_batch
from fourfold.calibration.kv_cache import record_updates, recording_cache
from fourfold.calibration.observers import Observers
from fourfold.calibration.scales import ActivationScales
from fourfold.calibration.statistics import DataSummary, Statistics, merged
from fourfold.errors import FourfoldError, ObservationError
from fourfold.models.internals import runnable
from fourfold.models.live import LiveSource
from fourfold.planning import Plan, raw_keys

ForwardLoop = Callable[[Any], object]
"""Calls the model on calibration data, as often as it likes."""


def units_of(plan: Plan, source: LiveSource) -> Iterator[int | None]:
    """Every decoder layer, then the shell (None); each in memory while it is the present one."""
    for layer in (*range(len(plan.inventory.layer_paths)), None):
        shards = (plan.shards[number] for number in plan.shards_of(layer))
        jobs = (job for shard in shards for job in shard.jobs)
        keys = dict.fromkeys(key for job in jobs for key in raw_keys(job))
        source.hold(keys, keep=source.rank == 0)
        yield layer
        source.release()


def observe_live(plan: Plan, source: LiveSource, forward_loop: ForwardLoop) -> ActivationScales:
    """Run the caller's loop with observers attached; the scales that it gives.

    The model is in evaluation mode meanwhile, and without gradients; afterwards it is as before.
    Raises what the loop raises, and `ObservationError` where an input site saw nothing.
    """
    seen = _Seen()
    with _evaluating(source.model), ExitStack() as stack:
        observers = stack.enter_context(observing(plan, source.model, source.tree))
        stack.enter_context(_watching_calls(plan, source, observers, seen))
        forward_loop(source.model)
    statistics = Statistics(seen.summary(all_experts=plan.recipe.calibration.all_experts))
    observers.take(statistics)
    if source.is_sharded:
        statistics = merged(_of_all_ranks(statistics))
    if not statistics.data.samples:
        raise ObservationError("forward_loop: the model was never called. Call it on your data.")
    scales = ActivationScales(plan, statistics)
    for layer in (None, *range(len(plan.inventory.layer_paths))):
        scales.check(layer)
    return scales


class _Seen:
    """What data the model was called on, in the terms of `CalibrationData`."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.samples = self.seq = self.tokens = 0

    def add(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        mask = torch.ones_like(input_ids) if mask is None else mask
        digest_batch(self.digest, input_ids.cpu(), mask.cpu())
        self.samples += input_ids.shape[0]
        self.seq = max(self.seq, input_ids.shape[-1])
        self.tokens += int(mask.sum())

    def summary(self, *, all_experts: bool) -> DataSummary:
        return DataSummary(
            "forward_loop",
            self.digest.hexdigest(),
            self.samples,
            self.seq,
            self.tokens,
            all_experts,
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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
    plan: Plan, source: LiveSource, observers: Observers, seen: _Seen
) -> Iterator[None]:
    """See each call's ids and mask; where the KV cache is calibrated, its keys and values."""
    present = [""]

    def record(keys: torch.Tensor, values: torch.Tensor) -> None:
        observers.see_kv(present[0], keys, values)

    def before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        observers.see(mask)
        if isinstance(ids, torch.Tensor):
            seen.add(ids, mask if mask is None or mask.shape == ids.shape else None)
        if plan.kv_scales:
            given = kwargs.get("past_key_values")
            if given is None:
                cache = recording_cache(model, record)
                kwargs = kwargs | {"past_key_values": cache, "use_cache": True}
            else:
                record_updates(given, record)
        return args, kwargs

    def enter(path: str, *_: Any) -> None:
        present[0] = path

    with ExitStack() as stack:
        part = runnable(source.model)
        stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
        for path in plan.inventory.layer_paths:
            layer = source.model.get_submodule(path)
            stack.callback(layer.register_forward_pre_hook(partial(enter, path)).remove)
        yield


def _of_all_ranks(statistics: Statistics) -> list[Statistics]:
    everyone: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(everyone, statistics.to_bytes())
    return [Statistics.from_bytes(each) for each in everyone]


@contextmanager
def agreeing(source: LiveSource) -> Iterator[None]:
    """Within, an error of one rank becomes one of all ranks, instead of a wait without end."""
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if source.is_sharded:
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, None if error is None else str(error))
        failed = [(rank, text) for rank, text in enumerate(everyone) if text is not None]
        if failed and error is None:
            raise FourfoldError(f"rank {failed[0][0]}: {failed[0][1]}")
    if error is not None:
        raise error
