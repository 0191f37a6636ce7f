# SPDX-License-Identifier: Apache-2.0
"""Reads boxes of stored tensors from the chunks that hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from fourfold.sources.megatron.box_index import Box, BoxIndex, contiguous
from fourfold.sources.megatron.metadata import StoredCheckpoint, StoredTensor
from fourfold.sources.megatron.torch_archive import Chunk, find_elements
from fourfold.storage.fingerprints import Stamps, read_error
from fourfold.storage.safetensors_header import BITS
from fourfold.storage.source import Bytes
from fourfold.storage.source_files import SourceFiles

READ_BYTES = 1 << 22
"""Elements are read in pieces of about this size, so that what is not contiguous in the buffer
needs little memory."""

HINTED_BYTES = 1 << 26
"""Larger chunks are not read ahead: a slab is a small part of them."""


class ChunkReader:
    """The tensors of a `torch_dist` checkpoint. Safe for many threads."""

    def __init__(self, checkpoint: StoredCheckpoint, stamps: Stamps) -> None:
        self.tensors = checkpoint.tensors
        self._files = SourceFiles(stamps)
        self._indexes: dict[str, BoxIndex[Chunk]] = {}
        self._positions: dict[tuple[Path, int], int] = {}

    def index(self, key: str) -> BoxIndex[Chunk]:
        """The chunks of a tensor; raises `SourceError` if they overlap, or some are missing."""
        if key not in self._indexes:
            tensor = self.tensors[key]
            self._indexes[key] = BoxIndex(key, tensor.shape, tensor.chunks)
        return self._indexes[key]

    def read(self, key: str, box: Box, out: Bytes) -> None:
        """Fill `out` with the elements of a box of a tensor, row-major."""
        tensor = self.tensors[key]
        element = BITS[tensor.dtype] // 8
        for chunk, inner, view in self.index(key).targets(box, element, out):
            begin = self._position(tensor, chunk)
            for piece, first in _runs(inner, chunk.sizes):
                with contiguous(view[piece]) as buffer:
                    self._files.read(chunk.file, begin + first * element, buffer.data, key)

    def will_need(self, key: str, box: Box) -> None:
        """Say that a box will be read soon, so that the disk can read ahead."""
        for _, chunk in self.index(key).cells(box):
            if chunk.stop - chunk.start <= HINTED_BYTES:
                self._files.will_need(chunk.file, chunk.start, chunk.stop)

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
            self._positions[place] = position
        return self._positions[place]


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
