"""What a `torch_dist` directory holds, from its `.metadata`: tensors, their chunks, other objects.

    .metadata          names, global shapes and dtypes; of each chunk its box, file and bytes
    __0_0.distcp …     the chunks
    common.pt          what is the same on all ranks: arguments, the iteration. May be absent

Tensor, pipeline and expert parallelism are undone in the global shapes already: a chunk is what one
rank held of a tensor.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fourfold.errors import SourceError
from fourfold.sources.megatron.chunks import Chunk
from fourfold.sources.megatron.pickles import METADATA, Stored, read_pickle
from fourfold.storage.fingerprints import Stamps, opened, read_error
from fourfold.storage.names import MEGATRON
from fourfold.storage.safetensors_header import BITS, MAX_DIMENSIONS, shown

METADATA_FILE, LATEST = MEGATRON
COPY_AGAIN = "Copy the checkpoint again."

_LIMIT = 1 << 62
_OTHER_BACKENDS = {
    "mp_rank_*": "the old `torch` format, one file for each rank",
    "*.zarray": "the `zarr` format",
    "__*/.zarray": "the `zarr` format",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint, whole: `dtype` as safetensors calls it, and where it lies."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredCheckpoint:
    """Everything that the metadata lists."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    objects: tuple[str, ...]
    """Keys of what is no tensor."""


def iteration_folder(folder: Path) -> Path | None:
    """Where the metadata lies: `folder`, or that of its latest iteration; None for no Megatron's.

    Raises `SourceError` for a checkpoint of Megatron in another format.
    """
    if os.path.lexists(folder / METADATA_FILE):
        return folder
    if (folder / LATEST).is_file():
        inside = folder / _name_of_latest(folder / LATEST)
        if os.path.lexists(inside / METADATA_FILE):
            return inside
        _refuse_other(inside)
        raise SourceError(f"{inside}: no {METADATA_FILE}, though {LATEST} names it. {COPY_AGAIN}")
    return None


def _name_of_latest(file: Path) -> str:
    try:
        with opened(file) as (handle, _):
            text = handle.read(64).decode(errors="replace").strip()
    except OSError as error:
        raise read_error(file, error) from error
    if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
        raise SourceError(f"{file}: says {shown(text)}, which is no iteration. {COPY_AGAIN}")
    return text if text == "release" else f"iter_{int(text):07d}"


def _refuse_other(folder: Path) -> None:
    for pattern, what in _OTHER_BACKENDS.items():
        if folder.is_dir() and any(folder.glob(pattern)):
            raise SourceError(
                f"{folder}: a Megatron checkpoint in {what}. Save it with --ckpt-format torch_dist."
            )


def read_metadata(folder: Path, stamps: Stamps) -> StoredCheckpoint:
    """What lies in a `torch_dist` directory; `stamps` remember its files. Reads no tensor.

    Raises `SourceError` where the metadata names what it must not, contradicts itself, or a file
    is missing or too short.
    """
    file = folder / METADATA_FILE
    try:
        with opened(file) as (handle, status):
            raw = handle.read()
    except OSError as error:
        raise read_error(file, error) from error
    stamps.add(file, status, raw)
    reader = _Metadata(folder, read_pickle(raw, file, METADATA))
    found = StoredCheckpoint(folder, dict(reader.tensors()), tuple(reader.objects()))
    _check_files(found, stamps)
    return found


