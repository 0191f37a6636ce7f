# SPDX-License-Identifier: Apache-2.0
"""Strategies to execute a plan: which shards can be quantized now, and from which source.

at_once      all of them: weights only, or the statistics of an earlier run
streamed     layer by layer, as calibration passes through the model
live         layer by layer, from a model that the caller holds in memory
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fourfold.calibration.data import CalibrationData, load_calibration
from fourfold.calibration.layerwise import Calibration
from fourfold.calibration.live import ForwardLoop, held_layers, observe_live
from fourfold.calibration.padding import pad_ids
from fourfold.calibration.readers import check_names
from fourfold.calibration.saved_activations import SavedActivations
from fourfold.calibration.scales import ActivationScales
from fourfold.calibration.statistics import Statistics
from fourfold.config import CalibrationConfig
from fourfold.distributed.machine import memory_available
from fourfold.distributed.ranks import Ranks
from fourfold.errors import ResourceError, UsageError
from fourfold.events import DataLoaded, OnEvent, ignore
from fourfold.execution.ahead import GroupsAhead
from fourfold.execution.context import ExecutionContext
from fourfold.planning import Plan
from fourfold.recipes import Recipe
from fourfold.run.remarks import check_reached
from fourfold.storage.disk import free_bytes
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source
from fourfold.storage.units import size

LEAST_ACTIVATION_MEMORY = 1 << 28

SAVED_LAYERS = 2
"""Layers whose outputs lie on the disk at a time: the last finished one's, and the next one's."""


@dataclass(frozen=True)
class Observation:
    """The settings for observing activations, if the recipe wants them quantized."""

    config: CalibrationConfig
    forward_loop: ForwardLoop | None = None
    device: str = "cpu"
    threads: int | None = None
    """PyTorch's threads while the model runs; None leaves them as they are."""
    on_event: OnEvent = ignore
    strict: bool = False
    """True if an expert that no token reached is an error."""
    data: CalibrationData | None = None
    """The calibration data, once it is read."""

    def checked(self, recipe: Recipe, source: Source) -> Observation:
        """Return these settings with the statistics loaded, if a file of them is given.

        Raises:
            UsageError: For what the recipe or the source cannot use, and for what cannot be read.
        """
        self.config.check_use(
            recipe.name,
            needs_calibration=recipe.needs_calibration,
            has_forward_loop=self.forward_loop is not None,
            is_live=source.model is not None,
        )
        check_names(self.config.files)
        saved = self.config.statistics
        if not isinstance(saved, str | Path):
            return self
        return replace(self, config=replace(self.config, statistics=Statistics.load(Path(saved))))


OnObserved = Callable[[int | None, Statistics], None]
"""Called with a layer and its statistics, once all ranks have observed it."""


Loads = dict[int | None, Sequence[str]]
"""Raw tensors by layer; None stands for the modules outside the layers."""


@dataclass(frozen=True)
class Run:
    """A strategy to execute a plan."""

    source: Source
    """The source that quantization reads from."""
    scales: ActivationScales | None
    steps: Callable[[Mapping[int | None, Statistics], OnObserved], Generator[Sequence[int] | None]]
    """Yields the numbers of the shards that can be quantized now; None for all of them. It is given
    the statistics that an earlier run has collected, and whom to tell of those of this run."""
    loads: Callable[[Mapping[int | None, Statistics]], Loads] = lambda _: {}
    """Returns the raw tensors that are held in memory while a layer's shards are quantized, and for
    None those that are read before; given the statistics of an earlier run."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """The settings that the output's bytes depend on, besides source, recipe and plan."""
    quantizes_ahead: Callable[[ExecutionContext], None] | None = None
    """Takes what executes the plan, if calibration quantizes layers itself; None if not."""
    is_writer: bool = True
    """True if this process writes. Other ranks of a sharded model only take part."""
    sample: Sequence[int] = ()
    """The token ids of the first calibration sample, if there is one."""


def at_once(source: Source, scales: ActivationScales | None = None) -> Run:
    """Quantize every shard at any time: no calibration precedes it."""

    def steps(*_: object) -> Generator[None]:
        yield None

    identity = {}
    if scales is not None:
        identity["statistics"] = hashlib.sha256(scales.statistics.to_bytes()).hexdigest()
    return Run(source, scales, steps, identity=identity)


def streamed(plan: Plan, calibration: Calibration, *, strict: bool = False) -> Run:
    """Calibrate layer by layer, and quantize each layer from memory once it is observed."""

    def steps(
        finished: Mapping[int | None, Statistics], on_observed: OnObserved
    ) -> Generator[Sequence[int]]:
        with closing(calibration.units(finished, on_observed)) as units:
            for unit in units:
                if strict:
                    check_reached(calibration.scales, [unit])
                yield plan.shards_of(unit)

    identity = {
        "data": asdict(calibration.statistics.data),
        "device": calibration.streamed.device.type,
        "threads": calibration.threads or torch.get_num_threads(),
    }

    def quantizes_ahead(context: ExecutionContext) -> None:
        assert calibration.sequential is not None
        context.ahead = GroupsAhead(context, calibration.ranks, plan.computes_in_float32)
        calibration.sequential.quantizer = context.ahead

    sample = calibration.data.first
    return Run(
        calibration.held,
        calibration.scales,
        steps,
        calibration.loads,
        identity,
        quantizes_ahead if calibration.sequential is not None else None,
        sample=sample,
    )


