# SPDX-License-Identifier: Apache-2.0
"""Write files so that each is whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fourfold.storage.disk import writing
from fourfold.storage.fingerprints import reading

COPY_BYTES = 1 << 22
"""Files are copied in pieces of this size."""

PARTIAL = ".partial"
"""The suffix of files that are not finished."""


def partial_of(path: Path) -> Path:
    """Return the temporary name under which a file is written."""
    return path.with_name(f".{path.name}{PARTIAL}")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it gets its name and replaces an earlier one at the end."""
    partial = partial_of(path)
    with writing(path):
        with partial.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)


class FileWriter:
    """Writes the files of one folder, each of them whole or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[str] = []
        """Files that were begun, in this order; some of them may not exist."""

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object, indented."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text in UTF-8."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        with self._replacing(name) as handle:
            handle.write(data)

    def copy(self, source: Path, relative: Path, name: str | None = None) -> None:
        """Copy one file of the folder `source`, under the same path or as `name`.

        Raises `SourceError` if it cannot be read.
        """
        file = source / relative
        with reading(file):
            original = file.open("rb")

        def read() -> bytes:
            with reading(file):
                return original.read(COPY_BYTES)

        with original, self._replacing(name or str(relative)) as copy:
            while piece := read():
                copy.write(piece)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[BinaryIO]:
        path = self.folder / name
        self.written.append(name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as handle:
            yield handle
