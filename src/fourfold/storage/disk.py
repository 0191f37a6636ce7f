# SPDX-License-Identifier: Apache-2.0
"""Free space on the output's disk, and the messages of errors that the disk answers."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourfold.errors import OutputError, ResourceError
from fourfold.storage.units import size


def check_disk(folder: Path, needed: int) -> None:
    """Raise `ResourceError` if the disk of `folder`, which need not exist, lacks `needed` bytes."""
    free = free_bytes(folder)
    if needed > free:
        raise ResourceError(
            f"{folder}: {size(needed)} are needed, {size(free)} are free on that disk. "
            "Free some room, or write to another one."
        )


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system in which `folder` lies or will lie."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, an `OSError` becomes the `OutputError` of a file that could not be written."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                remedy = "The disk is full: free some room, or write to another one."
            case errno.EACCES | errno.EROFS | errno.EPERM:
                remedy = "The folder cannot be written: change its permissions, or choose another."
            case _:
                remedy = f"{error.strerror or error}."
        raise OutputError(f"{path}: {remedy}") from error
