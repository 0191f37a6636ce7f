# SPDX-License-Identifier: Apache-2.0
"""Everything before a run writes: the plan, the backend, and checks of names, disk and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fourfold.config import OutputConfig, Runtime
from fourfold.distributed.launcher import launch
from fourfold.distributed.machine import memory_available, threads_available
from fourfold.distributed.ranks import Ranks
from fourfold.errors import ResourceError, UsageError
from fourfold.events import BackendChosen, PlanMade
from fourfold.execution import Backend, choose_backend
from fourfold.models.inventory import Inventory
from fourfold.models.roles import Role
from fourfold.planning import CopyPlan, Plan, make_plan
from fourfold.recipes import Recipe
from fourfold.run.resume import calibration_threads, shards_per_layer
from fourfold.run.session import Session
from fourfold.run.strategies import Observation
from fourfold.run.warm_up import warming_up
from fourfold.sources.opening import opened
from fourfold.storage.disk import check_disk
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source
from fourfold.storage.units import size
from fourfold.verification.reference import check_reference


def prepare(
    source: Source,
    recipe: Recipe,
    folder: OutputFolder,
    ranks: Ranks,
    observation: Observation,
    runtime: Runtime,
    output: OutputConfig,
    session: Session,
) -> tuple[Plan, Backend, Observation]:
    """Plan the job, choose who quantizes, and check that the run can succeed.

    The observation that is returned has the threads that all ranks use for the forward pass.
    Kernels are compiled meanwhile. Emits `PlanMade` and `BackendChosen`.
    """
    check_origins(folder, source)
    parts = shards_per_layer(folder, ranks, output.shards, source)
    threads = calibration_threads(folder, ranks, runtime.threads)
    with warming_up(recipe, source, observation.device) as warm_up:
        plan = make_plan(source, recipe, parts=parts)
        check_placed(source, plan.inventory)
        if output.reference is not None and ranks.rank == 0:
            shapes = {linear.name: linear.shape for linear in plan.linears}
            trusted = source.trust_remote_code
            with opened(output.reference, trust_remote_code=trusted) as reference:
                check_reference(reference, shapes)
        plan = replace(
            plan, notes=(*plan.notes, *_settle(source, plan, folder, ranks, runtime, output))
        )
        backend = choose_backend(
            observation.device,
            plan,
            runtime.threads or max(1, threads_available() // ranks.local_size),
            memory=runtime.device_memory,
            ranks=ranks.local_size,
            warn=session.warn,
        )
        runs_model = observation.config.statistics is None and source.model is None
        check_room(plan, folder, backend, ranks, runs_model=runs_model)
        if source.model is not None and observation.config.statistics is None:
            # Each rank of a sharded model measures what its own loop shows it.
            is_on_all = source.is_sharded and observation.forward_loop is not None
            check_moments(plan, backend, ranks=launch().local_size if is_on_all else 1)
    session(PlanMade(plan))
    error = warm_up.exception()
    if isinstance(error, Exception) and backend.pool is not None:
        backend = backend.on_cpu(error)
    session(BackendChosen(str(backend.choice), backend.where, backend.choice.is_fallback))
    if backend.choice.is_fallback and launch().local_rank == 0:
        session.warn(str(backend.choice))
    return plan, backend, replace(observation, threads=threads)


def _settle(
    source: Source,
    plan: Plan,
    folder: OutputFolder,
    ranks: Ranks,
    runtime: Runtime,
    output: OutputConfig,
) -> Sequence[str]:
    """Decide where weights are fetched to that are not on this machine; return remarks on it."""
    needed = plan.nbytes_after + plan.side_files.nbytes - folder.nbytes_present()
    notes = source.fetching.settle(
        folder.folder, needed, runtime.keep_source, ranks=ranks.local_size
    )
    if output.preview and source.fetching.is_transient:
        raise UsageError(
            "`preview`: runs the source, whose shards are deleted once they are quantized. Leave "
            "it out, or give `keep_source=True`."
        )
    return notes


def check_origins(folder: OutputFolder, source: Source) -> None:
    """Raise `OutputError` if `folder` holds something else, or overlaps what the source reads."""
    for origin in source.origin_folders:
        folder.check(origin)


def check_placed(source: Source, inventory: Inventory) -> None:
    """Raise `ModelError` if the source made up names that transformers does not build."""
    unplaced = [key for key in inventory.unknown if inventory.tensors[key].role is not Role.MTP]
    source.check_placed(unplaced, inventory.architecture)


def check_moments(
    plan: Plan, backend: Backend, *, ranks: int = 1, available: int | None = None
) -> None:
    """Raise `ResourceError` if the statistics of all layers of a live model do not fit beside it.

    Args:
        plan: The plan of a model in memory.
        backend: What quantizes the weights, which takes memory at the same time.
        ranks: The number of processes of this machine that measure all layers.
        available: Bytes of free memory; by default those of this machine.
    """
    beside = backend.memory(plan)
    needed = ranks * plan.calibration_memory
    available = memory_available() if available is None else available
    if beside + needed <= available:
        return
    among = f" on {ranks} ranks" if ranks > 1 else ""
    remedy = "Save the model with `save_pretrained` and quantize the folder, layer by layer"
    pooled = ranks * plan.statistics_memory(pooled=True)
    if pooled < needed and beside + pooled <= available:
        remedy += f", or set `pooled: true` in the recipe's weights, which takes {size(pooled)}"
    raise ResourceError(
        f"recipe {plan.recipe.name}: {size(needed)} of memory are needed{among} for statistics of "
        f"the inputs of all layers, {size(beside)} to quantize; {size(available)} are available. "
        f"{remedy}."
    )


def check_output_fits(work: CopyPlan, folder: OutputFolder) -> None:
    """Raise `ResourceError` if the disk is too small for what a plan writes."""
    check_disk(folder.folder, work.nbytes_after + work.side_files.nbytes - folder.nbytes_present())


def check_room(
    work: CopyPlan,
    folder: OutputFolder,
    backend: Backend,
    ranks: Ranks,
    *,
    runs_model: bool = False,
) -> None:
    """Raise `ResourceError` if the disk or the memory is too small for the plan.

    Args:
        runs_model: True if calibration runs the model layer by layer, should the plan need it.
    """
    check_output_fits(work, folder)
    memory = backend.memory(work) + (work.calibration_memory if runs_model else 0)
    memory, available = memory * ranks.local_size, memory_available()
    if memory > available:
        among = f" on each of {ranks.local_size} ranks" if ranks.local_size > 1 else ""
        raise ResourceError(
            f"{size(memory)} of memory are needed for {backend.threads} threads{among}, "
            f"{size(available)} are available. Use fewer `threads`, or close other programs."
        )
