# SPDX-License-Identifier: Apache-2.0
"""Git LFS pointers: the small texts that `git clone` leaves in place of large files."""

from __future__ import annotations

from pathlib import Path

from fourfold.errors import SourceError

BEGINNINGS = (b"version https://git-lfs.github.com/", b"version https://hawser.github.com/")


def is_pointer(beginning: bytes) -> bool:
    """True if a file that begins so is a pointer."""
    return beginning.startswith(BEGINNINGS)


def check_no_pointer(file: Path, beginning: bytes) -> None:
    """Raise `SourceError` if a file that begins so is a pointer."""
    if is_pointer(beginning):
        raise SourceError(
            f"{file}: a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder."
        )
