"""Reads boxes of stored tensors from the chunks that hold them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

from fourfold.errors import SourceError
from fourfold.sources.megatron.box_index import Box, BoxIndex, contiguous
from fourfold.sources.megatron.metadata import StoredCheckpoint, StoredTensor
from fourfold.sources.megatron.torch_archive import Chunk, find_elements
from fourfold.storage.fingerprints import START_AGAIN, Stamps, opened, read_error
from fourfold.storage.open_files import OpenFiles
from fourfold.storage.safetensors_header import BITS
from fourfold.storage.source import Bytes

READ_BYTES = 1 << 22
"""Elements are read in pieces of about this size, so that what is not contiguous in the buffer
needs little memory."""

HINTED_BYTES = 1 << 26
"""Larger chunks are not read ahead: a slab is a small part of them."""


class ChunkReader:
    """The tensors of a `torch_dist` checkpoint. Safe for many threads."""

    def __init__(self, checkpoint: StoredCheckpoint, stamps: Stamps) -> None:
        self.tensors = checkpoint.tensors
        self._stamps = stamps
        self._files = OpenFiles(self._open)
        self._indexes: dict[str, BoxIndex[Chunk]] = {}
        self._positions: dict[tuple[Path, int], int] = {}
        self._lock = threading.Lock()

    def check(self, key: str) -> None:
        """Raise `SourceError` if chunks of a tensor overlap, or some are missing."""
        if key not in self._indexes:
            tensor = self.tensors[key]
            index = BoxIndex(key, tensor.shape, tensor.chunks)
            with self._lock:
                self._indexes[key] = index

    def read(self, key: str, box: Box, out: Bytes) -> None:
        """Fill `out` with the elements of a box of a tensor, row-major."""
        self.check(key)
        tensor = self.tensors[key]
        element = BITS[tensor.dtype] // 8
        for chunk, inner, view in self._indexes[key].targets(box, element, out):
            begin = self._position(tensor, chunk)
            for piece, first in _runs(inner, chunk.sizes):
                with contiguous(view[piece]) as buffer:
                    self._read(tensor, chunk, begin + first * element, buffer)

    def will_need(self, key: str, box: Box) -> None:
        """Say that a box will be read soon, so that the disk can read ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        self.check(key)
        with suppress(OSError, SourceError):  # reading will report what is wrong with a file
            for _, chunk in self._indexes[key].cells(box):
                length = chunk.stop - chunk.start
                if length <= HINTED_BYTES:
                    with self._files.descriptor(chunk.file) as descriptor:
                        os.posix_fadvise(descriptor, chunk.start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close every open file."""
        self._files.close()

    def _position(self, tensor: StoredTensor, chunk: Chunk) -> int:
        """The position in the file of a chunk's first element."""
        place = chunk.file, chunk.start
        if place not in self._positions:
            what = f"{tensor.key} at {list(chunk.offsets)}"
            try:
                with self._files.descriptor(chunk.file) as descriptor:
                    position = find_elements(descriptor, chunk, tensor.dtype, what)
            except OSError as error:
                raise read_error(chunk.file, error, what) from error
            with self._lock:
                self._positions[place] = position
        return self._positions[place]

    def _read(self, tensor: StoredTensor, chunk: Chunk, position: int, out: Bytes) -> None:
        view, done = out.data, 0
        try:
            with self._files.descriptor(chunk.file) as descriptor:
                while done < len(view):
                    count = os.preadv(descriptor, [view[done:]], position + done)
                    if count == 0:
                        raise SourceError(
                            f"{chunk.file}: ended while {tensor.key} was read. {START_AGAIN}"
                        )
                    done += count
        except OSError as error:
            raise read_error(chunk.file, error, tensor.key) from error

    def _open(self, file: Path) -> int:
        with opened(file) as (handle, status):
            self._stamps.same(file, status)
            return os.dup(handle.fileno())


def _runs(box: Box, sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int | slice, ...], int]]:
    """Divide a box of a chunk into runs of elements that follow each other in the chunk.

    Yields each run's index in the box, and the number of its first element in the chunk.
    """
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    # The last dimension that is not whole: rows of it follow each other.
    split = max((dim for dim, span in enumerate(box) if span != (0, sizes[dim])), default=0)
    if not box:
        yield (), 0
        return
    start, stop = box[split]
    step = max(1, READ_BYTES // (strides[split] * 8))
    for index in product(*(range(last - first) for first, last in box[:split])):
        outer = sum((box[dim][0] + i) * strides[dim] for dim, i in enumerate(index))
        for at in range(start, stop, step):
            rows = slice(at - start, min(stop, at + step) - start)
            yield (*index, rows), outer + at * strides[split]
