"""Run the calibration data through a checkpoint's model, layer by layer, and take statistics.

    with calibrating(plan, source, data) as run:
        for layer in run.units():      # this layer is loaded, and its statistics are complete
            …quantize and write it; run.held has its raw tensors in memory…

The model itself is never in memory: see `models.streaming`. Logits are not needed and can be
larger than everything else, so a call ends at the door of the output embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourfold.calibration.data import Batch, CalibrationData
from fourfold.calibration.kv_cache import recording_cache
from fourfold.calibration.observers import Observers
from fourfold.calibration.parking import Parking
from fourfold.calibration.saved_activations import SavedActivations
from fourfold.calibration.scales import ActivationScales, model_summary
from fourfold.calibration.statistics import Statistics, data_summary, reduced
from fourfold.calibration.streaming import StreamedModel
from fourfold.distributed.ranks import Alone, Ranks
from fourfold.errors import ModelError, PlanError
from fourfold.events import LayerCalibrated, OnEvent, ignore
from fourfold.models.expert_hooks import unwatchable
from fourfold.models.internals import output_embeddings, runnable
from fourfold.models.module_tree import ModuleTree
from fourfold.planning import Plan
from fourfold.sources.cached import CachedTensors
from fourfold.storage.source import Source

END = -1
"""Where ranks are whose batches have passed every layer."""

IDLE = -2
"""Where a rank is that has no batch: wherever the others are."""


@contextmanager
def observing(plan: Plan, model: Any, tree: ModuleTree) -> Iterator[Observers]:
    """Observers at every input site of `plan`, attached to a model."""
    modules = {linear.module for linear in plan.observed}
    experts = {path: tree.experts[path] for path in sorted(modules & tree.experts.keys())}
    linears = sorted(modules - experts.keys())
    all_experts = plan.recipe.calibration.all_experts
    if all_experts and (without := unwatchable(model, experts)):
        raise PlanError(
            f"{without[0]}: calibration.all_experts is not possible for a "
            f"{type(model.get_submodule(without[0])).__name__}. Leave it out of the recipe."
        )
    observers = Observers(
        model, experts, linears, all_experts=all_experts, statistics=plan.statistics
    )
    with observers.attached():
        yield observers


class Calibration:
    """One pass of calibration data through a streamed model."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        data: CalibrationData,
        *,
        device: str = "cpu",
        activation_memory: int | None = None,
        scratch: Path | None = None,
        threads: int | None = None,
        ranks: Ranks | None = None,
        saved: SavedActivations | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        """activation_memory: bytes of waiting activations in memory; the rest goes to `scratch`.

        threads: PyTorch's, while the model runs.
        ranks: with whom the batches are shared. A batch stays whole, so what is found of it is the
        same whoever runs it.
        saved: where the outputs of finished layers are stored, so that a run that resumes does not
        compute them again.
        """
        self.threads = threads
        self.ranks: Ranks = ranks or Alone()
        self.batches = data.batches[self.ranks.rank :: self.ranks.size]
        self.plan, self.data, self.saved, self.on_event = plan, data, saved, on_event
        self.streamed = StreamedModel(source, device=device, head=False)
        self.parking = Parking(limit=activation_memory, folder=scratch)
        all_experts = plan.recipe.calibration.all_experts
        summary = data_summary(data, all_experts=all_experts)
        self.statistics = Statistics(summary, model=model_summary(plan))
        self.scales = ActivationScales(plan, self.statistics)

    @property
    def held(self) -> CachedTensors:
        """The source, with the present layer's tensors in memory."""
        return self.streamed.held

    def units(
        self,
        kept: Mapping[int | None, Statistics] | None = None,
        on_observed: Callable[[int | None, Statistics], None] | None = None,
    ) -> Generator[int | None]:
        """Run everything; yields each layer when its statistics are complete, then the shell.

        kept: statistics of units that an earlier run has observed, the same on all ranks. They
        are not observed again, though a text must pass them to reach the others.
        on_observed: called with what all ranks together found of a unit.
        """
        self._kept, self._on_observed = kept or {}, on_observed
        if self.saved is not None:
            self.saved.find(self._kept)
        count = len(self.streamed.tree.layers)
        units: list[int | None] = [*range(count), None]
        if all(unit in self._kept for unit in units):
            for unit in units:
                yield self._complete(unit, self._kept[unit])
            return
        done: set[int] = set()
        passes = self._layers() if self.batches else self._layers_of_others()
        with closing(passes):
            for layer, found in passes:
                if layer in done:
                    raise ModelError(
                        f"{self.streamed.tree.layers[layer]}: a text passes it more than once; "
                        "such models cannot be calibrated layer by layer."
                    )
                done.add(layer)
                yield self._together(layer, found)
        for layer in sorted(set(range(count)) - done):
            yield self._complete(layer, self._new_statistics())
        yield self._together(None, self._last)

    def _layers(self) -> Generator[tuple[int, Statistics]]:
        """Each layer that the text passes, loaded, with what this rank's batches did there."""
        model, tree = self.streamed.model, self.streamed.tree
        with ExitStack() as stack:
            if self.threads is not None:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.threads)
            observers = stack.enter_context(observing(self.plan, model, tree))
            stack.enter_context(ending_at_the_head(model))
            self._present = 0
            calls = [partial(self._call, observers, batch) for batch in self.batches]

            def resume(number: int) -> None:
                self.ranks.check()
                observers.see(self.batches[number].attention_mask)

            steps = self.streamed.run(
                calls,
                parking=self.parking,
                on_resume=resume,
                on_layer=self._enter,
                keep_shell=_has_decoder_inputs(runnable(model)),
                saved=self.saved,
                on_skipped=lambda: self._taken(observers),
            )
            stack.callback(steps.close)
            for number, layer in enumerate(steps):
                if number == 0 and self.saved is not None:
                    for skipped in range(self.saved.first):
                        yield skipped, self._new_statistics()
                self.on_event(LayerCalibrated(layer, len(tree.layers)))
                yield layer, self._taken(observers)
            self._last = self._taken(observers)
        self._meet(END)

    def _layers_of_others(self) -> Generator[tuple[int, Statistics]]:
        """The layers that other ranks say they pass, for a rank that no batch is left for."""
        yield from ((layer, self._new_statistics()) for layer in self._kept if layer is not None)
        while (layer := self._meet(IDLE)) != END:
            yield layer, self._new_statistics()
        self._last = self._new_statistics()

    def _taken(self, observers: Observers) -> Statistics:
        found = self._new_statistics()
        observers.take(found)
        return found

    def _new_statistics(self) -> Statistics:
        return Statistics(self.statistics.data, model=self.statistics.model)

    def _together(self, unit: int | None, found: Statistics) -> int | None:
        """What this rank found of a unit, and what the others did, is now in the statistics."""
        if unit in self._kept:
            return self._complete(unit, self._kept[unit])
        if self.batches and unit is not None:
            self._meet(unit)
        found.sites = reduced(self.ranks, found.sites)
        return self._complete(unit, found)

    def _meet(self, unit: int) -> int:
        """Where the ranks are that have batches; they all are at the same layer."""
        places = {place for place in self.ranks.gather(unit) if place != IDLE}
        if len(places) > 1:
            raise ModelError(
                f"layers {sorted(places)}: the ranks' samples pass other layers. "
                "Such models can only be calibrated by one rank."
            )
        return int(places.pop())

    def _complete(self, unit: int | None, found: Statistics) -> int | None:
        self.statistics.add(found)
        self.scales.check(unit)
        if self._on_observed is not None and unit not in self._kept:
            self._on_observed(unit, found)
        if self.saved is not None:
            self.saved.finished(unit)
        return unit

    def _enter(self, layer: int) -> None:
        self._present = layer

    def _call(self, observers: Observers, batch: Batch, model: Any) -> None:
        model = runnable(model)
        inputs = call_inputs(model, batch, self.streamed.device)
        if self.plan.kv_scales:
            paths = self.streamed.tree.layers

            def record(keys: torch.Tensor, values: torch.Tensor) -> None:
                observers.see_kv(paths[self._present], keys, values)

            inputs |= {"past_key_values": recording_cache(model, record), "use_cache": True}
        with suppress(AtTheHeadError):
            model(**inputs)


def call_inputs(model: Any, batch: Batch, device: torch.device) -> dict[str, Any]:
    """What a model (`runnable`) is called with, to read a batch."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "use_cache": False,
    }
    if _has_decoder_inputs(model):
        canvas = getattr(model.config, "canvas_length", None)
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :canvas]
    return inputs


def _has_decoder_inputs(model: Any) -> bool:
    """Whether a decoder reads the text beside an encoder, so that it is embedded twice."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


class AtTheHeadError(Exception):
    """Everything that is observed was computed: the call may end."""


@contextmanager
def ending_at_the_head(model: Any) -> Iterator[None]:
    """Within, calls of the model raise `AtTheHeadError` where logits would be computed."""

    def end(_: nn.Module, __: Any) -> None:
        raise AtTheHeadError

    head = output_embeddings(runnable(model))
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(end)
    try:
        yield
    finally:
        hook.remove()
