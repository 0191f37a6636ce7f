"""A Megatron checkpoint as a Hugging Face checkpoint, in its own dtypes: nothing is quantized.

    source ─▶ inventory ─▶ shards of copies ─▶ write ─▶ compare byte for byte

The job is that of `quantize` with a plan that only copies: whole or absent, and the same command
goes on with what a run that was stopped has left.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.calibration.scales import ActivationScales
from fourfold.config import OutputConfig, Runtime
from fourfold.distributed.machine import threads_available
from fourfold.distributed.ranks import Alone
from fourfold.errors import OutputError
from fourfold.events import OnEvent, ignore
from fourfold.execution import Backend, LinearResult
from fourfold.layouts import LAYOUTS, marker_files
from fourfold.models.inventory_builder import take_inventory
from fourfold.planning import DEFAULT_LIMITS, Action, Plan, Row, lay_out
from fourfold.recipes import DEFAULT_LAYOUT, Recipe
from fourfold.run.job import Job
from fourfold.run.preflight import check_origins, check_placed, check_room
from fourfold.run.strategies import AtOnce
from fourfold.sources.safetensors import SafetensorsFolder
from fourfold.storage.atomic import FileWriter
from fourfold.storage.names import CONFIG, INDEX
from fourfold.storage.output import OutputFolder
from fourfold.storage.shard_file import index_of
from fourfold.storage.source import Source
from fourfold.storage.units import size


@dataclass(frozen=True)
class Converted:
    """What was written. Prints as the command's closing line."""

    out: Path
    tensors: int
    shards: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "out": str(self.out),
            "tensors": self.tensors,
            "shards": self.shards,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        notes = "".join(f"note: {note}\n" for note in self.notes)
        return (
            f"{notes}{self.tensors:,} tensors in {self.shards} shards in {self.out} · "
            f"{size(self.nbytes)} · {self.seconds:,.1f} s · compared byte for byte"
        )


def convert(
    source: Source, out: Path, output: OutputConfig, runtime: Runtime, on_event: OnEvent = ignore
) -> Converted:
    """Write `source` into `out` as a Hugging Face checkpoint, and compare the two."""
    began = time.perf_counter()
    workers, folder = (
        runtime.threads or threads_available(),
        OutputFolder(out, markers=marker_files()),
    )
    check_origins(folder, source, overwrite=output.overwrite)
    plan = plan_conversion(source, output.shards or 1)
    backend = Backend.none(workers)
    check_room(plan, folder, backend, Alone())
    job = Job(plan, source, folder, AtOnce(source, None), Alone(), backend, rest=_write_rest)
    job.write(output.overwrite, on_event)
    _compare(out, source, workers)
    taken = time.perf_counter() - began
    return Converted(out, len(plan.rows), len(plan.shards), plan.nbytes, taken, plan.notes)


class ConversionPlan(Plan):
    """A plan that copies everything."""

    @cached_property
    def files(self) -> list[str]:
        """Every file of the output, relative to its folder."""
        return [*self.shard_names, *(path.as_posix() for path in self.side_files), INDEX, CONFIG]


def plan_conversion(source: Source, parts: int) -> ConversionPlan:
    """Which tensors lie in which shard; reads no weight."""
    inventory = take_inventory(source)
    check_placed(source, inventory)
    kept = list(inventory.tensors.values())
    copied, dropped = source.side_files()
    return ConversionPlan(
        source=source.place,
        recipe=Recipe.model_construct(name="convert", description="nothing is quantized"),
        inventory=inventory,
        rows=tuple(
            Row(
                raw.info.key, Action.COPY, raw.role, "converted",
                raw.info.numel, raw.info.nbytes, raw.info.nbytes, 0,
            )
            for raw in kept
        ),
        shards=tuple(
            lay_out([], [], kept, [], inventory, layout=LAYOUTS[DEFAULT_LAYOUT], parts=parts)
        ),
        ignore=(),
        side_files=tuple(copied),
        dropped_files=tuple(dropped),
        notes=source.notes,
        tensor_parallel={},
        parts=parts,
    )  # fmt: skip


def _write_rest(
    work: Plan,
    source: Source,
    folder: FileWriter,
    linears: list[LinearResult],
    scales: ActivationScales | None,
) -> None:
    """The files beside the weights; what makes it a checkpoint comes last."""
    for path in work.side_files:
        folder.copy(source.folder, path)
    source.check_unchanged()
    shards = [
        (name, shard.tensors) for name, shard in zip(work.shard_names, work.shards, strict=True)
    ]
    folder.write_json(INDEX, index_of(shards, work.nbytes_after))
    folder.write_json(CONFIG, source.config)


def _compare(out: Path, source: Source, threads: int) -> None:
    """Raise where OUT has other tensors than the source, or other bytes."""
    written = SafetensorsFolder(out)
    try:
        for name in sorted(written.tensors.keys() ^ source.tensors.keys()):
            raise OutputError(f"{out}: {name}: only in one of source and output. {_REPORT}")
        with ThreadPoolExecutor(threads) as pool:
            same = pool.map(lambda name: _is_same(name, written, source), source.tensors)
            for name, is_same in zip(source.tensors, same, strict=True):
                if not is_same:
                    raise OutputError(
                        f"{out}: {name}: not what the source has. Is the disk sound? {_REPORT}"
                    )
    finally:
        written.close()


_REPORT = "Convert again; if it stays so, it is a defect of fourfold: please report it."


def _is_same(name: str, written: Source, source: Source) -> bool:
    ours, theirs = written.tensors[name], source.tensors[name]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    for begin in range(0, ours.nbytes, DEFAULT_LIMITS.copy_bytes):
        count = min(DEFAULT_LIMITS.copy_bytes, ours.nbytes - begin)
        one, other = (np.empty(count, dtype=np.uint8) for _ in range(2))
        written.read_bytes(name, begin, one)
        source.read_bytes(name, begin, other)
        if not np.array_equal(one, other):
            return False
    return True
