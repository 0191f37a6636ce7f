# SPDX-License-Identifier: Apache-2.0
"""Safetensors files that are written in any order, and the digests of finished ones.

A shard's header follows from the plan, so the position of every tensor is known before a byte is
computed, and many threads write straight to their places.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

import xxhash

from fourfold._version import __version__
from fourfold.storage.atomic import partial_of, sync
from fourfold.storage.disk import writing
from fourfold.storage.open_files import write_full
from fourfold.storage.safetensors_header import build_header, nbytes_of

METADATA = {"format": "pt", "producer": f"fourfold {__version__}"}


class ShardFile:
    """One safetensors file while it is filled. `write` may be called from many threads."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Create the file under a temporary name, in full size and with its header."""
        self.path = path
        header, self._begins = build_header(tensors, METADATA)
        nbytes = len(header) + sum(nbytes_of(*spec) for spec in tensors.values())
        with writing(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor = os.open(partial_of(path), flags, 0o644)
            os.ftruncate(self._descriptor, nbytes)
        self._pwrite(header, 0)

    def write(self, name: str, data: Any, offset: int = 0) -> None:
        """Write bytes of the tensor `name`, from `offset` bytes after its beginning."""
        self._pwrite(data, self._begins[name] + offset)

    def _pwrite(self, data: Any, position: int) -> None:
        with writing(self.path):
            write_full(self._descriptor, memoryview(data).cast("B"), position)

    def finish(self) -> str:
        """Flush the file to the disk and give it its name; return the digest of its bytes."""
        with writing(self.path):
            with open(self._descriptor, "rb", closefd=False) as file:
                digest = file_digest(file, xxhash.xxh3_128).hexdigest()
            os.fsync(self._descriptor)
            self.close()
            partial_of(self.path).replace(self.path)
            sync(self.path.parent)
        return digest

    def close(self) -> None:
        """Close the file; if it is not finished, it keeps its temporary name."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def digest_of_file(path: Path) -> str | None:
    """Return the XXH3 digest of a file's bytes; None for a link and for what cannot be read."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(path, "rb", opener=lambda file, mode: os.open(file, mode | flags)) as file:
            return file_digest(file, xxhash.xxh3_128).hexdigest()
    except OSError:
        return None


def index_of(shards: Iterable[tuple[str, Mapping[str, Any]]], total_size: int) -> dict[str, Any]:
    """Return the contents of model.safetensors.index.json: `shards` are file names and tensors."""
    weight_map = {name: file for file, tensors in shards for name in tensors}
    return {
        "metadata": {"total_size": total_size},
        "weight_map": dict(sorted(weight_map.items())),
    }
