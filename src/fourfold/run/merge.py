"""Join the folders that several nodes wrote, or cut a checkpoint into a different number of shards.

    fourfold merge NODE0 NODE1 … OUT
    fourfold merge --shards 1 CHECKPOINT OUT

Tensors are copied in the order in which a single rank would have written them, shard by shard, in
pieces of a few MB. The result has the bytes that a single rank would have written, however many
ranks wrote the folders.
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
from fourfold.storage.run_state import OTHER_FILES, RUN, STATE, RunState, differences, is_inside
from fourfold.storage.safetensors_header import TensorInfo, read_header
from fourfold.storage.shard_file import ShardFile, digest_of_file, index_of
from fourfold.storage.units import size
from fourfold.verification import Report, verify

PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Merged:
    """The result of a merge. Prints as the command's closing line."""

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
        OutputError: `out` cannot be written; it stays as it was.
    """
    inputs = [_open_input(Path(folder).expanduser()) for folder in folders]
    if not inputs:
        raise UsageError("no folder to merge. Give the folders that the nodes wrote, and then OUT.")
    config_folder = _config_folder(inputs)
    summary = read_summary(config_folder)
    if not summary.shards:
        raise SourceError(
            f"{config_folder / SUMMARY}: does not say how the shards were cut. "
            "Quantize the model again."
        )
    layers = list(_read_layers(summary.shards, _locate_shards(inputs, summary)))
    new_shards = [
        _NewShard(layer, jobs, tensors)
        for layer in layers
        for jobs, tensors in layer.cut(output.shards or 1)
    ]
    target = OutputFolder(out, markers=marker_files(), overwrite=output.overwrite)
    for part in inputs:
        target.check(part.folder, "a part")
    total = sum(info.nbytes for layer in layers for info in layer.tensors)
    check_disk(target.folder, total)
    files = _output_files(config_folder, summary, shard_names(len(new_shards)))
    try:
        target.lock(uuid4().hex)
        on_event(WritingBegan(target.folder))
        target.begin(None, files)
        _copy_all(new_shards, target, total, on_event)
        _write_other_files(config_folder, summary, new_shards, files, target, on_event)
        target.done()
    except BaseException:
        target.discard()
        raise
    on_event(OutputComplete(target.folder))
    report = None
    if output.verify:
        report = verify(target.folder, threads=runtime.threads, on_event=on_event)
    before = len(summary.shards)
    return Merged(target.folder, len(inputs), before, len(new_shards), total, report)


@dataclass(frozen=True)
class _InputFolder:
    """A folder with shards: a whole checkpoint, or the part of one that a node wrote."""

    folder: Path
    config_folder: Path | None
    """The folder with the config and side files; None if another node wrote them."""
    identity: Mapping[str, Any] | None
    """The identity of the run that wrote the part; None for a whole checkpoint."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """The digests of a part's shards, by file name."""


def _open_input(folder: Path) -> _InputFolder:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise SourceError(f"{folder}: {what}. Give the folders that the nodes wrote.")
    state = RunState(folder)
    if state.run is None:
        return _InputFolder(folder, folder, None)
    state.check_free()
    config_folder = state.folder / OTHER_FILES
    digests = {name: str(record.get("digest")) for name, record in state.finished_shards().items()}
    has_config = (config_folder / CONFIG).is_file()
    identity = state.identity
    try:
        known = None if identity is None else without_times(identity)
    except (KeyError, TypeError, ValueError, AttributeError):
        known = None
    if known is None:
        raise SourceError(
            f"{folder}: its {STATE}/{RUN} does not describe a run that can be joined. "
            "Give the folders as the nodes wrote them."
        )
    return _InputFolder(folder, config_folder if has_config else None, known, digests)


def _config_folder(inputs: Sequence[_InputFolder]) -> Path:
    """Return the folder with the config and side files. Raises if the parts are of several runs."""
    first = inputs[0]
    if first.identity is None:
        if len(inputs) > 1:
            raise SourceError(
                f"{first.folder}: is a whole checkpoint, not a part of one. "
                "Merge it alone to cut it into other shards."
            )
        return first.folder
    for part in inputs:
        if part.identity is None:
            raise SourceError(
                f"{part.folder}: is not a part of a run, but {first.folder} is one. "
                "Give the folders that the nodes wrote, and no others."
            )
        changed = list(differences(first.identity, part.identity))
        if changed:
            raise SourceError(
                f"{part.folder}: is a part of another run than {first.folder}: {changed[0]}. "
                "Give the folders of one run."
            )
    for part in inputs:
        if part.config_folder is not None:
            return part.config_folder
    raise SourceError(
        f"{first.folder}: its run is not finished, or the folder of its first rank is not among "
        f"these {len(inputs)}. Let all ranks end, and give the folder of every node."
    )


def _locate_shards(
    inputs: Sequence[_InputFolder], summary: QuantSummary
) -> Mapping[str, tuple[Path, str | None]]:
    """Return each shard's folder and digest. Raises if one is missing or lies in two folders."""
    names = [shard.file for shard in summary.shards]
    if inputs[0].identity is None:
        return dict.fromkeys(names, (inputs[0].folder, None))
    places: dict[str, tuple[Path, str | None]] = {}
    for part in inputs:
        for name, digest in part.digests.items():
            if name in places:
                raise SourceError(
                    f"{name}: lies both in {places[name][0]} and in {part.folder}. "
                    "Give the folder of every node once."
                )
            places[name] = part.folder, digest
    missing = [name for name in names if name not in places]
    if missing:
        raise SourceError(
            f"{missing[0]}: lies in none of these folders ({len(missing)} of {len(names)} shards). "
            "Give the folder of every node."
        )
    return places