def live(
    plan: Plan, source: Source, scales: ActivationScales | None, sample: Sequence[int] = ()
) -> Run:
    """Quantize a live model layer by layer; each layer is gathered from its devices or ranks."""

    def steps(*_: object) -> Generator[Sequence[int]]:
        for layer in held_layers(plan, source):
            yield plan.shards_of(layer)
            if scales is not None and layer is not None:
                # What lies behind the layers is quantized last, and is observed already.
                scales.drop_large(plan.inventory.layer_paths[layer])
        if scales is not None:
            scales.drop_large()

    return Run(source, scales, steps, is_writer=source.rank == 0, sample=sample)


def choose_run(
    plan: Plan, source: Source, observation: Observation, out: OutputFolder, ranks: Ranks
) -> Run:
    """Choose the strategy to execute `plan`. A live model is observed here already.

    `out` also holds the activations that memory has no room for.
    """
    run = _choose_run(plan, source, observation, out, ranks)
    if not observation.strict:
        return run
    # A run that was begun otherwise may have written what a strict one refuses.
    return replace(run, identity={**run.identity, "strict": True})


def _choose_run(
    plan: Plan, source: Source, observation: Observation, out: OutputFolder, ranks: Ranks
) -> Run:
    scales, statistics = None, observation.config.statistics
    sample: Sequence[int] = ()
    if statistics is not None:
        scales = ActivationScales(plan, statistics)
        scales.check_fit()
    if source.model is not None and plan.needs_calibration and scales is None:
        _check_propagation(plan)
        with source.agreeing():
            loop = observation.forward_loop or load_data(plan, source, observation)
        scales = observe_live(plan, source, loop, observation.on_event)
        sample = loop.first if isinstance(loop, CalibrationData) else ()
    if scales is not None and observation.strict:
        check_reached(scales)
    if source.model is not None:
        return live(plan, source, scales, sample)
    if scales is not None or not plan.needs_calibration:
        return at_once(source, scales)
    limit = observation.config.activation_memory
    if limit is None:
        available = memory_available() // ranks.local_size
        limit = max((available - plan.calibration_memory) // 2, LEAST_ACTIVATION_MEMORY)
    data, device = load_data(plan, source, observation), observation.device
    beside = source.fetching.scratch_bytes
    has_room = _check_spill(plan, data, limit, out.folder, ranks, beside)
    streams = range(plan.recipe.calibration.streams)
    total = len(data.batches)
    calls = [total * x + n for x in streams for n in range(ranks.rank, total, ranks.size)]
    calibration = Calibration(
        plan,
        source,
        data,
        device=device,
        activation_memory=limit,
        scratch=out.folder,
        saved=SavedActivations(out.state.activations, calls, device) if has_room else None,
        threads=observation.threads,
        ranks=ranks,
        on_event=observation.on_event,
    )
    return streamed(plan, calibration, strict=observation.strict)


def _check_propagation(plan: Plan) -> None:
    """Raise `UsageError` for a recipe that runs each layer again once it is quantized."""
    if plan.is_sequential:
        raise UsageError(
            f"recipe {plan.recipe.name}: `propagate: quantized` is not possible with a model in "
            "memory, whose layers run all at a time. Save the model with `save_pretrained` and "
            "quantize the folder, or use `propagate: source`."
        )


def _check_spill(
    plan: Plan, data: CalibrationData, limit: int, scratch: Path, ranks: Ranks, beside: int
) -> bool:
    """Raise `ResourceError` where the disk has no room for OUT and the activations beyond `limit`.

    `beside` are bytes that the run needs there for something else.

    Returns True if it also has room for the outputs of two layers, for a run that resumes.

    A waiting sample holds its hidden states, and what it was embedded as: 4 bytes an element serve
    for both, in 16 bits.
    """
    mine = data.batches[ranks.rank :: ranks.size]
    elements = sum(batch.input_ids.numel() for batch in mine) * plan.inventory.hidden_size
    elements *= plan.recipe.calibration.streams
    spill = max(0, 4 * elements - limit) * ranks.local_size
    needed, free = plan.nbytes_after + spill + beside, free_bytes(scratch)
    if spill and needed > free:
        raise ResourceError(
            f"{scratch}: {size(needed)} are needed, {size(spill)} of them for waiting activations; "
            f"{size(free)} are free on that disk. Use fewer or shorter samples, or more "
            "`activation_memory`."
        )
    saved = SAVED_LAYERS * 4 * elements * ranks.local_size
    return needed + saved <= free


def load_data(plan: Plan, source: Source, observation: Observation) -> CalibrationData:
    """Read the calibration data, unless that is done."""
    if observation.data is not None:
        return observation.data
    data = load_calibration(
        source.folder,
        observation.config,
        vocab_size=plan.inventory.vocab_size,
        max_positions=plan.inventory.max_positions,
        trust_remote_code=source.trust_remote_code,
        tokenizer_hint=source.tokenizer_hint,
        pads=pad_ids(source.config),
    )
    observation.on_event(
        DataLoaded(
            data.samples, data.seq, data.tokens, data.origin, data.is_embedded, data.beginning
        )
    )
    return data
