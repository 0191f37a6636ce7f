# SPDX-License-Identifier: Apache-2.0
"""Join the folders that several nodes wrote, or cut a checkpoint into a different number of shards.

    fourfold merge NODE0 NODE1 … OUT
    fourfold merge --shards 1 CHECKPOINT OUT

Tensors are copied in the order in which a single rank would have written them, shard by shard, in
pieces of a few MB. The result has the bytes that a single rank would have written, however many
ranks wrote the folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from fourfold.config import OutputConfig, Runtime
from fourfold.documents import Shown, document
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
from fourfold.reporting.card import note_verification
from fourfold.reporting.page import draw_report, note_in_report
from fourfold.run.result import verdict
from fourfold.run.resume import without_times
from fourfold.storage.atomic import COPY_BYTES
from fourfold.storage.disk import check_disk
from fourfold.storage.fingerprints import Stamps
from fourfold.storage.json_files import read_json, why_no_folder
from fourfold.storage.names import CARD, CONFIG, INDEX, REPORT, SUMMARY
from fourfold.storage.output import OutputFolder
from fourfold.storage.quant_summary import QuantSummary, ShardEntry, read_summary
from fourfold.storage.run_state import OTHER_FILES, RUN, STATE, RunState, differences, is_inside
from fourfold.storage.safetensors_header import TensorInfo, read_header
from fourfold.storage.shard_file import ShardFile, digest_of_file, index_of
from fourfold.storage.source_files import SourceFiles
from fourfold.storage.units import size
from fourfold.verification import Report, verify


@dataclass(frozen=True, repr=False)
class Merged(Shown):
    """The result of a merge. Prints as the command's closing line."""

    out: Path
    parts: int
    shards_before: int
    shards: int
    nbytes: int
    report: Report | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return document(
            "merge",
            out=str(self.out),
            folders=self.parts,
            shards_before=self.shards_before,
            shards=self.shards,
            bytes=self.nbytes,
            verification=None if self.report is None else self.report.to_dict(),
        )

    def __str__(self) -> str:
        return (
            f"{self.shards_before} shards in {self.parts} folders → {self.shards} in {self.out} · "
            f"{size(self.nbytes)} · {verdict(self.report)}"
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
        raise UsageError(
            "no folder to merge. Give the folders that the nodes wrote, and then `out`."
        )
    config_folder = _config_folder(inputs)
    summary = read_summary(config_folder)
    if not summary.shards:
        raise SourceError(
            f"{config_folder / SUMMARY}: does not say how the shards were cut. "
            "Quantize the model again."
        )
    stamps = Stamps()
    cuts = _cut(summary.shards, _locate_shards(inputs, summary), output.shards or 1, stamps)
    cut_shards = list(cuts)
    new_shards = dict(zip(shard_names(len(cut_shards)), cut_shards, strict=True))
    target = OutputFolder(out, markers=marker_files(), overwrite=output.overwrite)
    for part in inputs:
        target.check(part.folder, "a part")
    total = sum(info.nbytes for shard in cut_shards for info in shard.tensors.values())
    check_disk(target.folder, total)
    files = _output_files(config_folder, summary, new_shards)
    try:
        target.lock(uuid4().hex)
        on_event(WritingBegan(target.folder))
        target.begin(None, files)
        _copy_all(new_shards, target, total, stamps, on_event)
        _write_other_files(config_folder, summary, new_shards, files, target, on_event)
        target.done()
    except BaseException:
        target.discard()
        raise
    on_event(OutputComplete(target.folder))
    report = None
    if output.verify:
        report = verify(target.folder, threads=runtime.threads, on_event=on_event)
        note_verification(target.folder, report)
        note_in_report(target.folder, report)
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
        what = why_no_folder(folder)
        raise SourceError(f"{folder}: {what}. Give the folders that the nodes wrote.")
    state = RunState(folder)
    if state.run is None:
        return _InputFolder(folder, folder, None)
    state.check_free()
    config_folder = state.folder / OTHER_FILES
    digests = {name: str(record.get("digest")) for name, record in state.finished_shards().items()}
    has_config = (config_folder / CONFIG).is_file()
    try:
        identity = without_times(state.identity or {})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError(
            f"{folder}: its {STATE}/{RUN} does not describe a run that can be joined. "
            "Give the folders as the nodes wrote them."
        ) from None
    return _InputFolder(folder, config_folder if has_config else None, identity, digests)


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
class _NewShard:
    """A shard of the output."""

    unit: str
    """The name in the summary."""
    layer: int | None
    """None for the non-layer tensors."""
    jobs: Sequence[Mapping[str, TensorInfo]]
    """The tensors that each job wrote, in their order."""

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {key: info for job in self.jobs for key, info in job.items()}


def _cut(
    shards: Sequence[ShardEntry],
    places: Mapping[str, tuple[Path, str | None]],
    count: int,
    stamps: Stamps,
) -> Iterator[_NewShard]:
    """Yield the shards of the output: at least `count` of each unit of the old ones."""
    for (unit, layer), group in groupby(shards, lambda shard: (shard.unit, shard.layer)):
        jobs: list[Mapping[str, TensorInfo]] = []
        for shard in group:
            infos = iter(_read_shard(shard, *places[shard.file], stamps).items())
            jobs += [dict(islice(infos, number)) for number in shard.jobs]
        for begin, end in cut([_specs(job) for job in jobs], count):
            yield _NewShard(unit, layer, jobs[begin:end])


def _specs(tensors: Mapping[str, TensorInfo]) -> dict[str, Spec]:
    return {key: (info.dtype, info.shape) for key, info in tensors.items()}


def _read_shard(
    shard: ShardEntry, folder: Path, digest: str | None, stamps: Stamps
) -> Mapping[str, TensorInfo]:
    """Read a shard's header, in the order of its jobs; check a part's shard against its digest."""
    file = folder / shard.file
    infos = read_header(file, stamps)
    if len(infos) != sum(shard.jobs):
        raise SourceError(
            f"{file}: holds {len(infos)} tensors, but {sum(shard.jobs)} were written. "
            "Quantize again."
        )
    if digest is not None and digest_of_file(file) != digest:
        raise SourceError(f"{file}: damaged since it was written. Quantize again.")
    return infos


def _copy_all(
    new_shards: Mapping[str, _NewShard],
    target: OutputFolder,
    total: int,
    stamps: Stamps,
    on_event: OnEvent,
) -> None:
    copied = 0
    on_event(BytesCopied(copied, total))
    with closing(SourceFiles(stamps)) as files:
        for name, new in new_shards.items():
            with closing(target.shard(name, _specs(new.tensors))) as shard:
                for info in new.tensors.values():
                    _copy(info, shard, files)
                    copied += info.nbytes
                    on_event(BytesCopied(copied, total))
                target.finish_shard(shard, {})


def _copy(info: TensorInfo, shard: ShardFile, files: SourceFiles) -> None:
    """Copy a tensor into a shard, piece by piece."""
    for begin in range(0, info.nbytes, COPY_BYTES):
        piece = memoryview(bytearray(min(COPY_BYTES, info.nbytes - begin)))
        files.read(info.file, info.start + begin, piece, info.key)
        shard.write(info.key, piece, begin)


def _output_files(folder: Path, summary: QuantSummary, names: Iterable[str]) -> list[str]:
    """Return the files of the output: the new shards, and the other files of the input."""
    before = {shard.file for shard in summary.shards}
    listed = [name for name in summary.files if is_inside(name) and name not in before]
    added = [name for name in _own_files(folder) if name not in before and name not in listed]
    for name in listed:
        if name not in (REPORT, CARD) and not _is_own(
            folder / name, folder
        ):  # the report is drawn again
            raise SourceError(
                f"{folder / name}: is missing, or a link out of its folder. "
                "Give the folders as the nodes wrote them."
            )
    return [*names, *added, *listed]


def _own_files(folder: Path) -> Iterator[str]:
    """Yield the files of a folder in sorted order, without hidden ones and links out of it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts) and _is_own(path, folder):
            yield name.as_posix()


def _is_own(path: Path, folder: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _write_other_files(
    config_folder: Path,
    summary: QuantSummary,
    new_shards: Mapping[str, _NewShard],
    files: Sequence[str],
    target: OutputFolder,
    on_event: OnEvent,
) -> None:
    """Write every file but the shards, config.json last: without it OUT is no checkpoint."""
    shards = tuple(
        ShardEntry(file=name, unit=new.unit, layer=new.layer, jobs=tuple(map(len, new.jobs)))
        for name, new in new_shards.items()
    )
    own = {SUMMARY, REPORT, INDEX, CONFIG, *new_shards}
    for name in files:
        if name not in own and (name != CARD or _is_own(config_folder / CARD, config_folder)):
            target.copy(config_folder, Path(name))
    summary = summary.model_copy(update={"files": tuple(files), "shards": shards})
    target.write_text(SUMMARY, summary.to_json())
    report = draw_report(summary, lambda text: on_event(WarningIssued(text)))
    if report is not None:
        target.write_text(REPORT, report)
    tensors = {name: new.tensors for name, new in new_shards.items()}
    total = sum(info.nbytes for infos in tensors.values() for info in infos.values())
    target.write_json(INDEX, index_of(tensors.items(), total))
    target.write_json(CONFIG, read_json(config_folder / CONFIG))
