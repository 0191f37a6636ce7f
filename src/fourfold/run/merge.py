"""Join what nodes wrote into folders of their own, or cut a checkpoint into other shards.

    fourfold merge NODE0 NODE1 … OUT
    fourfold merge --shards 1 CHECKPOINT OUT

Tensors are copied in the order that one rank would have written them in, shard by shard, in pieces
of a few MB: the result is that of one rank, byte for byte, whatever wrote the parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

from fourfold.config import OutputConfig, Runtime
from fourfold.errors import SourceError, UsageError
from fourfold.events import (
    BytesCopied,
    OnEvent,
    OutputComplete,
    WarningIssued,
    WritingBegan,
    ignore,
)
from fourfold.layouts import marker_files
from fourfold.planning import Spec, cut, shard_names
from fourfold.reporting.page import draw_report
from fourfold.run.resume import without_times
from fourfold.storage.disk import check_disk
from fourfold.storage.fingerprints import read_error
from fourfold.storage.json_files import read_json
from fourfold.storage.names import CONFIG, INDEX, REPORT, SUMMARY
from fourfold.storage.open_files import OpenFiles
from fourfold.storage.output import OutputFolder
from fourfold.storage.quant_summary import QuantSummary, ShardEntry, read_summary
from fourfold.storage.run_state import REST, RUN, STATE, RunState, differences, is_inside
from fourfold.storage.safetensors_header import TensorInfo, read_header
from fourfold.storage.shard_file import ShardFile, digest_of_file, index_of
from fourfold.storage.units import size
from fourfold.verification import Report, verify

PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Merged:
    """What was joined. Prints as the command's closing line."""

    out: Path
    parts: int
    shards_before: int
    shards: int
    nbytes: int
    report: Report | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "out": str(self.out),
            "folders": self.parts,
            "shards_before": self.shards_before,
            "shards": self.shards,
            "bytes": self.nbytes,
            "verification": None if self.report is None else self.report.to_dict(),
        }

    def __str__(self) -> str:
        verdict = "not verified"
        if self.report is not None:
            verdict = "verified" if self.report.clean else "NOT CLEAN: see the findings"
        return (
            f"{self.shards_before} shards in {self.parts} folders → {self.shards} in {self.out} · "
            f"{size(self.nbytes)} · {verdict}"
        )


def merge(
    folders: Sequence[str | Path],
    out: Path,
    output: OutputConfig,
    runtime: Runtime,
    on_event: OnEvent = ignore,
) -> Merged:
    """Join the parts of a checkpoint that lie in several `folders` into the folder `out`.

    Raises:
        SourceError: A shard is missing, lies in two folders or is damaged, or the parts are of
            different runs.
        OutputError: `out` cannot be written; it is then as before.
    """
    parts = [_read_part(Path(folder).expanduser()) for folder in folders]
    if not parts:
        raise UsageError("no folder to merge: give those that the nodes wrote, and then OUT.")
    rest = _same_run(parts)
    summary = read_summary(rest)
    if not summary.shards:
        raise SourceError(
            f"{rest / SUMMARY}: does not say how the shards were cut. Quantize the model again."
        )
    units = list(_units(summary.shards, _places(parts, summary)))
    layout = [(unit, *each) for unit in units for each in unit.cut(output.shards or 1)]
    target = OutputFolder(out, markers=marker_files(), overwrite=output.overwrite)
    for part in parts:
        target.check(part.folder, "a part")
    total = sum(info.nbytes for unit in units for info in unit.tensors)
    check_disk(target.folder, total)
    files = _files(rest, summary, shard_names(len(layout)))
    try:
        target.lock(uuid4().hex)
        on_event(WritingBegan(target.folder))
        target.begin(None, files)
        _copy_all(layout, target, total, on_event)
        _write_other_files(rest, summary, layout, files, target, on_event)
        target.done()
    except BaseException:
        target.discard()
        raise
    on_event(OutputComplete(target.folder))
    report = None
    if output.verify:
        report = verify(target.folder, threads=runtime.threads, on_event=on_event)
    before = sum(len(unit.files) for unit in units)
    return Merged(target.folder, len(parts), before, len(layout), total, report)


