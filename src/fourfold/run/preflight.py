"""Checks before a run: the model can be opened, its names have a place, disk and memory suffice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourfold.distributed.machine import memory_available
from fourfold.distributed.ranks import Ranks
from fourfold.errors import ModelError, PlanError, UsageError
from fourfold.execution import Kernels
from fourfold.models.inventory import Inventory
from fourfold.models.roles import Role
from fourfold.planning import Plan
from fourfold.sources.live.source import LiveSource
from fourfold.sources.megatron import OWN, LiveMegatron, MegatronTensors, is_megatron
from fourfold.sources.opening import open_model
from fourfold.storage.output import OutputFolder, check_disk
from fourfold.storage.source import Source
from fourfold.storage.units import size

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@contextmanager
def opened(
    model: str | Path | Source | torch.nn.Module | Sequence[torch.nn.Module],
    hf_config: str | Path | PretrainedConfig | None = None,
    tokenizer: Any = None,
    trust: bool = False,
) -> Iterator[Source]:
    """The source that `model` names; closed afterwards, unless it was given open."""
    if isinstance(model, str | Path):
        if not isinstance(hf_config, str | Path | None):
            raise UsageError("hf_config: of a checkpoint's folder, give a folder, too.")
        source: Source = open_model(model, hf_config)
    elif is_megatron(model):
        if hf_config is None:
            raise UsageError(
                "model: a Megatron model. Give the folder with its Hugging Face configuration and "
                "tokenizer, too, or the configuration: hf_config=…"
            )
        source = LiveMegatron(model, hf_config, tokenizer=tokenizer)
    elif hf_config is not None:
        raise UsageError("hf_config: only for Megatron's. Leave it out.")
    elif isinstance(model, torch.nn.Module | Sequence):
        source = LiveSource(model, tokenizer=tokenizer, trust_remote_code=trust)
    else:
        source = model
    try:
        yield source
    finally:
        if source is not model:
            source.close()


def check_placed(source: Source, inventory: Inventory) -> None:
    """What rules have made of a Megatron checkpoint has a place in the model, or is an MTP layer's.

    Raises `ModelError` for a name that transformers does not build.
    """
    if not isinstance(source, MegatronTensors):
        return
    left = [key for key in inventory.unknown if inventory.tensors[key].role is not Role.MTP]
    if left:
        raise ModelError(
            f"{left[0]}: made of {source.made_of(left[0])}, but {inventory.architecture} has no "
            f"place for it ({len(left)} such). {OWN}"
        )


def check_room(
    work: Plan, folder: OutputFolder, kernels: Kernels, ranks: Ranks, *, runs_model: bool = False
) -> None:
    """Raise `PlanError` where the disk or the memory is too small for the plan.

    runs_model: whether the model is run, layer by layer, if there is anything to calibrate.
    """
    beside = sum((work.source / path).stat().st_size for path in work.side_files)
    check_disk(folder.folder, work.nbytes_after + beside - folder.nbytes_present())
    memory = kernels.memory(work) + (work.calibration_memory if runs_model else 0)
    memory, available = memory * ranks.local_size, memory_available()
    if memory > available:
        among = f" on each of {ranks.local_size} ranks" if ranks.local_size > 1 else ""
        raise PlanError(
            f"{size(memory)} of memory are needed for {kernels.threads} threads{among}, "
            f"{size(available)} are available. Use fewer --threads, or close other programs."
        )
