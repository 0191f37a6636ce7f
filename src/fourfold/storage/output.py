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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from fourfold._version import __version__
from fourfold.errors import OutputError, PlanError
from fourfold.storage.fingerprints import read_error
from fourfold.storage.names import CONFIG, INDEX
from fourfold.storage.run_state import (
    STATE,
    Journal,
    differences,
    is_still,
    names_in,
    partial_of,
    sync_folder,
)
from fourfold.storage.safetensors_header import build_header, nbytes_of
from fourfold.storage.units import size

PARTIAL = ".partial"
"""The ending of files that are not finished."""

SUMMARY = "quant_summary.json"
"""Stands in the folder of a finished run, and lists what it wrote under `files`."""

STATISTICS = "calibration.safetensors"
"""What calibration found; no engine takes it for a shard, as the index does not name it."""

REPORT = "report.html"

DIGEST_BYTES = 1 << 22
"""Files are read in pieces of this size for their digest."""

METADATA = {"format": "pt", "producer": f"fourfold {__version__}"}


class OutputFolder:
    """The folder that is written. A run that ends early leaves nothing, or what can go on."""

    def __init__(self, folder: Path, rank: int = 0, *, markers: Sequence[str] = ()) -> None:
        """Describe the folder; nothing is read or written yet.

        Args:
            folder: The folder to write.
            rank: This process's rank.
            markers: Files of the layout that make the folder a checkpoint, beside config.json and
                the index. They are written last and removed first.
        """
        self.folder = folder
        self.markers = (CONFIG, INDEX, *markers)
        self.journal = Journal(folder, rank)
        self.is_begun = False
        """Whether what is here is this run's, to keep or to remove."""
        self.has_cleared = False
        """Whether this run removed an earlier checkpoint."""
        self._made_folder = False
        self._written: list[Path] = []

    def check(self, source: Path, *, overwrite: bool, what: str = "the model") -> None:
        """Refuse a folder that lies in the source, or holds what is not ours. Changes nothing.

        what: is read from the folder `source`.
        """
        out, model = self.folder.resolve(), source.resolve()
        if out == model or model in out.parents:
            raise OutputError(f"{self.folder}: lies inside {what}'s folder. Choose another.")
        if out in model.parents:
            raise OutputError(f"{self.folder}: {what} lies inside it. Choose another folder.")
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder}: is a file. Choose a folder.")
        try:
            present = sorted(path.name for path in self.folder.iterdir())
            self.journal.check_free()
        except FileNotFoundError:
            return
        except OSError as error:
            raise output_error(self.folder, error) from error
        if self.journal.folder.is_symlink():
            raise OutputError(
                f"{self.journal.folder}: is a link. Remove it, or choose another folder."
            )
        self._check_present(present, overwrite)

    def _check_present(self, present: list[str], overwrite: bool) -> None:
        others = [name for name in present if name != STATE]
        if not others:
            return
        if not self._earlier_files() and (overwrite or STATE in present):
            raise OutputError(
                f"{self.folder}: holds {others[0]}, … but no checkpoint that fourfold wrote. "
                "Choose another folder, or empty this one yourself."
            )
        run = self.journal.run
        is_whole = run is None or ("identity" not in run and CONFIG in present)
        if is_whole and not overwrite:
            raise OutputError(
                f"{self.folder}: not empty ({others[0]}, …). Choose another folder, or --overwrite."
            )

    def check_continues(self, identity: Mapping[str, Any] | None, *, overwrite: bool) -> None:
        """Refuse to go on with an unfinished run of something else. Changes nothing."""
        before = self.journal.run
        if overwrite or before is None or not self.journal.has_finished:
            return
        if identity is None or not isinstance(before.get("identity"), Mapping):
            raise OutputError(
                f"{self.folder}: holds an unfinished run that cannot go on. "
                "--overwrite starts anew in its place."
            )
        changed = list(differences(before["identity"], identity))
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise OutputError(
                f"{self.folder}: holds an unfinished run of something else. "
                f"Changed since: {'; '.join(changed[:3])}{more}.\n"
                "Give the same as before to go on with it, or --overwrite to start anew."
            )

    def lock(self, token: str) -> None:
        """Make the folder, and let no other process write into it."""
        try:
            self._made_folder = not self.folder.exists()
            self.journal.lock(token)
        except OSError as error:
            raise output_error(self.folder, error) from error

    def begin(
        self, identity: Mapping[str, Any] | None, files: Sequence[str], *, overwrite: bool
    ) -> list[dict[str, Any]]:
        """Make ready to write; gives the journal of the run that goes on, if one does.

        identity: what must be as it was for a run to go on; None where it cannot.
        files: every file that this run will write. One that is there already and is not of an
        earlier checkpoint is refused, not overwritten.
        """
        try:  # what `check` saw may be another thing by now
            self._check_present(sorted(os.listdir(self.folder)), overwrite)
            self.check_continues(identity, overwrite=overwrite)
            if self.journal.run is not None and self.journal.has_finished and not overwrite:
                self.is_begun = True
                self._remove_partial(files)
                return self.journal.entries()
            earlier = self._earlier_files()
            self._check_free(files, earlier)
            # Whatever happens from here on, what was there is known to be ours.
            self.journal.begin({"files": [*earlier, *files]})
            self.is_begun = True
            self.has_cleared = (self.folder / CONFIG).exists()
            self._clear(earlier)
            self.journal.begin({"files": list(files), "identity": identity})
        except OSError as error:
            raise output_error(self.folder, error) from error
        return []

    def _check_free(self, files: Sequence[str], earlier: Sequence[str]) -> None:
        """Refuse before anything is removed, so that an earlier checkpoint stays whole."""
        known = set(earlier)
        for name in files:
            path = self.folder / name
            if os.path.lexists(path) and (name not in known or path.is_dir()):
                raise OutputError(
                    f"{path}: is in the way, and no part of an earlier checkpoint. "
                    "Move it, or choose another folder."
                )

    def _earlier_files(self) -> list[str]:
        """What an earlier run wrote here, by its own word: finished or not."""
        try:
            summary = json.loads((self.folder / SUMMARY).read_bytes())
        except (OSError, ValueError, RecursionError):
            summary = None
        return list(dict.fromkeys([*names_in(self.journal.run), *names_in(summary)]))

    def _clear(self, names: Sequence[str]) -> None:
        """Remove an earlier checkpoint: first what makes it one, then the rest."""
        first = [name for name in self.markers if name in names]
        for name in [*first, *names]:
            (self.folder / name).unlink(missing_ok=True)
        self._remove_partial(names)

    def _remove_partial(self, names: Sequence[str]) -> None:
        for name in names:
            partial_of(self.folder / name).unlink(missing_ok=True)

    def nbytes_present(self) -> int:
        """Bytes of files here that are a run's own: its end needs no more room for them."""
        files = [self.folder / name for name in names_in(self.journal.run)]
        return sum(path.stat().st_size for path in files if path.is_file())

    def done(self) -> None:
        """The checkpoint is whole: nothing of the run stays beside it."""
        try:
            self.journal.remove()
            sync_folder(self.folder)
        except OSError as error:
            raise output_error(self.folder, error) from error

    def shard(self, name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> ShardFile:
        """Begin a shard; the file has its full size and its header at once."""
        path = self.folder / name
        self._written += [partial_of(path), path]
        return ShardFile(partial_of(path), path, tensors)

    def add_to_journal(self, entry: Mapping[str, Any]) -> None:
        """Note that something is finished; it is for good, then."""
        self.check_mine()
        try:
            self.journal.add(entry)
        except OSError as error:
            raise output_error(self.journal.folder, error) from error

    def check_mine(self) -> None:
        """Raise `OutputError` where somebody took the folder away while it was written."""
        if not self.journal.is_mine:
            raise OutputError(
                f"{self.folder}: was removed or moved away while it was written. Start again."
            )

    def copy(self, source: Path, relative: Path) -> None:
        """Copy one file of the source's folder, contents only: temporary name, sync, rename."""
        try:
            data = (source / relative).open("rb")
        except OSError as error:
            raise read_error(source / relative, error) from error
        with data as before, self._replacing(str(relative)) as after:
            while piece := _piece_of(before, source / relative):
                after.write(piece)

    def write_json(self, name: str, value: Mapping[str, Any], *, indent: int | None = 2) -> None:
        """Write a JSON file: temporary name, sync, rename."""
        text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
        self.write_text(name, text)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file: temporary name, sync, rename."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file: temporary name, sync, rename."""
        with self._replacing(name) as handle:
            handle.write(data)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[BinaryIO]:
        """A file under a temporary name; when it was filled, it is synced and renamed."""
        path = self.folder / name
        partial = partial_of(path)
        self._written += [partial, path]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(path)
        except OSError as error:
            raise output_error(path, error) from error

    def close(self) -> None:
        """Let others write here."""
        self.journal.close()

    def leave(self) -> None:
        """Let go of the folder, with nothing more of this run than was there; a folder that was
        made, or a state that nobody began, goes."""
        with suppress(OSError):  # other ranks do the same at this moment
            if self.is_begun or (self.journal.is_mine and self.journal.run is None):
                self.journal.remove()
            if self._made_folder:
                inside = sorted((path for path in self.folder.rglob("*")), reverse=True)
                for folder in [*filter(Path.is_dir, inside), self.folder]:
                    _remove_if_empty(folder)
        self.close()

    def discard(self) -> None:
        """Remove what this run wrote or went on from; what makes it a checkpoint first.

        Of a run that others have begun, only what this rank wrote. Nothing where another process
        has taken the folder.
        """
        if not self.journal.is_mine:
            return
        names = names_in(self.journal.run) if self.is_begun else ()
        for path in [*reversed(self._written), *(self.folder / name for name in names)]:
            path.unlink(missing_ok=True)
        self.leave()

    def remove(self, files: Sequence[str]) -> None:
        """Remove a checkpoint that was finished here; what makes it one first."""
        for name in [*self.markers, *files]:
            (self.folder / name).unlink(missing_ok=True)

    def keep_unfinished(self) -> None:
        """Keep what the journal speaks of, and nothing else: the same run can go on."""
        if not self.journal.is_mine:
            return
        for path in reversed(self._written):
            if path.name.endswith(PARTIAL) or path.name in self.markers:
                path.unlink(missing_ok=True)
        self.close()


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

    def finish(self) -> str:
        """Sync the file and give it its name; returns the digest of its bytes."""
        try:
            if not is_still(self._descriptor, self.partial):
                raise OutputError(
                    f"{self.path}: was removed or moved away while it was written. Start again."
                )
            digest = _digest_of(self._descriptor)
            os.fsync(self._descriptor)
            self._close()
            self.partial.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise output_error(self.path, error) from error
        return digest

    def abandon(self) -> None:
        """Close and remove the unfinished file; not one that somebody else put in its place."""
        is_mine = self._descriptor >= 0 and is_still(self._descriptor, self.partial)
        self._close()
        if is_mine:
            self.partial.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def digest_of_file(path: Path) -> str | None:
    """The digest of a file's bytes; None where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _digest_of(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _digest_of(descriptor: int) -> str:
    digest, buffer, position = xxhash.xxh3_128(), bytearray(DIGEST_BYTES), 0
    while count := os.preadv(descriptor, [buffer], position):
        digest.update(memoryview(buffer)[:count])
        position += count
    return digest.hexdigest()


def index_of(shards: Iterable[tuple[str, Mapping[str, Any]]], total_size: int) -> dict[str, Any]:
    """The contents of model.safetensors.index.json; `total_size` in bytes of tensors."""
    weight_map = {name: file for file, tensors in shards for name in tensors}
    return {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }


def check_disk(folder: Path, needed: int) -> None:
    """Raise `PlanError` where the disk that `folder` lies or will lie on has less room."""
    free = free_bytes(folder)
    if needed > free:
        raise PlanError(
            f"{folder}: {size(needed)} are needed, {size(free)} are free on that disk. "
            "Free some room, or write to another one."
        )


def free_bytes(folder: Path) -> int:
    """Free bytes in the file system where `folder` lies or will lie."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _piece_of(file: BinaryIO, path: Path) -> bytes:
    """The next bytes of a file that is copied; its errors are not those of OUT."""
    try:
        return file.read(DIGEST_BYTES)
    except OSError as error:
        raise read_error(path, error) from error


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


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