@dataclass(frozen=True)
class _Part:
    """A folder that holds shards: all of a checkpoint, or those of one node."""

    folder: Path
    rest: Path | None
    """Where everything lies that is no shard."""
    identity: Mapping[str, Any] | None
    """Of the run that wrote it; None for a checkpoint that is whole."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of its shards, by name; of a part."""


def _read_part(folder: Path) -> _Part:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise SourceError(f"{folder}: {what}. Give the folders that the nodes wrote.")
    state = RunState(folder)
    if state.run is None:
        return _Part(folder, folder, None)
    state.check_free()
    rest = state.folder / REST
    digests = {name: str(record.get("digest")) for name, record in state.finished_shards().items()}
    is_there = (rest / CONFIG).is_file()
    identity = state.identity
    try:
        known = None if identity is None else without_times(identity)
    except (KeyError, TypeError, ValueError, AttributeError):
        known = None
    if known is None:
        raise SourceError(
            f"{folder}: its {STATE}/{RUN} is not that of a run that can be joined. "
            "Give the folders that the nodes wrote, as they are."
        )
    return _Part(folder, rest if is_there else None, known, digests)


def _same_run(parts: Sequence[_Part]) -> Path:
    """Where the run's config and the like lie; raises where the parts are of several runs."""
    first = parts[0]
    if first.identity is None:
        if len(parts) > 1:
            raise SourceError(
                f"{first.folder}: a whole checkpoint, not a part of one. Merge it alone, to cut "
                "it into other shards."
            )
        return first.folder
    for part in parts:
        if part.identity is None:
            raise SourceError(f"{part.folder}: no part of a run, as {first.folder} is.")
        changed = list(differences(first.identity, part.identity))
        if changed:
            raise SourceError(
                f"{part.folder}: a part of another run than {first.folder}: {changed[0]}. "
                "Give the folders of one run."
            )
    for part in parts:
        if part.rest is not None:
            return part.rest
    raise SourceError(
        f"{first.folder}: its run is not finished, or the folder of its first rank is not among "
        f"these {len(parts)}. Let all ranks end, and give the folder of every node."
    )


def _places(parts: Sequence[_Part], summary: QuantSummary) -> Mapping[str, tuple[Path, str | None]]:
    """Shard → the folder it lies in, and its digest. Raises for gaps and for duplicates."""
    names = [shard.file for shard in summary.shards]
    if parts[0].identity is None:
        return dict.fromkeys(names, (parts[0].folder, None))
    found: dict[str, tuple[Path, str | None]] = {}
    for part in parts:
        for name, digest in part.digests.items():
            if name in found:
                raise SourceError(
                    f"{name}: lies both in {found[name][0]} and in {part.folder}. "
                    "Give the folder of every node once."
                )
            found[name] = part.folder, digest
    missing = [name for name in names if name not in found]
    if missing:
        raise SourceError(
            f"{missing[0]}: lies in none of these folders ({len(missing)} of {len(names)} shards). "
            "Give the folder of every node."
        )
    return found


@dataclass(frozen=True)
class _Unit:
    """A layer, or the shell: its tensors in the order of the jobs that wrote them."""

    name: str
    layer: int | None
    files: Sequence[Path]
    tensors: Sequence[TensorInfo]
    jobs: Sequence[int]
    """How many tensors each job wrote."""

    def cut(self, shards: int) -> Iterator[tuple[Sequence[int], Sequence[TensorInfo]]]:
        """The unit as it is cut into shards: of each, its jobs and its tensors."""
        ends = [0]
        for count in self.jobs:
            ends.append(ends[-1] + count)
        bundles: list[Mapping[str, Spec]] = [
            {info.key: (info.dtype, info.shape) for info in self.tensors[begin:end]}
            for begin, end in pairwise(ends)
        ]
        for begin, end in cut(bundles, shards):
            yield self.jobs[begin:end], self.tensors[ends[begin] : ends[end]]


