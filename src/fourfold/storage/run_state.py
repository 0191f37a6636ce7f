"""What a run leaves in OUT while it is unfinished, so that the same command goes on from there.

    OUT/.fourfold/run.json             what the run is, by digest, and the files that it writes
    OUT/.fourfold/journal-00000.jsonl  a line for each shard that is finished and each unit that
                                       was observed; every rank has its own
    OUT/.fourfold/lock-00000           held by a rank while it is alive, and says who that is

A line is written when what it speaks of is on the disk, and begins with its own checksum: a line
that was torn is no line. A lock is the system's own (flock), which goes with its process however
that ends. When the checkpoint is whole, the folder goes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fourfold.errors import OutputError

STATE = ".fourfold"
"""The folder inside OUT."""

RUN = "run.json"

REST = "rest"
"""A folder in it, of all that is no shard, where a checkpoint's parts lie in several OUTs."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What a file system answers that has no locks."""

_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}
"""What a file system answers that is asked to remove a folder with something in it."""


class Journal:
    """The state of an unfinished run, as one rank sees it."""

    def __init__(self, out: Path, rank: int = 0) -> None:
        self.folder = out / STATE
        self.rank = rank
        self._lock = -1
        self._lines = -1

    @property
    def run(self) -> Mapping[str, Any] | None:
        """What run.json says; None where no run is unfinished here, or nobody can read it."""
        try:
            file = self.folder / RUN
            found = json.loads(file.read_bytes()) if file.is_file() else None
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """What the unfinished run is; None where none is, or where it cannot go on."""
        found = (self.run or {}).get("identity")
        return found if isinstance(found, dict) else None

    def check_free(self) -> None:
        """Raise `OutputError` where a living process writes here. Changes nothing."""
        for path in sorted(self.folder.glob("lock-*")):
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not _is_free(descriptor):
                    raise OutputError(_who_holds(path))
            finally:
                os.close(descriptor)  # and with it the lock, if it was free

    def lock(self, token: str) -> None:
        """Make the folder and take this rank's lock. Raises `OutputError` where another process has
        it.

        token: a word by which other ranks know the run again.
        """
        path = self.folder / f"lock-{self.rank:05d}"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # another process was done, and took the folder away
                continue
            if not _is_free(descriptor):
                os.close(descriptor)
                raise OutputError(_who_holds(path))
            if is_still(descriptor, path):  # nobody took the file away meanwhile
                break
            os.close(descriptor)
        self._lock = descriptor
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "command": " ".join(sys.argv)[:500],
            "token": token,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        os.fsync(descriptor)

    @property
    def is_mine(self) -> bool:
        """Whether this rank has its lock, and nobody took the folder away meanwhile."""
        return self._lock >= 0 and is_still(self._lock, self.folder / f"lock-{self.rank:05d}")

    def token_of(self, rank: int) -> str | None:
        """The word that a rank gave when it took its lock."""
        holder = _holder(self.folder / f"lock-{rank:05d}")
        return None if holder is None else holder.get("token")

    def begin(self, run: Mapping[str, Any]) -> None:
        """Say what the run is. What an earlier one left in the journals is forgotten."""
        for path in self.folder.glob("journal-*.jsonl"):
            path.unlink()
        partial = self.folder / f"{RUN}.partial"
        with partial.open("w") as handle:
            json.dump(run, handle)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(self.folder / RUN)
        sync_folder(self.folder)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write a line; it is on the disk afterwards."""
        if self._lines < 0:
            path = self.folder / f"journal-{self.rank:05d}.jsonl"
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._lines = os.open(path, flags, 0o644)
            self._end_torn_line()
        text = json.dumps(entry, ensure_ascii=False).encode()
        view = memoryview(b"%08x %b\n" % (zlib.crc32(text), text))
        while view:
            view = view[os.write(self._lines, view) :]
        os.fsync(self._lines)

    def _end_torn_line(self) -> None:
        """So that the next line is not taken for the rest of one that a kill has torn."""
        size = os.fstat(self._lines).st_size
        if size and os.pread(self._lines, 1, size - 1) != b"\n":
            os.write(self._lines, b"\n")

    def entries(self) -> list[dict[str, Any]]:
        """Every whole line of every rank."""
        return list(self._entries())

    def _entries(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            if path.is_file():
                yield from _whole_lines(path.read_bytes())

    @property
    def has_finished(self) -> bool:
        """Whether anything is finished that a run could go on from."""
        return any("shard" in entry for entry in self._entries())

    def close(self) -> None:
        """Give the lock back."""
        for descriptor in (self._lines, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._lines = self._lock = -1

    def remove(self) -> None:
        """Take the folder away: nothing is unfinished any more. First what makes it a run; last the
        locks, the first rank's after the others': from then on it may be another process's."""
        (self.folder / RUN).unlink(missing_ok=True)
        names = sorted(self.folder.glob("*"), reverse=True)
        for path in sorted(names, key=lambda path: path.name.startswith("lock-")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.close()
        while not self._is_gone():
            pass

    def _is_gone(self) -> bool:
        """Remove the folder, unless another process has it by now, to remove it itself."""
        try:
            self.folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError as error:
            inside = {path.name for path in self.folder.glob("*")}
            if error.errno in _NOT_EMPTY and not inside:  # it has just let go of the folder
                return False
            if error.errno not in _NOT_EMPTY or f"lock-{0:05d}" not in inside:
                raise
        return True


def _is_free(descriptor: int) -> bool:
    """Take the lock of an open file, if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return not _lives(_parse_holder(os.pread(descriptor, 1 << 16, 0)))
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def is_still(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _who_holds(path: Path) -> str:
    holder = _holder(path)
    out = path.parent.parent
    if holder is None:
        return f"{out}: another process is writing it. Wait for it, or choose another folder."
    return (
        f"{out}: process {holder.get('pid')} on {holder.get('host')} is writing it since "
        f"{holder.get('since')} ({holder.get('command')}). "
        "Wait for it, stop it, or choose another folder."
    )


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        return _parse_holder(path.read_bytes())
    except OSError:
        return None


def _parse_holder(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _lives(holder: Mapping[str, Any] | None) -> bool:
    """Whether a holder may be alive: for file systems that have no locks."""
    if holder is None:
        return False
    is_here = holder.get("host") == socket.gethostname()
    pid = holder.get("pid")
    return not is_here or (pid != os.getpid() and psutil.pid_exists(int(pid or 0)))


def _whole_lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n"):
        checksum, _, text = line.partition(b" ")
        if checksum == b"%08x" % zlib.crc32(text):
            with suppress(ValueError, RecursionError):
                entry = json.loads(text)
                if isinstance(entry, dict):
                    yield entry


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What changed between two records, as `recipe.weights.scale: mse → max`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{path}: {_short(before)} → {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(path: Path) -> Path:
    """The temporary name under which a file is written."""
    return path.with_name(f".{path.name}.partial")


def is_inside(name: object) -> bool:
    """Whether a file name from a record stays in the folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def names_in(record: Any) -> Iterable[str]:
    """The file names that a record lists, those that stay in the folder."""
    files = record.get("files") if isinstance(record, Mapping) else None
    return [name for name in files if is_inside(name)] if isinstance(files, list) else []