@dataclass(frozen=True)
class _Layer:
    """A decoder layer or the non-layer tensors, in the order of the jobs that wrote the tensors."""

    unit: str
    """The name in the summary."""
    number: int | None
    """None for the non-layer tensors."""
    tensors: Sequence[TensorInfo]
    jobs: Sequence[int]
    """The number of tensors that each job wrote."""

    def cut(self, shards: int) -> Iterator[tuple[Sequence[int], Sequence[TensorInfo]]]:
        """Yield the jobs and the tensors of each shard that the layer is cut into."""
        ends = [0]
        for count in self.jobs:
            ends.append(ends[-1] + count)
        bundles: list[Mapping[str, Spec]] = [
            {info.key: (info.dtype, info.shape) for info in self.tensors[begin:end]}
            for begin, end in pairwise(ends)
        ]
        for begin, end in cut(bundles, shards):
            yield self.jobs[begin:end], self.tensors[ends[begin] : ends[end]]


@dataclass(frozen=True)
class _NewShard:
    """A shard of the output."""

    layer: _Layer
    jobs: Sequence[int]
    """The number of tensors that each job wrote."""
    tensors: Sequence[TensorInfo]


def _read_layers(
    shards: Sequence[ShardEntry], places: Mapping[str, tuple[Path, str | None]]
) -> Iterator[_Layer]:
    """Read the headers of the shards, and check the shards of parts against their digests."""
    for (unit, number), group in groupby(shards, lambda shard: (shard.unit, shard.layer)):
        tensors, jobs = list[TensorInfo](), list[int]()
        for shard in group:
            folder, digest = places[shard.file]
            file = folder / shard.file
            infos = list(read_header(file).values())  # in the order of the jobs
            if len(infos) != sum(shard.jobs):
                raise SourceError(
                    f"{file}: holds {len(infos)} tensors, but {sum(shard.jobs)} were written. "
                    "Quantize again."
                )
            if digest is not None and digest_of_file(file) != digest:
                raise SourceError(f"{file}: damaged since it was written. Quantize again.")
            tensors += infos
            jobs += shard.jobs
        yield _Layer(unit, number, tensors, jobs)


def _copy_all(
    new_shards: Sequence[_NewShard], target: OutputFolder, total: int, on_event: OnEvent
) -> None:
    copied = 0
    for name, new in zip(shard_names(len(new_shards)), new_shards, strict=True):
        shard = target.shard(name, {info.key: (info.dtype, info.shape) for info in new.tensors})
        try:
            with closing(
                OpenFiles(lambda file: os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            ) as files:
                for info in new.tensors:
                    _copy(info, shard, files)
            target.finish_shard(shard, {})
        finally:
            shard.close()
        copied += sum(info.nbytes for info in new.tensors)
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
                f"{info.file}: ended while {info.key} was read from it. "
                "Give the folders as the nodes wrote them."
            )
        shard.write(info.key, memoryview(piece)[:count], done)
        done += count


def _output_files(folder: Path, summary: QuantSummary, names: Sequence[str]) -> list[str]:
    """Return the files of the output: the new shards, and the other files of the input."""
    before = {shard.file for shard in summary.shards}
    listed = [name for name in summary.files if is_inside(name) and name not in before]
    present = [path.relative_to(folder).as_posix() for path in _own_files(folder)]
    added = [name for name in present if name not in before and name not in listed]
    for name in listed:
        if name == REPORT:
            continue  # drawn again
        path = folder / name
        if not (path.is_file() and path.resolve().is_relative_to(folder.resolve())):
            raise SourceError(
                f"{path}: is missing, or a link out of its folder. "
                "Give the folders as the nodes wrote them."
            )
    return [*names, *added, *listed]


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder in sorted order, without hidden ones and links out of it."""
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            yield path


def _write_other_files(
    config_folder: Path,
    summary: QuantSummary,
    new_shards: Sequence[_NewShard],
    files: Sequence[str],
    target: OutputFolder,
    on_event: OnEvent,
) -> None:
    """Write every file but the shards, config.json last: without it OUT is no checkpoint."""
    names = shard_names(len(new_shards))
    shards = tuple(
        ShardEntry(file=name, unit=new.layer.unit, layer=new.layer.number, jobs=tuple(new.jobs))
        for name, new in zip(names, new_shards, strict=True)
    )
    own = {SUMMARY, REPORT, INDEX, CONFIG, *names}
    for name in files:
        if name not in own:
            target.copy(config_folder, Path(name))
    summary = summary.model_copy(update={"files": tuple(files), "shards": shards})
    target.write_text(SUMMARY, summary.to_json())
    report = draw_report(summary, lambda text: on_event(WarningIssued(text)))
    if report is not None:
        target.write_text(REPORT, report)
    infos = [
        (name, {info.key: info for info in new.tensors})
        for name, new in zip(names, new_shards, strict=True)
    ]
    total = sum(info.nbytes for _, tensors in infos for info in tensors.values())
    target.write_json(INDEX, index_of(infos, total))
    target.write_json(CONFIG, read_json(config_folder / CONFIG))
