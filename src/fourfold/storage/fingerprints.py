# SPDX-License-Identifier: Apache-2.0
"""How a source's files looked when they were read, so that a change is noticed.

Size and time of modification are compared, and only for equality: clocks may be wrong. Inodes are
not: network and FUSE file systems renumber them. A file's status is taken from the descriptor that
its contents are read from, so no other file can slip in between.
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
    """A file's size, time of modification and digest, which a later run can compare."""

    size: int
    mtime_ns: int
    digest: str
    """blake2b, 16 bytes in hex: of a safetensors file's header, of all of config.json and of the
    index; empty for other files."""


class Stamps:
    """The stamps of all files that were read. `check` and `same` are safe for many threads."""

    def __init__(self) -> None:
        self._stamps: dict[Path, FileStamp] = {}

    def add(self, file: Path, status: os.stat_result, contents: bytes | None = None) -> None:
        """Remember a file by its status, and by the digest of `contents`."""
        digest = "" if contents is None else hashlib.blake2b(contents, digest_size=16).hexdigest()
        self._stamps[file] = FileStamp(status.st_size, status.st_mtime_ns, digest)

    def relative_to(self, folder: Path) -> Mapping[str, FileStamp]:
        """Return the stamps by names relative to `folder`, sorted."""
        stamps = {file.relative_to(folder).as_posix(): x for file, x in self._stamps.items()}
        return dict(sorted(stamps.items()))

    def check(self) -> None:
        """Raise `SourceError` if a file is gone, or has changed."""
        for file in self._stamps:
            with reading(file):
                self.same(file, file.stat())

    def same(self, file: Path, status: os.stat_result) -> None:
        """Raise `SourceChangedError` if the present `status` of a file is not as it was."""
        stamp = self._stamps[file]
        if status.st_size != stamp.size:
            how = f"size {stamp.size:,} → {status.st_size:,} bytes"
        elif status.st_mtime_ns != stamp.mtime_ns:
            how = "modified meanwhile"
        else:
            return
        raise SourceChangedError(f"{file}: changed while it was read ({how}). {START_AGAIN}")


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a regular file for reading; yield it and its status. A pipe would block forever.

    Raises:
        SourceError: It is not a regular file.
        OSError: As `open` does.
    """
    _check_regular(file, file.stat())  # opening a device can have effects
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as handle:
        status = os.fstat(descriptor)
        _check_regular(file, status)
        os.set_blocking(descriptor, True)
        yield handle, status


def _check_regular(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{file}: is not a regular file. Download the checkpoint again.")


@contextmanager
def reading(file: Path, key: str | None = None) -> Iterator[None]:
    """Within, an `OSError` becomes the `SourceError` of a file, or of the tensor `key` in it."""
    try:
        yield
    except OSError as error:
        raise read_error(file, error, key) from error


def read_error(file: Path, error: OSError, key: str | None = None) -> SourceError:
    """Return the error for a file of an open source, or for the tensor `key` in it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SourceError(f"{file}: disappeared while it was read. {START_AGAIN}")
    tensor = "" if key is None else f"{key} "
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            remedy = "Raise the limit of open files (ulimit -n)"
        case errno.EACCES | errno.EPERM:
            remedy = "Change its permissions"
        case _:
            remedy = "Check the disk or network it is on"
    cause = error.strerror or error
    return SourceError(f"{file}: {tensor}cannot be read: {cause}. {remedy}, then start again.")
