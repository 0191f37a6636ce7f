"""Checks before a run: names have a place in the model, disk and memory suffice."""

from __future__ import annotations

from fourfold.distributed.machine import memory_available
from fourfold.distributed.ranks import Ranks
from fourfold.errors import ResourceError
from fourfold.execution import Kernels
from fourfold.models.inventory import Inventory
from fourfold.models.roles import Role
from fourfold.planning import Plan
from fourfold.storage.disk import check_disk
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source
from fourfold.storage.units import size


def check_placed(source: Source, inventory: Inventory) -> None:
    """Raise `ModelError` if the source made up names that transformers does not build."""
    unplaced = [key for key in inventory.unknown if inventory.tensors[key].role is not Role.MTP]
    source.check_placed(unplaced, inventory.architecture)


def check_room(
    work: Plan, folder: OutputFolder, kernels: Kernels, ranks: Ranks, *, runs_model: bool = False
) -> None:
    """Raise `ResourceError` where the disk or the memory is too small for the plan.

    runs_model: whether the model is run, layer by layer, if there is anything to calibrate.
    """
    beside = sum((work.source / path).stat().st_size for path in work.side_files)
    check_disk(folder.folder, work.nbytes_after + beside - folder.nbytes_present())
    memory = kernels.memory(work) + (work.calibration_memory if runs_model else 0)
    memory, available = memory * ranks.local_size, memory_available()
    if memory > available:
        among = f" on each of {ranks.local_size} ranks" if ranks.local_size > 1 else ""
        raise ResourceError(
            f"{size(memory)} of memory are needed for {kernels.threads} threads{among}, "
            f"{size(available)} are available. Use fewer --threads, or close other programs."
        )
