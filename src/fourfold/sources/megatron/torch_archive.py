# SPDX-License-Identifier: Apache-2.0
"""Finds the bytes of a tensor in the zip archive that `torch.save` wrote, to be read in place.

    __0_0.distcp   [zip: data.pkl, data/0] [zip: data.pkl, data/0] …      one zip for each chunk

The checkpoint's metadata says where each zip begins and ends. In a zip, `data.pkl` holds the
tensor's dtype, shape and strides; `data/0` holds its elements and is never compressed.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fourfold.sources.megatron.safe_pickle import TENSOR, Stored, damaged, read_pickle
from fourfold.storage.safetensors_header import BITS

MAX_PICKLE_BYTES = 1 << 28
"""A longer `data.pkl` is not read: it would be larger than any training arguments."""

LOCAL_HEADER = struct.Struct("<26xHH")
"""The header of a file in a zip, which its name and an extra field follow: the lengths of both."""

READ_BYTES = 1 << 16
"""The directory at a zip's end is searched in reads of this size."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a stored tensor, in the zip at bytes `start:stop` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def holder(self) -> str:
        return self.file.name


class Archive(NamedTuple):
    """The content of one zip."""

    pickle: bytes
    storages: dict[str, tuple[int, int]]
    """Key → position in the file, and size in bytes."""


class _Window(io.RawIOBase):
    """Bytes `start:start + size` of a descriptor, as a file for `zipfile`."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size, self._at = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._descriptor, count, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_archive(descriptor: int, file: Path, start: int, stop: int, what: str) -> Archive:
    """Read the zip at bytes `start:stop` of an open file. `what` names it in messages.

    Raises:
        SourceError: These bytes are not a zip that `torch.save` wrote.
        OSError: The file cannot be read.
    """
    window = io.BufferedReader(_Window(descriptor, start, stop - start), READ_BYTES)
    try:
        with zipfile.ZipFile(window) as archive:
            return _read_entries(archive, descriptor, start, stop)
    except OSError:
        raise
    except Exception as error:  # zipfile raises errors of many classes for damaged bytes
        raise damaged(file, what, error) from None


def _read_entries(archive: zipfile.ZipFile, descriptor: int, start: int, stop: int) -> Archive:
    pickle, storages = b"", {}
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if name == "data.pkl":
            if entry.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"data.pkl has {entry.file_size:,} bytes")
            pickle = archive.read(entry)
        elif name.startswith("data/"):
            header = os.pread(descriptor, LOCAL_HEADER.size, start + entry.header_offset)
            position = start + entry.header_offset + LOCAL_HEADER.size
            position += sum(LOCAL_HEADER.unpack(header))
            if entry.compress_type != zipfile.ZIP_STORED or position + entry.file_size > stop:
                raise ValueError(f"{name} is compressed, or ends outside of the zip")
            storages[name.removeprefix("data/")] = position, entry.file_size
    if not pickle:
        raise ValueError("no data.pkl in it")
    return Archive(pickle, storages)


def find_elements(descriptor: int, chunk: Chunk, dtype: str, what: str) -> int:
    """Return the position in the file of a chunk's elements, which lie row-major without gaps.

    `dtype` is that of the metadata, as safetensors names it; `what` names the chunk in messages.

    Raises:
        SourceError: The zip holds another tensor than the metadata says.
        OSError: The file cannot be read.
    """
    archive = read_archive(descriptor, chunk.file, chunk.start, chunk.stop, what)
    tensor = read_pickle(archive.pickle, chunk.file, TENSOR)
    if isinstance(tensor, Stored) and type(tensor).__name__ == "parameter" and tensor.args:
        tensor = tensor.args[0]
    match tensor:
        case Stored(
            args=(
                ("storage", str(stored_dtype), str(key), *_),
                int(skipped),
                tuple(shape),
                tuple(strides),
                *_,
            )
        ) if key in archive.storages:
            pass
        case _:
            raise damaged(chunk.file, what, "it holds no plain tensor")
    if (stored_dtype, shape) != (dtype, chunk.sizes) or not _is_row_major(shape, strides):
        raise damaged(
            chunk.file,
            what,
            f"it holds {stored_dtype} {list(shape)} with strides {list(strides)}, the metadata "
            f"says {dtype} {list(chunk.sizes)}",
        )
    position, nbytes = archive.storages[key]
    element = BITS[dtype] // 8
    if skipped < 0 or (skipped + math.prod(shape)) * element > nbytes:
        raise damaged(chunk.file, what, f"its shape needs more than its {nbytes:,} bytes")
    return position + skipped * element


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if elements follow each other. The stride of a dimension of size 1 does not matter."""
    return len(strides) == len(shape) and all(
        size == 1 or stride == math.prod(shape[dim + 1 :])
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )
