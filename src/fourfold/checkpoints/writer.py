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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fourfold._version import __version__
from fourfold.checkpoints.modelopt import QUANT_CONFIG
from fourfold.checkpoints.safetensors_header import build_header, nbytes_of
from fourfold.checkpoints.source import CONFIG, INDEX
from fourfold.errors import OutputError

PARTIAL = ".partial"
"""The ending of files that are not finished."""

METADATA = {"format": "pt", "producer": f"fourfold {__version__}"}


class OutputFolder:
    """The folder that is written. Remembers what it wrote, so that a failed run leaves nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made_folder = False
        self._written: list[Path] = []

    def check(self, source: Path, *, overwrite: bool) -> None:
        """Refuse a folder that holds something, or that lies in the source. Changes nothing."""
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
        if present and not overwrite:
            raise OutputError(self._refusal(present))

    def prepare(self, source: Path, *, overwrite: bool) -> None:
        """`check`, then make the folder, empty it of an earlier checkpoint, and try to write."""
        self.check(source, overwrite=overwrite)
        try:
            self._made_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            self._probe()
        except OSError as error:
            raise output_error(self.folder, error) from error

    def _refusal(self, present: list[str]) -> str:
        if any(name.endswith(PARTIAL) for name in present):
            return f"{self.folder}: holds an unfinished run. --overwrite starts anew in its place."
        return f"{self.folder}: not empty ({present[0]}, …). Choose another folder, or --overwrite."

    def _clear(self) -> None:
        """Remove an earlier checkpoint: first what makes it one, then its weights."""
        names = [CONFIG, INDEX, QUANT_CONFIG]
        paths = [self.folder / name for name in names]
        paths += [*self.folder.glob("*.safetensors"), *self.folder.glob(f".*{PARTIAL}")]
        for path in paths:
            path.unlink(missing_ok=True)

    def _probe(self) -> None:
        probe = self.folder / f".probe{PARTIAL}"
        probe.touch()
        probe.unlink()

    def shard(self, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> ShardFile:
        """Begin a shard; the file has its full size and its header at once."""
        path = self.folder / f".{name}{PARTIAL}"
        self._written += [path, self.folder / name]
        return ShardFile(path, self.folder / name, tensors)

    def copy(self, source: Path, relative: Path) -> None:
        """Copy one file of the source's folder, contents only."""
        target = self.folder / relative
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._written.append(target)
            shutil.copyfile(source / relative, target)
        except OSError as error:
            raise output_error(target, error) from error

    def write_json(self, name: str, value: Mapping[str, Any], *, indent: int | None = 2) -> None:
        """Write a JSON file: temporary name, sync, rename."""
        text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
        self.write_text(name, text)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file: temporary name, sync, rename."""
        path, partial = self.folder / name, self.folder / f".{name}{PARTIAL}"
        self._written += [partial, path]
        try:
            with partial.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(path)
        except OSError as error:
            raise output_error(path, error) from error

    def sync(self) -> None:
        """Make renames durable."""
        _sync_folder(self.folder)

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
        sizes = build_sizes(tensors)
        self.nbytes = len(header) + sum(sizes.values())
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
            os.close(self._descriptor)
            self.partial.replace(self.path)
        except OSError as error:
            raise output_error(self.path, error) from error

    def abandon(self) -> None:
        """Close and remove the unfinished file."""
        try:
            os.close(self._descriptor)
        except OSError:
            return  # finished already
        self.partial.unlink(missing_ok=True)


def build_sizes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Bytes of each tensor."""
    return {name: nbytes_of(*spec) for name, spec in tensors.items()}


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
