"""Calibration of a model that is live in memory: the caller's own loop runs it.

    quantize(model, OUT, recipe, forward_loop=lambda model: [model(**batch) for batch in data])

The same observers as in the streamed run see the same activations, so the same data gives the
same bytes. Ranks that share a sharded model run their own part of the data; amaxes are reduced by
maximum and counts by sum. Then layer after layer is brought into memory, for rank 0 to write.
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
from fourfold.calibration.reading import ending_at_the_head, observing, read_batch
from fourfold.calibration.scales import ActivationScales, model_summary
from fourfold.calibration.statistics import DataSummary, Statistics, data_summary, merged
from fourfold.errors import ObservationError
from fourfold.models.internals import runnable
from fourfold.planning import Plan, raw_keys
from fourfold.storage.source import Source

ForwardLoop = Callable[[Any], object]
"""Calls the model on calibration data, as often as it likes."""


def units_of(plan: Plan, source: Source) -> Iterator[int | None]:
    """Yield every decoder layer, then None for the non-layer tensors; each is in memory until the
    next one."""
    for layer in (*range(len(plan.inventory.layer_paths)), None):
        shards = (plan.shards[number] for number in plan.shards_of(layer))
        jobs = (job for shard in shards for job in shard.jobs)
        keys = dict.fromkeys(key for job in jobs for key in raw_keys(job))
        source.hold(keys, keep=source.rank == 0)
        try:
            yield layer
        finally:
            source.release()


def observe_live(
    plan: Plan, source: Source, forward_loop: ForwardLoop | CalibrationData
) -> ActivationScales:
    """Run the caller's loop, or calibration data, with observers attached; the scales of that.

    The model is in evaluation mode meanwhile, and without gradients; afterwards it is as before.
    Raises what the loop raises, and `ObservationError` where an input site saw nothing.
    """
    with source.agreeing():
        statistics = _observed(plan, source, forward_loop)
    if source.is_sharded:
        statistics = merged(_of_all_ranks(source, statistics))
    scales = ActivationScales(plan, statistics)
    for layer in (None, *range(len(plan.inventory.layer_paths))):
        scales.check(layer)
    return scales


def _observed(
    plan: Plan, source: Source, forward_loop: ForwardLoop | CalibrationData
) -> Statistics:
    """What this process saw."""
    seen, all_experts = _Seen(), plan.recipe.calibration.all_experts
    given = forward_loop if isinstance(forward_loop, CalibrationData) else None
    loop: ForwardLoop = (
        partial(_read, source, forward_loop)
        if isinstance(forward_loop, CalibrationData)
        else forward_loop
    )
    with _evaluating(source.model), ExitStack() as stack:
        observers = stack.enter_context(observing(plan, source.model, source.module_tree))
        stack.enter_context(_watching_calls(plan, source, observers, seen))
        loop(source.model)
    if not seen.samples:
        raise ObservationError(
            "forward_loop: the model itself was never called with input_ids. Call it on your data: "
            "`model(input_ids=…)`, not a part of it."
        )
    summary = seen.summary(all_experts) if given is None else data_summary(
        given, all_experts=all_experts
    )  # fmt: skip
    statistics = Statistics(summary, model=model_summary(plan))
    observers.take(statistics)
    return statistics


def _read(source: Source, data: CalibrationData, model: Any) -> None:
    """Call the model on calibration data. On every rank all of it, where several share the model:
    its layers are brought together for a call, and what is found is then the same everywhere."""
    part = runnable(model)
    device = part.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    ending = nullcontext() if source.is_sharded else ending_at_the_head(part)
    with ending:  # of a sharded model, a call that does not end leaves layers unsharded
        for batch in data.batches:
            read_batch(part, batch, device)


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

    def summary(self, all_experts: bool) -> DataSummary:
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
    plan: Plan, source: Source, observers: Observers, seen: _Seen
) -> Iterator[None]:
    """See each call's ids and mask; where the KV cache is calibrated, its keys and values."""
    present = [""]

    def record(keys: torch.Tensor, values: torch.Tensor) -> None:
        observers.see_kv(present[0], keys, values)

    def before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = signature.bind_partial(*args, **kwargs).arguments
        ids = given.get("input_ids")
        mask = _mask_of(ids, given.get("attention_mask"))
        observers.see(mask)
        if isinstance(ids, torch.Tensor):
            seen.add(ids, mask)
        if plan.kv_scales:
            cache = given.get("past_key_values")
            if cache is None:
                stores = given.get("use_cache") is not False
                cache = usual_cache(model) if stores else recording_cache(model, record)
                kwargs = kwargs | {"past_key_values": cache, "use_cache": True}
            if not hasattr(cache, "record"):
                stack.callback(record_updates(cache, record))
        return args, kwargs

    def enter(path: str, *_: Any) -> None:
        present[0] = path

    part = runnable(source.model)
    signature = inspect.signature(part.forward)
    with ExitStack() as stack:
        stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
        for path in plan.inventory.layer_paths:
            layer = source.model.get_submodule(path)
            stack.callback(layer.register_forward_pre_hook(partial(enter, path)).remove)
        yield


def _mask_of(ids: Any, mask: Any) -> torch.Tensor | None:
    """The mask of the tokens that a call is given, [B, S]; None where none is padding."""
    if mask is None or not isinstance(ids, torch.Tensor):
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise ObservationError(
            "forward_loop: attention_mask is no [batch, sequence] tensor, so padding cannot be "
            "told from text. Give one, or leave it out where nothing is padded."
        )
    return mask[:, -ids.shape[1] :]


def _of_all_ranks(source: Source, statistics: Statistics) -> list[Statistics]:
    """The statistics of all ranks; only one rank's if all have read the same data."""
    every: list[Statistics] = source.gather(statistics)
    is_same = all(rank.data.digest == every[0].data.digest for rank in every)
    return every[:1] if is_same else every
