# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a Hugging Face checkpoint: nothing is quantized.

    source ─▶ inventory ─▶ shards of copies ─▶ write ─▶ compare byte for byte

Megatron's checkpoints keep their dtypes, quantized ones are decoded, and NVFP4 ones keep their
codes and scales if a layout is named.

The job is that of `quantize` with a plan that only copies: the output is whole or absent, and the
same command resumes a run that was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.config import OutputConfig, Runtime
from fourfold.distributed.machine import threads_available
from fourfold.distributed.ranks import Ranks
from fourfold.documents import Shown, document
from fourfold.errors import OutputError
from fourfold.events import BytesVerified, OnEvent, ignore
from fourfold.execution import Backend
from fourfold.layouts import LAYOUTS, marker_files
from fourfold.models.inventory import Inventory, RawTensor
from fourfold.models.inventory_builder import take_inventory
from fourfold.planning import DEFAULT_LIMITS, Action, CopyPlan, Row, lay_out
from fourfold.recipes import DEFAULT_LAYOUT
from fourfold.run.job import Job
from fourfold.run.preflight import check_origins, check_placed, check_room
from fourfold.run.relayout import plan_relayout
from fourfold.run.strategies import at_once
from fourfold.sources.safetensors import SafetensorsFolder
from fourfold.storage.atomic import FileWriter
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source
from fourfold.storage.units import size


@dataclass(frozen=True, repr=False)
class Converted(Shown):
    """The result of a conversion. Prints as the command's closing line."""

    out: Path
    tensors: int
    shards: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return document(
            "conversion",
            out=str(self.out),
            tensors=self.tensors,
            shards=self.shards,
            bytes=self.nbytes,
            seconds=round(self.seconds, 3),
            notes=list(self.notes),
        )

    def __str__(self) -> str:
        notes = "".join(f"note: {note}\n" for note in self.notes)
        return (
            f"{notes}{self.tensors:,} tensors in {self.shards} shards in {self.out} · "
            f"{size(self.nbytes)} · {self.seconds:,.1f} s · compared byte for byte"
        )


def convert(
    source: Source,
    out: Path,
    output: OutputConfig,
    runtime: Runtime,
    on_event: OnEvent = ignore,
    *,
    layout: str | None = None,
) -> Converted:
    """Write `source` into `out` as a Hugging Face checkpoint, and compare the two.

    With a `layout`, an NVFP4 checkpoint is written as that names and encodes its tensors.
    """
    began = time.perf_counter()
    workers = runtime.threads or threads_available()
    folder = OutputFolder(out, markers=marker_files(), overwrite=output.overwrite)
    check_origins(folder, source)
    parts, config = output.shards or 1, dict(source.config)
    files: Mapping[str, Mapping[str, Any]] = {}
    if layout is None:
        inventory = take_inventory(source)
        check_placed(source, inventory)
    else:
        relayout = plan_relayout(source, layout)
        source, inventory, files = relayout.source, relayout.inventory, relayout.config_files
        config["quantization_config"] = dict(relayout.quantization_config)
    plan = plan_conversion(source, inventory, parts, tuple(files))

    def write_own_files(writer: FileWriter, *_: object) -> Mapping[str, Any]:
        for name, contents in files.items():
            writer.write_json(name, contents)
        return config

    backend = Backend.none(workers)
    check_room(plan, folder, backend, Ranks())
    run = at_once(source)
    job = Job(plan, source, folder, run, Ranks(), backend, write_own_files)
    job.write(on_event)
    _compare(out, source, workers, on_event)
    taken = time.perf_counter() - began
    return Converted(out, len(plan.rows), len(plan.shards), plan.nbytes, taken, plan.notes)


def plan_conversion(
    source: Source, inventory: Inventory, parts: int, own_files: tuple[str, ...] = ()
) -> CopyPlan:
    """Decide which tensors lie in which shard, at least `parts` for a layer. No weight is read."""
    tensors = list(inventory.tensors.values())
    layout = LAYOUTS[DEFAULT_LAYOUT]
    return CopyPlan(
        source=source.place,
        inventory=inventory,
        rows=tuple(_row(raw) for raw in tensors),
        shards=tuple(lay_out(tensors, inventory, layout=layout, parts=parts)),
        side_files=source.side_files(),
        notes=source.notes,
        parts=parts,
        own_files=own_files,
    )


def _row(raw: RawTensor) -> Row:
    size = raw.info.nbytes
    return Row(raw.info.key, Action.COPY, raw.role, "converted", raw.info.numel, size, size, 0)


def _compare(out: Path, source: Source, threads: int, on_event: OnEvent) -> None:
    """Raise where OUT has other tensors than the source, or other bytes."""
    written = SafetensorsFolder(out)
    try:
        for name in sorted(written.tensors.keys() ^ source.tensors.keys()):
            raise OutputError(f"{out}: {name}: only in one of source and output. {_REPORT}")
        done, total = 0, sum(info.nbytes for info in source.tensors.values())
        on_event(BytesVerified(done, total))
        with ThreadPoolExecutor(threads) as pool:
            same = pool.map(lambda name: _is_same(name, written, source), source.tensors)
            for name, is_same in zip(source.tensors, same, strict=True):
                if not is_same:
                    raise OutputError(
                        f"{out}: {name}: not what the source has. Is the disk sound? {_REPORT}"
                    )
                done += source.tensors[name].nbytes
                on_event(BytesVerified(done, total))
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
