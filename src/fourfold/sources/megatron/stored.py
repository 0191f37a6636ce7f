"""Reads parts of stored tensors: whatever box is wanted, from whatever chunks hold it."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.errors import SourceError
from fourfold.sources.megatron.boxes import Box, Boxes
from fourfold.sources.megatron.chunks import Chunk, locate
from fourfold.sources.megatron.metadata import StoredCheckpoint, StoredTensor
from fourfold.storage.fingerprints import START_AGAIN, Stamps, opened, read_error
from fourfold.storage.open_files import OpenFiles, read_full
from fourfold.storage.safetensors_header import BITS

PIECE_BYTES = 1 << 22
"""What is not read in place is read in pieces of this size."""

HINTED_BYTES = 1 << 26
"""The disk is told of chunks up to this size: slabs of larger ones lie anywhere in them."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class StoredTensors:
    """The tensors of a `torch_dist` directory. Safe for many threads."""

    def __init__(self, checkpoint: StoredCheckpoint, stamps: Stamps) -> None:
        self.tensors = checkpoint.tensors
        self._stamps = stamps
        self._files = OpenFiles(self._open)
        self._boxes: dict[str, Boxes[Chunk]] = {}
        self._begins: dict[tuple[Path, int], int] = {}
        self._lock = threading.Lock()

    def check(self, key: str) -> None:
        """Raise `SourceError` where chunks of a tensor overlap, or some are missing."""
        if key not in self._boxes:
            tensor = self.tensors[key]
            boxes = Boxes(key, tensor.shape, tensor.chunks)
            with self._lock:
                self._boxes[key] = boxes

    def read(self, key: str, box: Box, out: Bytes) -> None:
        """Fill `out` with the elements of `box`, row-major."""
        self.check(key)
        tensor = self.tensors[key]
        size = BITS[tensor.dtype] // 8
        shape = [stop - start for start, stop in box]
        whole = out.reshape(*shape, size)
        for cell, chunk in self._boxes[key].cells(box):
            inner = tuple(
                slice(start - first, stop - first)
                for (start, stop), (first, _) in zip(cell, box, strict=True)
            )
            self._copy(tensor, chunk, cell, whole[inner])

    def will_need(self, key: str, box: Box) -> None:
        """A hint that these elements will be read soon; of large chunks nothing is said."""
        if not hasattr(os, "posix_fadvise"):
            return
        self.check(key)
        with suppress(OSError, SourceError):  # what is wrong with a file is told when it is read
            for _, chunk in self._boxes[key].cells(box):
                length = chunk.stop - chunk.start
                if length <= HINTED_BYTES:
                    with self._files.descriptor(chunk.file) as file:
                        os.posix_fadvise(file, chunk.start, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Give back every file that is open."""
        self._files.close()

    def _copy(self, tensor: StoredTensor, chunk: Chunk, cell: Box, out: Bytes) -> None:
        """A cell of one chunk into `out`, whose last dimension is an element's bytes."""
        begin = self._begin(tensor, chunk)
        size = BITS[tensor.dtype] // 8
        inner = [(a - at, b - at) for (a, b), at in zip(cell, chunk.offsets, strict=True)]
        for index, first, length in _runs(inner, chunk.sizes):
            target = out[index]
            place = begin + first * size
            if target.flags.c_contiguous:
                self._read(tensor, chunk, place, target.reshape(-1))
                continue
            buffer = np.empty(length * size, dtype=np.uint8)
            self._read(tensor, chunk, place, buffer)
            target[...] = buffer.reshape(target.shape)

    def _begin(self, tensor: StoredTensor, chunk: Chunk) -> int:
        """The first byte of a chunk's elements in its file."""
        place = chunk.file, chunk.start
        if place not in self._begins:
            what = f"{tensor.key} at {list(chunk.offsets)}"
            try:
                with self._files.descriptor(chunk.file) as descriptor:
                    begin = locate(
                        lambda count, at: os.pread(descriptor, count, at), chunk, tensor.dtype, what
                    )
            except OSError as error:
                raise read_error(chunk.file, error, what) from error
            with self._lock:
                self._begins[place] = begin
        return self._begins[place]

    def _read(self, tensor: StoredTensor, chunk: Chunk, position: int, out: Bytes) -> None:
        view = out.data.cast("B")
        try:
            with self._files.descriptor(chunk.file) as descriptor:
                count = read_full(descriptor, view, position)
        except OSError as error:
            raise read_error(chunk.file, error, tensor.key) from error
        if count < len(view):
            raise SourceError(f"{chunk.file}: ended while {tensor.key} was read. {START_AGAIN}")

    def _open(self, file: Path) -> int:
        with opened(file) as (handle, status):
            self._stamps.same(file, status)
            return os.dup(handle.fileno())


def _runs(
    cell: list[tuple[int, int]], sizes: tuple[int, ...]
) -> Iterator[tuple[tuple[int | slice, ...], int, int]]:
    """A cell of a chunk as runs of elements that follow each other there.

    Of each: its index in the cell, its first element in the chunk, how many it has.
    """
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    split = max((dim for dim, span in enumerate(cell) if span != (0, sizes[dim])), default=0)
    if not cell:
        yield (), 0, 1
        return
    first, last = cell[split]
    run = strides[split]
    step = max(1, PIECE_BYTES // max(1, run * 8))
    for index in product(*(range(b - a) for a, b in cell[:split])):
        outer = sum((cell[dim][0] + i) * strides[dim] for dim, i in enumerate(index))
        for at in range(first, last, step):
            end = min(last, at + step)
            yield (*index, slice(at - first, end - first)), outer + at * run, (end - at) * run