def _units(
    shards: Sequence[ShardEntry], places: Mapping[str, tuple[Path, str | None]]
) -> Iterator[_Unit]:
    for (name, layer), group in groupby(shards, lambda shard: (shard.unit, shard.layer)):
        files, tensors, jobs = [], [], list[int]()
        for shard in group:
            folder, digest = places[shard.file]
            file = folder / shard.file
            inside = list(read_header(file).values())  # in the order of the jobs
            if len(inside) != sum(shard.jobs):
                raise SourceError(
                    f"{file}: holds {len(inside)} tensors, {sum(shard.jobs)} were written. "
                    "Quantize again."
                )
            if digest is not None and digest_of_file(file) != digest:
                raise SourceError(f"{file}: damaged since it was written. Quantize again.")
            files.append(file)
            tensors += inside
            jobs += shard.jobs
        yield _Unit(name, layer, files, tensors, jobs)


_Layout = Sequence[tuple[_Unit, Sequence[int], Sequence[TensorInfo]]]


def _copy_all(
    layout: _Layout,
    target: OutputFolder,
    total: int,
    on_event: OnEvent,
) -> None:
    copied = 0
    for name, (_, _, infos) in zip(shard_names(len(layout)), layout, strict=True):
        shard = target.shard(name, {info.key: (info.dtype, info.shape) for info in infos})
        try:
            with closing(
                OpenFiles(lambda file: os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            ) as files:
                for info in infos:
                    _copy(info, shard, files)
            target.finish_shard(shard, {})
        finally:
            shard.close()
        copied += sum(info.nbytes for info in infos)
        on_event(BytesCopied(copied, total))


def _copy(info: TensorInfo, shard: ShardFile, files: OpenFiles) -> None:
    """Copy a tensor into a shard, piece by piece."""
    done = 0
    while done < info.nbytes:
        piece = bytearray(min(PIECE_BYTES, info.nbytes - done))
        try:
            with files.descriptor(info.file) as descriptor:
                count = os.preadv(descriptor, [piece], info.start + done)
        except OSError as error:
            raise read_error(info.file, error, info.key) from error
        if count == 0:
            raise SourceError(
                f"{info.file}: ended while {info.key} was read from it. Give what was written."
            )
        shard.write(info.key, memoryview(piece)[:count], done)
        done += count


def _files(rest: Path, summary: QuantSummary, names: Sequence[str]) -> list[str]:
    """What the joined checkpoint consists of: other shards, the same beside them."""
    before = {shard.file for shard in summary.shards}
    listed = [name for name in summary.files if is_inside(name) and name not in before]
    present = [path.relative_to(rest).as_posix() for path in _walk(rest)]
    added = [name for name in present if name not in before and name not in listed]
    for name in listed:
        if name == REPORT:
            continue  # drawn again
        path = rest / name
        if not (path.is_file() and path.resolve().is_relative_to(rest.resolve())):
            raise SourceError(
                f"{path}: is missing, or a link out of its folder. Give what was written."
            )
    return [*names, *added, *listed]


def _walk(folder: Path) -> Iterator[Path]:
    """Files of a folder that are its own, sorted: no links out of it, nothing hidden."""
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            yield path


def _write_other_files(
    rest: Path,
    summary: QuantSummary,
    layout: _Layout,
    files: Sequence[str],
    target: OutputFolder,
    on_event: OnEvent,
) -> None:
    """Everything that is no shard; what makes it a checkpoint comes last."""
    names = shard_names(len(layout))
    shards = tuple(
        ShardEntry(file=name, unit=unit.name, layer=unit.layer, jobs=tuple(jobs))
        for name, (unit, jobs, _) in zip(names, layout, strict=True)
    )
    own = {SUMMARY, REPORT, INDEX, CONFIG, *names}
    for name in files:
        if name not in own:
            target.copy(rest, Path(name))
    summary = summary.model_copy(update={"files": tuple(files), "shards": shards})
    target.write_text(SUMMARY, summary.to_json())
    report = draw_report(summary, lambda text: on_event(WarningIssued(text)))
    if report is not None:
        target.write_text(REPORT, report)
    infos = [
        (name, {info.key: info for info in infos})
        for name, (_, _, infos) in zip(names, layout, strict=True)
    ]
    total = sum(info.nbytes for _, tensors in infos for info in tensors.values())
    target.write_json(INDEX, index_of(infos, total))
    target.write_json(CONFIG, read_json(rest / CONFIG))
