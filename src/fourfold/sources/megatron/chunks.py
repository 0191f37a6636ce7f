"""Where the bytes of one chunk lie: a chunk is a tensor that `torch.save` wrote into a file.

    __0_0.distcp   [zip: data.pkl, data/0] [zip: data.pkl, data/0] …      one zip for each chunk

The metadata says where each zip begins and ends. Its `data.pkl` says dtype, shape and strides, and
`data/0`, which is never compressed, are the elements: they are read in place, a slab at a time.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.sources.megatron.pickles import TENSOR, Stored, read_pickle
from fourfold.storage.safetensors_header import BITS

MAX_PICKLE_BYTES = 1 << 20
"""The head of a single tensor is no longer."""

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a file in a zip: its mark, and how long its name and its extra field are."""

LOCAL_MARK = b"PK\x03\x04"

READ_AT_ONCE = 1 << 16
"""A zip's end is looked for in pieces of this size."""

Pread = Callable[[int, int], bytes]
"""Bytes of a file: how many, from where."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a stored tensor, and the zip that holds it: bytes `start:stop` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def place(self) -> str:
        return self.file.name


@dataclass(frozen=True, slots=True)
class Archive:
    """What `torch.save` wrote: its pickle, and where its storages lie in the file."""

    pickle: bytes
    storages: dict[str, tuple[int, int]]
    """Key → first byte in the file, and how many."""


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, for `zipfile`."""

    def __init__(self, pread: Pread, start: int, stop: int) -> None:
        self._pread, self._start, self._size, self._at = pread, start, stop - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = self._pread(count, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_archive(pread: Pread, file: Path, start: int, stop: int, what: str) -> Archive:
    """The zip in bytes `start:stop` of a file. Raises `SourceError` where it is none, or broken."""
    try:
        window = io.BufferedReader(_Window(pread, start, stop), READ_AT_ONCE)
        with zipfile.ZipFile(window) as archive:
            return _read_archive(archive, pread, start, stop)
    except SourceError:
        raise
    except OSError:
        raise
    except Exception as error:  # zipfile raises many things for bytes that are no zip
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        raise damaged(file, what, cause) from None


def _read_archive(archive: zipfile.ZipFile, pread: Pread, start: int, stop: int) -> Archive:
    head, storages = b"", {}
    for entry in archive.infolist():
        _, _, inside = entry.filename.partition("/")
        if inside == "data.pkl":
            if entry.file_size > MAX_PICKLE_BYTES << 8:
                raise ValueError(f"data.pkl of {entry.file_size:,} bytes")
            head = archive.read(entry)
        elif inside == "byteorder":
            if archive.read(entry) != b"little":
                raise ValueError("its bytes are not little-endian")
        elif inside.startswith("data/"):
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{inside} is compressed")
            local = start + entry.header_offset
            mark, name, extra = LOCAL_HEADER.unpack(pread(LOCAL_HEADER.size, local))
            first = local + LOCAL_HEADER.size + name + extra
            if mark != LOCAL_MARK or first + entry.file_size > stop:
                raise ValueError(f"{inside} does not lie inside")
            storages[inside.removeprefix("data/")] = first, entry.file_size
    if not head:
        raise ValueError("no data.pkl in it")
    return Archive(head, storages)


def locate(pread: Pread, chunk: Chunk, dtype: str, what: str) -> int:
    """The first byte of a chunk's elements in its file; row-major, without gaps.

    Raises `SourceError` where the zip holds another tensor than the metadata says.
    """
    archive = read_archive(pread, chunk.file, chunk.start, chunk.stop, what)
    if len(archive.pickle) > MAX_PICKLE_BYTES:
        raise damaged(chunk.file, what, f"a head of {len(archive.pickle):,} bytes")
    tensor = read_pickle(archive.pickle, chunk.file, TENSOR)
    if type(tensor).__name__ == "parameter" and isinstance(tensor, Stored) and tensor.args:
        tensor = tensor.args[0]
    match tensor:
        case Stored(
            args=(("storage", str(kind), str(key), _, int()), int(skipped), shape, strides, *_)
        ) if type(tensor).__name__ == "tensor" and key in archive.storages:
            pass
        case _:
            raise damaged(chunk.file, what, "it holds no plain tensor")
    if kind not in BITS or kind != dtype:
        raise damaged(chunk.file, what, f"it holds {kind}, the metadata says {dtype}")
    if tuple(shape) != chunk.sizes or not _is_row_major(chunk.sizes, tuple(strides)):
        raise damaged(
            chunk.file,
            what,
            f"it holds {list(shape)} with strides {list(strides)}, the metadata says "
            f"{list(chunk.sizes)}",
        )
    first, nbytes = archive.storages[key]
    size = BITS[dtype] // 8
    if skipped < 0 or (skipped + math.prod(chunk.sizes)) * size > nbytes:
        raise damaged(chunk.file, what, f"it holds {nbytes:,} bytes, its shape needs more")
    return first + skipped * size


def _is_row_major(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements follow each other; where a dimension has one, its stride says nothing."""
    if len(strides) != len(sizes):
        return False
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def damaged(file: Path, what: str, cause: str) -> SourceError:
    """A chunk that is not what the metadata says."""
    return SourceError(f"{file}: {what}: damaged ({cause}). Copy the checkpoint again.")
