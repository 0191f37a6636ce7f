# SPDX-License-Identifier: Apache-2.0
"""The open files of a checkpoint, which must stay as they were when it was opened."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fourfold.errors import SourceError
from fourfold.storage.fingerprints import START_AGAIN, Stamps, opened, reading
from fourfold.storage.open_files import OpenFiles, read_full


class SourceFiles(OpenFiles):
    """Files that are opened when they are first read. Safe for many threads."""

    def __init__(self, stamps: Stamps) -> None:
        """`stamps` are the files' states when the checkpoint was opened."""
        super().__init__(self._open_unchanged)
        self._stamps = stamps

    def read(self, file: Path, position: int, out: memoryview, name: str) -> None:
        """Fill `out` with bytes of a file from `position` on, for the tensor `name`.

        Raises:
            SourceError: The file has changed, is too short, or cannot be read.
        """
        with reading(file, name), self.descriptor(file) as descriptor:
            count = read_full(descriptor, out, position)
        if count < len(out):
            raise SourceError(f"{file}: ended while {name} was read. {START_AGAIN}")

    def will_need(self, file: Path, start: int, stop: int) -> None:
        """Ask the disk to read bytes `start:stop` of a file ahead, if the system can do that."""
        if hasattr(os, "posix_fadvise"):
            # What is wrong with a file is reported when it is read.
            with suppress(OSError, SourceError), self.descriptor(file) as descriptor:
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _open_unchanged(self, file: Path) -> int:
        with opened(file) as (handle, status):
            self._stamps.same(file, status)
            return os.dup(handle.fileno())
