# SPDX-License-Identifier: Apache-2.0
"""Run the calibration data through a checkpoint's model, layer by layer, and collect statistics.

    calibration = Calibration(plan, source, data)
    for layer in calibration.units():  # the layer is loaded, and its statistics are complete
        …quantize and write it; calibration.held has its source tensors in memory…

The model is never in memory as a whole: see `streaming`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fourfold.calibration.activations import ActivationStore
from fourfold.calibration.data import Batch, CalibrationData
from fourfold.calibration.kv_cache import States, recording_cache
from fourfold.calibration.observers import Observers
from fourfold.calibration.parking import Parking
from fourfold.calibration.reading import (
    ending_at_the_head,
    observing,
    read_batch,
    reads_text_twice,
)
from fourfold.calibration.saved_activations import SavedActivations
from fourfold.calibration.scales import ActivationScales, model_summary
from fourfold.calibration.sequential import SequentialLayers
from fourfold.calibration.statistics import Statistics, data_summary, reduced
from fourfold.calibration.streaming import Pass, StreamedModel
from fourfold.distributed.ranks import Ranks
from fourfold.errors import ModelError, UsageError
from fourfold.events import BatchCalibrated, LayerCalibrated, OnEvent, ignore
from fourfold.models.internals import runnable
from fourfold.planning import Plan
from fourfold.sources.cached import CachedTensors
from fourfold.storage.source import Source

ALL_PASSED = "all layers passed"
"""The report of a rank whose batches have passed every layer."""

NO_BATCHES = "no batches"
"""The report of a rank that has no batches."""

LIKELY_BYTES = 16
"""Bytes for each element of the hidden states that a paused call holds at most, usually: hidden
states and embeddings in 16 bits take 4; masks, rotary embeddings and parallel streams the rest."""


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
        """Build the model; nothing is read or run yet.

        Args:
            plan, source, data: What to observe, in which checkpoint, and what it reads.
            device: The device that the model runs on.
            activation_memory: Bytes of paused activations to keep in memory; None for no limit.
            scratch: The folder for the file with the activations beyond that.
            threads: PyTorch's threads while the model runs; None leaves them as they are.
            ranks: The ranks that share the batches. A batch stays whole, so its statistics are the
                same whichever rank runs it.
            saved: Where the outputs of finished layers are stored, for a run that resumes.
            on_event: Called with a `BatchCalibrated` for every batch of every layer, and with a
                `LayerCalibrated` for every layer.
        """
        self.threads = threads
        self.ranks = ranks or Ranks()
        self.batches = data.batches[self.ranks.rank :: self.ranks.size]
        self._calls = [*self.batches]
        if plan.is_sequential:  # copies, since what a call reads is moved away while it waits
            self._calls += [
                Batch(batch.input_ids.clone(), batch.attention_mask.clone())
                for batch in self.batches
            ]
        self.plan, self.data, self.saved, self.on_event = plan, data, saved, on_event
        dtype = torch.float32 if plan.computes_in_float32 else None
        self.streamed = StreamedModel(source, device=device, dtype=dtype, head=False)
        self.store = self._new_store(activation_memory, scratch)
        all_experts = plan.recipe.calibration.all_experts
        summary = data_summary(data, all_experts=all_experts)
        self.statistics = Statistics(summary, model=model_summary(plan))
        self.scales = ActivationScales(plan, self.statistics)
        self.sequential: SequentialLayers | None = None
        """What quantizes the layers one after the other, if the recipe propagates their outputs."""
        if plan.recipe.calibration.propagate == "quantized":
            if len(data.batches) < self.ranks.size:
                raise UsageError(
                    f"recipe {plan.recipe.name}: {len(data.batches)} batches of calibration data "
                    f"for {self.ranks.size} ranks; each needs one. Use fewer ranks, more samples, "
                    "or a smaller `batch_size`."
                )
            self.sequential = SequentialLayers(
                plan, self.streamed, self.scales, self.ranks, len(data.batches), self._saw_batch
            )

    def _new_store(self, limit: int | None, scratch: Path | None) -> ActivationStore:
        """Keep activations in memory if they surely fit there."""
        elements = sum(batch.input_ids.numel() for batch in self.batches)
        elements *= self.plan.recipe.calibration.streams
        likely = LIKELY_BYTES * elements * self.plan.inventory.hidden_size
        on_cpu = self.streamed.device.type == "cpu"
        if on_cpu and (limit is None or likely <= limit):
            return ActivationStore()
        return Parking(limit=limit, folder=scratch)

    @property
    def held(self) -> CachedTensors:
        """The source, with the current layer's tensors in memory."""
        return self.streamed.held

    def loads(self, kept: Mapping[int | None, Statistics]) -> dict[int | None, Sequence[str]]:
        """Return the raw tensors that `units` will load: of the layers in order, and of None first.

        They are empty if nothing has to be run; see `units` for `kept`.
        """
        layers = range(len(self.streamed.tree.layers))
        if not self.batches or kept.keys() >= {*layers, None}:
            return {}
        first = 0
        if self.saved is not None:
            self.saved.find(kept)
            first = self.saved.first
        return {unit: self.streamed.keys_of(unit) for unit in (None, *layers[first:])}

    def units(
        self,
        kept: Mapping[int | None, Statistics] | None = None,
        on_observed: Callable[[int | None, Statistics], None] | None = None,
    ) -> Generator[int | None]:
        """Run everything. Yield each layer when its statistics are complete, then None for the
        non-layer tensors.

        Args:
            kept: Statistics that an earlier run collected, by layer; the same on all ranks. These
                layers are not observed again, though the data may have to pass them; see `saved`.
            on_observed: Called with a layer's statistics, merged over all ranks.
        """
        self._kept, self._on_observed = kept or {}, on_observed
        if self.saved is not None:
            self.saved.find(self._kept)
        layers = range(len(self.streamed.tree.layers))
        if self._kept.keys() >= {*layers, None}:
            for unit in (*layers, None):
                yield self._complete(unit, self._kept[unit])
            return
        done: set[int] = set()
        with closing(self._layers() if self.batches else self._layers_of_others()) as passes:
            for layer, statistics in passes:
                if layer in done:
                    raise ModelError(
                        f"{self.streamed.tree.layers[layer]}: a text passes it more than once; "
                        "such models cannot be calibrated layer by layer."
                    )
                done.add(layer)
                self._merge(layer, statistics)
                is_skipped = self.saved is not None and layer < self.saved.first
                if self.sequential is not None and not is_skipped:
                    self.sequential.quantize_layer(layer, self._observers)
                yield layer
                # What lies behind the layers is quantized last, and may be observed already.
                self.scales.drop_large(self.streamed.tree.layers[layer])
                if self.sequential is not None:
                    self.sequential.done()
        for layer in sorted(set(layers) - done):
            yield self._complete(layer, self._new_statistics())
        yield self._merge(None, self._last)
        self.scales.drop_large()

    def _layers(self) -> Generator[tuple[int, Statistics]]:
        """Each layer that the data passes, loaded, with the statistics of this rank's batches."""
        model, tree = self.streamed.model, self.streamed.tree
        with ExitStack() as stack:
            if self.threads is not None:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.threads)
            observers = stack.enter_context(observing(self.plan, model, tree))
            self._observers, sequential = observers, self.sequential
            count = len(self.batches)
            stack.enter_context(ending_at_the_head(model))
            self._layer, progress = 0, _Progress(self.batches, len(tree.layers), self.on_event)

            def resume(number: int) -> None:
                self.ranks.check()
                observers.see(self._calls[number].attention_mask)
                if number < count:
                    progress.begin_batch(number)

            def enter(layer: int, why: Pass) -> None:
                self._layer = layer
                progress.begin_layer(layer if why is Pass.FIRST else None)
                observers.ignored = tree.layers[layer] if why is Pass.REPLAY else None
                observers.stream = None
                if why is Pass.FIRST:
                    observers.order.clear()
                if why is Pass.SECOND:
                    assert sequential is not None
                    observers.stream = sequential.stream(layer)

            steps = self.streamed.run(
                [partial(self._call, observers, batch) for batch in self._calls],
                store=self.store,
                on_resume=resume,
                on_layer=enter,
                keep_embeddings=reads_text_twice(runnable(model)),
                second=sequential,
                saved=self.saved,
                on_skipped=lambda: self._taken(observers),
            )
            stack.callback(steps.close)
            for number, layer in enumerate(steps):
                if number == 0 and self.saved is not None:
                    for skipped in range(self.saved.first):
                        yield skipped, self._new_statistics()
                progress.end_layer()
                self.on_event(LayerCalibrated(layer, len(tree.layers)))
                yield layer, self._taken(observers)
            self._last = self._taken(observers)
        self._meet(ALL_PASSED)

    def _layers_of_others(self) -> Generator[tuple[int, Statistics]]:
        """The layers that other ranks report, for a rank without batches."""
        yield from ((layer, self._new_statistics()) for layer in self._kept if layer is not None)
        while isinstance(layer := self._meet(NO_BATCHES), int):
            yield layer, self._new_statistics()
        self._last = self._new_statistics()

    def _taken(self, observers: Observers) -> Statistics:
        statistics = self._new_statistics()
        observers.take(statistics)
        return statistics

    def _new_statistics(self) -> Statistics:
        return Statistics(self.statistics.data, model=self.statistics.model)

    def _saw_batch(self, layer: int, call: int) -> None:
        """Say that a stage of a layer, which has been observed, has seen a batch."""
        tokens = sum(int(batch.attention_mask.sum()) for batch in self.batches)
        layers = len(self.streamed.tree.layers)
        counts = call + 1, len(self.batches), (layer + 1) * tokens, layers * tokens
        self.on_event(BatchCalibrated(layer, layers, *counts))

    def _merge(self, unit: int | None, statistics: Statistics) -> int | None:
        """Merge a layer's statistics over the ranks, and add them to those of the run."""
        if unit in self._kept:
            statistics = self._kept[unit]
        else:
            if self.batches and unit is not None:
                self._meet(unit)
            statistics.sites = reduced(self.ranks, statistics.sites)
        return self._complete(unit, statistics)

    def _meet(self, where: int | str) -> int | str:
        """Report the layer that this rank's batches have passed; return that of all ranks."""
        reports = {report for report in self.ranks.gather(where) if report != NO_BATCHES}
        if len(reports) > 1:
            raise ModelError(
                f"layers {sorted(map(str, reports))}: the samples of the ranks pass different "
                "layers. Calibrate such a model with one rank."
            )
        report: int | str = reports.pop()
        return report

    def _complete(self, unit: int | None, statistics: Statistics) -> int | None:
        self.statistics.add(statistics)
        self.scales.check(unit)
        if self._on_observed is not None and unit not in self._kept:
            self._on_observed(unit, statistics)
        if self.saved is not None and unit is not None:
            # Replayed layers store their outputs after their statistics: keep one layer more.
            self.saved.finished(unit - 1 if self.plan.repeats_layers else unit)
        return unit

    def _call(self, observers: Observers, batch: Batch, model: Any) -> None:
        cache = None
        rounds_states = self.sequential is not None and self.sequential.kv_format is not None
        if self.plan.kv_scales or rounds_states:

            def record(keys: torch.Tensor, values: torch.Tensor) -> States | None:
                path = self.streamed.tree.layers[self._layer]
                return observers.see_kv(path, keys, values)

            cache = recording_cache(runnable(model), record)
        read_batch(runnable(model), batch, self.streamed.device, cache)


class _Progress:
    """Counts batches and tokens that have passed a layer."""

    def __init__(self, batches: Sequence[Batch], layers: int, on_event: OnEvent) -> None:
        self.layers, self.on_event = layers, on_event
        self.tokens = [int(batch.attention_mask.sum()) for batch in batches]
        self.layer: int | None = None
        """The layer that is observed now, if any."""
        self.running: list[int] = []
        """The batches that have entered it; the last of them has not passed it yet."""

    def begin_layer(self, layer: int | None) -> None:
        self.layer, self.running = layer, []

    def begin_batch(self, number: int) -> None:
        self._emit(self.running)
        self.running.append(number)

    def end_layer(self) -> None:
        self._emit(self.running)
        self.layer = None

    def _emit(self, passed: Sequence[int]) -> None:
        if self.layer is None:
            return
        total = sum(self.tokens)
        done = self.layer * total + sum(self.tokens[number] for number in passed)
        counts = len(passed), len(self.tokens), done, self.layers * total
        self.on_event(BatchCalibrated(self.layer, self.layers, *counts))
