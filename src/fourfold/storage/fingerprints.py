"""What a source's files looked like when they were read, so that a change is seen.

A file is opened once, its status taken from the open descriptor and its contents read from the
same: no other file can slip in between. Later only equality counts, of size, time of modification
and inode, never which time is earlier: clocks may be skewed, and times lie in the future or at 0.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fourfold.errors import SourceChangedError, SourceError

START_AGAIN = "Start again with a source that stays as it is."


@dataclass(frozen=True)
class FileStamp:
    """What a file looked like, in numbers that a later run can compare."""

    size: int
    mtime_ns: int
    digest: str
    """blake2b, 16 bytes in hex: of a safetensors file's header, of all of config.json and of the
    index; empty for other files."""


class Stamps:
    """The files that were read, as they were. `check` and `same` are safe for many threads."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[FileStamp, int]] = {}

    def add(self, file: Path, status: os.stat_result, contents: bytes | None = None) -> None:
        """Remember a file by its status; `contents` are digested."""
        digest = "" if contents is None else hashlib.blake2b(contents, digest_size=16).hexdigest()
        self._seen[file] = FileStamp(status.st_size, status.st_mtime_ns, digest), status.st_ino

    def relative_to(self, folder: Path) -> Mapping[str, FileStamp]:
        """The stamps by names relative to `folder`, sorted."""
        stamps = ((file.relative_to(folder).as_posix(), seen[0]) for file, seen in self)
        return dict(sorted(stamps))

    def __iter__(self) -> Iterator[tuple[Path, tuple[FileStamp, int]]]:
        return iter(self._seen.items())

    def check(self) -> None:
        """Raise `SourceError` where a file is gone, or is not as it was."""
        for file in self._seen:
            try:
                self.same(file, file.stat())
            except OSError as error:
                raise read_error(file, error) from error

    def same(self, file: Path, status: os.stat_result) -> None:
        """Raise `SourceError` where `status`, of a file that was read, is not as it was."""
        stamp, inode = self._seen[file]
        if status.st_size != stamp.size:
            how = f"size {stamp.size:,} → {status.st_size:,} bytes"
        elif status.st_mtime_ns != stamp.mtime_ns:
            how = "modified meanwhile"
        elif status.st_ino != inode:
            how = "replaced meanwhile"
        else:
            return
        raise SourceChangedError(f"{file}: changed while it was read ({how}). {START_AGAIN}")


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file, open for reading, and its status: never a pipe, which would wait for ever.

    Raises `SourceError` for what is no regular file, `OSError` as `open` does.
    """
    _check_regular(file, file.stat())  # before it is opened: devices may act on that
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    with open(descriptor, "rb") as handle:
        status = os.fstat(descriptor)
        _check_regular(file, status)
        os.set_blocking(descriptor, True)
        yield handle, status


def _check_regular(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{file}: is no regular file. Download the checkpoint again.")


def read_error(file: Path, error: OSError, key: str | None = None) -> SourceError:
    """What went wrong with a file of an open source, or with a tensor in it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SourceError(f"{file}: disappeared while it was read. {START_AGAIN}")
    what = "" if key is None else f"{key} "
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            remedy = "Raise the limit of open files (ulimit -n)"
        case errno.EACCES | errno.EPERM:
            remedy = "Change its permissions"
        case _:
            remedy = "Check the disk or the network that it lies on"
    cause = error.strerror or error
    return SourceError(f"{file}: {what}cannot be read: {cause}. {remedy}, then start again.")
