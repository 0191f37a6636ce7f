"""Write a checkpoint so that it is whole or absent.

A shard's header follows from the plan, so each tensor has its place before a byte is computed:
workers write in any order, straight to it. A shard is written under a temporary name in the same
folder, synced, and renamed; the index and `config.json` come last. A folder without them is no
checkpoint, and no engine takes it for one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fourfold._version import __version__
from fourfold.checkpoints.modelopt import QUANT_CONFIG
from fourfold.checkpoints.safetensors_header import build_header, nbytes_of
from fourfold.checkpoints.source import CONFIG, INDEX
from fourfold.errors import OutputError

PARTIAL = ".partial"
"""The ending of files that are not finished."""

MARKER = f".fourfold{PARTIAL}"
"""Stands in the folder while a run is unfinished, and lists what it writes."""

SUMMARY = "quant_summary.json"
"""Stands in the folder of a finished run, and lists what it wrote under `files`."""

STATISTICS = "calibration.safetensors"
"""What calibration found; no engine takes it for a shard, as the index does not name it."""

REPORT = "report.html"

METADATA = {"format": "pt", "producer": f"fourfold {__version__}"}


class OutputFolder:
    """The folder that is written. Remembers what it wrote, so that a failed run leaves nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made_folder = False
        self._written: list[Path] = []

    def check(self, source: Path, *, overwrite: bool) -> None:
        """Refuse a folder that lies in the source, or holds what is not ours. Changes nothing."""
        out, model = self.folder.resolve(), source.resolve()
        if out == model or model in out.parents:
            raise OutputError(f"{self.folder}: lies inside the model's folder. Choose another.")
        if out in model.parents:
            raise OutputError(f"{self.folder}: the model lies inside it. Choose another folder.")
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder}: is a file. Choose a folder.")
        try:
            present = sorted(path.name for path in self.folder.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise output_error(self.folder, error) from error
        if present:
            self._check_present(present, overwrite)

    def _check_present(self, present: list[str], overwrite: bool) -> None:
        if not overwrite:
            if MARKER in present:
                text = "holds an unfinished run. --overwrite starts anew in its place."
            else:
                text = f"not empty ({present[0]}, …). Choose another folder, or --overwrite."
            raise OutputError(f"{self.folder}: {text}")
        if MARKER not in present and not self._earlier_files():
            raise OutputError(
                f"{self.folder}: holds {present[0]}, … but no checkpoint that fourfold wrote. "
                "Choose another folder, or empty this one yourself."
            )

    def prepare(self, source: Path, files: Sequence[str], *, overwrite: bool) -> None:
        """`check`, make the folder, remove an earlier checkpoint, and mark the run as unfinished.

        files: every file that this run will write. One that is there already and is not of an
        earlier checkpoint is refused, not overwritten.
        """
        self.check(source, overwrite=overwrite)
        try:
            is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made_folder = is_new
            self._check_free(files)
            self._clear()
            self._written.append(self.folder / MARKER)
            (self.folder / MARKER).write_text(json.dumps({"files": list(files)}))
        except OSError as error:
            raise output_error(self.folder, error) from error

    def _check_free(self, files: Sequence[str]) -> None:
        """Refuse before anything is removed, so that an earlier checkpoint stays whole."""
        earlier = set(self._earlier_files())
        for name in files:
            path = self.folder / name
            if os.path.lexists(path) and (name not in earlier or path.is_dir()):
                raise OutputError(
                    f"{path}: is in the way, and no part of an earlier checkpoint. "
                    "Move it, or choose another folder."
                )

    def _earlier_files(self) -> list[str]:
        """What an earlier run wrote here, by its own word: finished or not."""
        names: list[str] = []
        for record in (MARKER, SUMMARY):
            try:
                found = json.loads((self.folder / record).read_bytes())["files"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            names += [name for name in found if _is_inside(name)]
        return names

    def _clear(self) -> None:
        """Remove an earlier checkpoint: first what makes it one, then the rest."""
        names = self._earlier_files()
        first = [name for name in (CONFIG, INDEX, QUANT_CONFIG) if name in names]
        partial = [path.name for path in self.folder.glob(f".*{PARTIAL}")]
        for name in [*first, *names, *partial]:
            (self.folder / name).unlink(missing_ok=True)

    def done(self) -> None:
        """The checkpoint is whole: take the mark away."""
        try:
            (self.folder / MARKER).unlink(missing_ok=True)
            _sync_folder(self.folder)
        except OSError as error:
            raise output_error(self.folder, error) from error

    def shard(self, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> ShardFile:
        """Begin a shard; the file has its full size and its header at once."""
        path = self.folder / f".{name}{PARTIAL}"
        self._written += [path, self.folder / name]
        return ShardFile(path, self.folder / name, tensors)

    def copy(self, source: Path, relative: Path) -> None:
        """Copy one file of the source's folder, contents only: temporary name, sync, rename."""
        target = self.folder / relative
        partial = target.with_name(f".{target.name}{PARTIAL}")
        self._written += [partial, target]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with (source / relative).open("rb") as before, partial.open("wb") as after:
                shutil.copyfileobj(before, after)
                after.flush()
                os.fsync(after.fileno())
            partial.replace(target)
        except OSError as error:
            raise output_error(target, error) from error

    def write_json(self, name: str, value: Mapping[str, Any], *, indent: int | None = 2) -> None:
        """Write a JSON file: temporary name, sync, rename."""
        text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
        self.write_text(name, text)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file: temporary name, sync, rename."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file: temporary name, sync, rename."""
        path, partial = self.folder / name, self.folder / f".{name}{PARTIAL}"
        self._written += [partial, path]
        try:
            with partial.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(path)
        except OSError as error:
            raise output_error(path, error) from error

    def discard(self) -> None:
        """Remove what this run wrote, what makes it a checkpoint first."""
        for path in reversed(self._written):
            path.unlink(missing_ok=True)
        if self._made_folder:
            for folder in sorted(
                (path for path in self.folder.rglob("*") if path.is_dir()), reverse=True
            ):
                _remove_if_empty(folder)
            _remove_if_empty(self.folder)


class ShardFile:
    """One safetensors file while it is filled. `write` may be called from many threads."""

    def __init__(
        self, partial: Path, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> None:
        self.partial, self.path = partial, path
        header, self._begins = build_header(tensors, METADATA)
        self.nbytes = len(header) + sum(nbytes_of(*spec) for spec in tensors.values())
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._descriptor = os.open(partial, flags, 0o644)
            os.ftruncate(self._descriptor, self.nbytes)
        except OSError as error:
            raise output_error(path, error) from error
        self._pwrite(header, 0)

    def write(self, name: str, data: Any, offset: int = 0) -> None:
        """Write bytes of tensor `name`, `offset` bytes from its beginning."""
        self._pwrite(data, self._begins[name] + offset)

    def _pwrite(self, data: Any, position: int) -> None:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], position + done)
        except OSError as error:
            raise output_error(self.path, error) from error

    def finish(self) -> None:
        """Sync the file and give it its name."""
        try:
            os.fsync(self._descriptor)
            self._close()
            self.partial.replace(self.path)
        except OSError as error:
            raise output_error(self.path, error) from error

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        self._close()
        self.partial.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def index_of(shards: Iterable[tuple[str, Mapping[str, Any]]], total_size: int) -> dict[str, Any]:
    """The contents of model.safetensors.index.json; `total_size` in bytes of tensors."""
    weight_map = {name: file for file, tensors in shards for name in tensors}
    return {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }


def free_bytes(folder: Path) -> int:
    """Free bytes in the file system where `folder` lies or will lie."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def output_error(path: Path, error: OSError) -> OutputError:
    """What went wrong with a file of the output, and what to do."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "The disk is full: free some room, or write to another one."
        case errno.EACCES | errno.EROFS | errno.EPERM:
            remedy = "The folder cannot be written: change its permissions, or choose another."
        case _:
            remedy = f"{error.strerror or error}."
    return OutputError(f"{path}: {remedy}")


def _is_inside(name: object) -> bool:
    """Whether a file name from a record stays in the folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