class _Metadata:
    """A `Metadata` object as it was unpickled, each part of which is checked when it is used."""

    def __init__(self, folder: Path, metadata: Any) -> None:
        self.folder, self.file = folder, folder / METADATA_FILE
        entries = storage = None
        if isinstance(metadata, Stored):
            entries, storage = metadata.get("state_dict_metadata"), metadata.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            raise self.broken("lists no tensors")
        for key in entries:
            if not isinstance(key, str) or not key:
                raise self.broken(f"has a key that is no name: {shown(key)}")
        self._entries: dict[str, Any] = entries
        self._places = {self._index(index): place for index, place in storage.items()}
        self._files: dict[str, Path] = {}

    def broken(self, what: str) -> SourceError:
        return SourceError(f"{self.file}: {what}. {COPY_AGAIN}")

    def objects(self) -> Iterator[str]:
        """What is no tensor."""
        for key, entry in self._entries.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                yield key

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        for key, entry in self._entries.items():
            if type(entry).__name__ == "TensorStorageMetadata":
                yield key, self._tensor(key, entry)
            elif type(entry).__name__ != "BytesStorageMetadata":
                raise self.broken(f"{shown(key)} is neither a tensor nor bytes")

    def _index(self, index: Any) -> tuple[str, tuple[int, ...]]:
        if not isinstance(index, Stored) or type(index).__name__ != "MetadataIndex":
            raise self.broken("has a place that is nobody's")
        key, offset = index.get("fqn"), index.get("offset")
        return str(key), () if offset is None else self._numbers(str(key), offset)

    def _numbers(self, key: str, values: Any) -> tuple[int, ...]:
        is_shape = isinstance(values, tuple | list) and len(values) <= MAX_DIMENSIONS
        if not is_shape or not all(type(x) is int and 0 <= x < _LIMIT for x in values):
            raise self.broken(f"{shown(key)} has a shape that is none: {shown(values)}")
        return tuple(values)

    def _tensor(self, key: str, entry: Stored) -> StoredTensor:
        shape = self._numbers(key, entry.get("size"))
        properties = entry.get("properties")
        state = properties.state if isinstance(properties, Stored) else None
        if isinstance(state, dict):
            state = (state.get("dtype"),)
        dtype = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(dtype, str) or dtype not in BITS:
            raise self.broken(f"{shown(key)} has a dtype that is not known")
        chunks = entry.get("chunks")
        if not isinstance(chunks, list) or not chunks:
            raise self.broken(f"{shown(key)} has no chunks")
        found = StoredTensor(
            key, dtype, shape, tuple(self._chunk(key, shape, chunk) for chunk in chunks)
        )
        for chunk in found.chunks:
            if math.prod(chunk.sizes) * BITS[dtype] // 8 > chunk.stop - chunk.start:
                raise self.broken(
                    f"{shown(key)}: its chunk at {list(chunk.offsets)} has "
                    f"{chunk.stop - chunk.start:,} bytes, its shape {list(chunk.sizes)} needs more"
                )
        return found

    def _chunk(self, key: str, shape: tuple[int, ...], entry: Any) -> Chunk:
        if not isinstance(entry, Stored):
            raise self.broken(f"{shown(key)} has a chunk that is none")
        offsets = self._numbers(key, entry.get("offsets"))
        sizes = self._numbers(key, entry.get("sizes"))
        inside = len(offsets) == len(sizes) == len(shape) and all(
            size and offset + size <= whole
            for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise self.broken(
                f"{shown(key)} has a chunk {list(sizes)} at {list(offsets)}, which does not lie in "
                f"its shape {list(shape)}"
            )
        place = self._places.get((key, offsets))
        if not isinstance(place, Stored):
            raise self.broken(f"{shown(key)}: its chunk at {list(offsets)} lies in no file")
        return Chunk(offsets, sizes, *self._place(key, place))

    def _place(self, key: str, place: Stored) -> tuple[Path, int, int]:
        name, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if place.get("transform_descriptors"):
            raise SourceError(
                f"{self.file}: {shown(key)} is stored through "
                f"{shown(place.get('transform_descriptors'))}, which is not read here. "
                "Save the checkpoint without extensions."
            )
        numbers = (start, length)
        if not isinstance(name, str) or not all(
            type(x) is int and 0 <= x < _LIMIT for x in numbers
        ):
            raise self.broken(f"{shown(key)} has a place that is none")
        assert isinstance(start, int)
        assert isinstance(length, int)
        return self._inside(key, name), start, start + length

    def _inside(self, key: str, name: str) -> Path:
        """The path of a file of the checkpoint, which its name must not leave."""
        if name not in self._files:
            path = PurePosixPath(name)
            is_bad = not name or path.is_absolute() or ".." in path.parts
            if is_bad or "\\" in name or "\0" in name or not name.isprintable():
                raise SourceError(
                    f"{self.file}: {shown(key)} points to {shown(name)}, outside the checkpoint's "
                    "folder. Do not use this checkpoint."
                )
            self._files[name] = self.folder / name
        return self._files[name]


def _check_files(found: StoredCheckpoint, stamps: Stamps) -> None:
    """Every file that chunks lie in is there, and long enough."""
    ends: dict[Path, tuple[int, str]] = {}
    for tensor in found.tensors.values():
        for chunk in tensor.chunks:
            if chunk.stop > ends.get(chunk.file, (0, ""))[0]:
                ends[chunk.file] = chunk.stop, tensor.key
    for file in sorted(ends):
        end, key = ends[file]
        try:
            with opened(file) as (_, status):
                pass
        except FileNotFoundError:
            raise SourceError(
                f"{file}: missing; {key} lies in it ({len(ends)} files hold the checkpoint). "
                f"{COPY_AGAIN}"
            ) from None
        except OSError as error:
            raise read_error(file, error) from error
        if status.st_size < end:
            raise SourceError(
                f"{file}: truncated: {status.st_size:,} bytes, {key} ends at {end:,}. {COPY_AGAIN}"
            )
        stamps.add(file, status)
