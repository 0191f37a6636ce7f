# SPDX-License-Identifier: Apache-2.0
"""Fold the source before it is quantized: choose the factors, or take those of an earlier run.

Rank 0 chooses for all ranks. A run that resumes takes the factors from the state in OUT, if they
were chosen from what is given now; whatever they are, the run's identity has their digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch

from fourfold.calibration.data import CalibrationData
from fourfold.calibration.folding import Folding
from fourfold.calibration.statistics import data_summary
from fourfold.distributed.ranks import Ranks
from fourfold.errors import UsageError
from fourfold.events import OnEvent, WarningIssued
from fourfold.planning import Plan
from fourfold.reporting.summary import versions
from fourfold.reporting.text import plural, runs
from fourfold.run.strategies import Observation, load_data
from fourfold.sources.folded import Factors, FoldedSource
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source


def fold(
    plan: Plan, source: Source, observation: Observation, folder: OutputFolder, ranks: Ranks
) -> tuple[Source, Observation]:
    """Return the source as it is quantized, and the observation with the data that was read.

    Both are as they were if the plan has no folds. Emits `DataLoaded` and `LayerFolded`.

    Raises:
        UsageError: The recipe's folds are not possible with this source, or these options.
    """
    if not plan.folds:
        return source, observation
    _check(plan, source, observation)
    observation = replace(observation, data=load_data(plan, source, observation))
    assert observation.data is not None
    factors = None
    if ranks.rank == 0:
        origin = _origin(plan, source, observation, observation.data)
        factors = _stored(folder, origin)
        if factors is None:
            factors = _chosen(plan, source, observation, observation.data)
            texts = asdict(data_summary(observation.data, all_experts=False))
            factors = replace(factors, origin=origin, texts=texts)
        _warn_of_inexact(factors, observation.on_event)
    text = "" if factors is None else base64.b64encode(factors.to_bytes()).decode()
    factors = Factors.from_bytes(base64.b64decode(ranks.gather(text)[0]))
    return FoldedSource(source, plan.folds, factors), observation


def _warn_of_inexact(factors: Factors, on_event: OnEvent) -> None:
    layers = sorted({choice["layer"] for choice in factors.choices if not choice["exact"]})
    if layers:
        on_event(
            WarningIssued(
                f"{plural(len(layers), 'layer')} ({runs(layers)}): with factors folded in, the "
                "output is another than the source's. They are left as they were."
            )
        )


def _check(plan: Plan, source: Source, observation: Observation) -> None:
    if source.model is not None or source.stamps() is None:
        raise UsageError(
            f"recipe {plan.recipe.name}: folds, which is not possible with a model in memory. Save "
            "the model with `save_pretrained`, and quantize the folder."
        )
    if observation.config.statistics is not None:
        raise UsageError(
            f"recipe {plan.recipe.name}: chooses folds on texts, of which the statistics of an "
            "earlier run say too little. Give the texts: `calib`."
        )
    if source.fetching.is_transient:
        raise UsageError(
            f"recipe {plan.recipe.name}: reads the source twice, whose shards are deleted once "
            "they are quantized. Give `keep_source=True`."
        )


def _origin(plan: Plan, source: Source, observation: Observation, data: CalibrationData) -> str:
    """A digest of all that the choice of factors depends on."""
    stamps = source.stamps() or {}
    settings = [
        versions(),
        plan.settings,
        plan.digest,
        {name: [stamp.size, stamp.mtime_ns, stamp.digest] for name, stamp in stamps.items()},
        data.digest,
        torch.device(observation.device).type,
        observation.threads or torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _stored(folder: OutputFolder, origin: str) -> Factors | None:
    """The factors of the unfinished run in OUT; None if it has none, or was given other things."""
    identity = folder.state.identity or {}
    if folder.overwrite or not folder.state.has_finished_shards:
        return None
    try:
        factors = Factors.from_bytes(folder.state.folds.read_bytes())
    except Exception:  # missing or damaged: they are chosen again
        return None
    is_same = identity.get("folds") == factors.digest and factors.origin == origin
    return factors if is_same else None


def _chosen(plan: Plan, source: Source, observation: Observation, data: CalibrationData) -> Factors:
    with ExitStack() as stack:
        if observation.threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(observation.threads)
        folding = Folding(
            plan, source, data.batches, device=observation.device, on_event=observation.on_event
        )
        return folding.choose()
