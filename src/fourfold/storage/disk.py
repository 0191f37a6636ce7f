"""Free space on the output's disk, and the messages of errors that the disk answers."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from fourfold.errors import OutputError, ResourceError
from fourfold.storage.units import size


def check_disk(folder: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes in `folder`, which need not exist yet.

    Raises:
        ResourceError: It has not.
    """
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


def output_error(path: Path, error: OSError) -> OutputError:
    """Return the error for a file of the output that the system could not write."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "The disk is full: free some room, or write to another one."
        case errno.EACCES | errno.EROFS | errno.EPERM:
            remedy = "The folder cannot be written: change its permissions, or choose another."
        case _:
            remedy = f"{error.strerror or error}."
    return OutputError(f"{path}: {remedy}")
