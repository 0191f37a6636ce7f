# SPDX-License-Identifier: Apache-2.0
"""Reads the `.metadata` of a `torch_dist` checkpoint: its tensors, their chunks, other objects.

    .metadata          names, global shapes and dtypes; the box, file and bytes of each chunk
    __0_0.distcp …     the chunks
    common.pt          what is the same on all ranks, such as the training arguments; optional

Global shapes are those of the whole model: a chunk is the box of a tensor that one rank held under
tensor, pipeline and expert parallelism.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fourfold.errors import SourceError
from fourfold.sources.megatron.safe_pickle import METADATA, Stored, damaged, read_pickle
from fourfold.sources.megatron.torch_archive import Chunk
from fourfold.storage.fingerprints import Stamps, opened, read_error
from fourfold.storage.names import MEGATRON
from fourfold.storage.safetensors_header import BITS, shown

METADATA_FILE, LATEST = MEGATRON
COPY_AGAIN = "Copy the checkpoint again."

_LIMIT = 1 << 62
"""No position, size or dimension is as large."""

_OTHER_FORMATS = {
    "mp_rank_*": "the old `torch` format, one file for each rank",
    "*.zarray": "the `zarr` format",
    "__*/.zarray": "the `zarr` format",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A whole tensor of the checkpoint; its dtype is named as in safetensors."""

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
    """Keys of objects that are not tensors."""


def find_iteration(folder: Path) -> Path | None:
    """Return the folder with a Megatron checkpoint's metadata; None if `folder` is not Megatron's.

    `folder` may also be the one above it, which names the checkpoint's latest iteration.

    Raises:
        SourceError: It is a checkpoint of Megatron in another format, or incomplete.
    """
    if (folder / METADATA_FILE).exists():
        return folder
    if not (folder / LATEST).is_file():
        return None
    iteration = folder / _name_of_latest(folder / LATEST)
    if (iteration / METADATA_FILE).exists():
        return iteration
    for pattern, other_format in _OTHER_FORMATS.items():
        if iteration.is_dir() and any(iteration.glob(pattern)):
            raise SourceError(
                f"{iteration}: a Megatron checkpoint in {other_format}. Save it with "
                "--ckpt-format torch_dist."
            )
    raise SourceError(f"{iteration}: no {METADATA_FILE}, though {LATEST} names it. {COPY_AGAIN}")


def _name_of_latest(file: Path) -> str:
    try:
        with opened(file) as (handle, _):
            text = handle.read(64).decode(errors="replace").strip()
    except OSError as error:
        raise read_error(file, error) from error
    if text != "release" and not re.fullmatch(r"[0-9]{1,12}", text):
        raise SourceError(f"{file}: says {shown(text)}, which is no iteration. {COPY_AGAIN}")
    return text if text == "release" else f"iter_{int(text):07d}"


def read_metadata(folder: Path, stamps: Stamps) -> StoredCheckpoint:
    """Read what a `torch_dist` checkpoint holds, without reading a tensor.

    Raises:
        SourceError: The metadata is damaged or unsafe, or a file is missing or too short.
    """
    file = folder / METADATA_FILE
    try:
        with opened(file) as (handle, status):
            raw = handle.read()
    except OSError as error:
        raise read_error(file, error) from error
    stamps.add(file, status, raw)
    metadata = read_pickle(raw, file, METADATA)
    try:
        checkpoint = _Parser(folder, metadata).checkpoint()
    except SourceError:
        raise
    except Exception as error:  # of damaged metadata, any field may be any object
        raise damaged(file, "an entry", error) from None
    _check_files(checkpoint, stamps)
    return checkpoint


class _Parser:
    """Turns the unpickled metadata into a `StoredCheckpoint`.

    Fields that are missing or of another kind raise whatever error they lead to; `read_metadata`
    reports them.
    """

    def __init__(self, folder: Path, metadata: Stored) -> None:
        self._folder, self._file = folder, folder / METADATA_FILE
        self._entries: dict[str, Stored] = metadata.fields["state_dict_metadata"]
        self._places: dict[tuple[str, tuple[int, ...]], Stored] = {}
        for index, place in metadata.fields["storage_data"].items():
            offset = index.fields.get("offset")  # an object has none
            self._places[index.fields["fqn"], () if offset is None else _numbers(offset)] = place
        self._paths: dict[str, Path] = {}

    def checkpoint(self) -> StoredCheckpoint:
        tensors, objects = {}, []
        for key, entry in self._entries.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                objects.append(key)
            else:
                tensors[key] = self._tensor(key, entry)
        if not all(isinstance(key, str) and key for key in self._entries):
            raise ValueError("a key that is not a name")
        return StoredCheckpoint(self._folder, tensors, tuple(objects))

    def _error(self, key: str, what: str) -> SourceError:
        return SourceError(f"{self._file}: {shown(key)}: {what}. {COPY_AGAIN}")

    def _tensor(self, key: str, entry: Stored) -> StoredTensor:
        shape = _numbers(entry.fields["size"])
        properties = entry.fields["properties"].state
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        if dtype not in BITS:
            raise self._error(key, "its dtype is not known")
        chunks = tuple(self._chunk(key, shape, chunk) for chunk in entry.fields["chunks"])
        for chunk in chunks:
            if math.prod(chunk.sizes) * BITS[dtype] // 8 > chunk.stop - chunk.start:
                what = f"the chunk at {list(chunk.offsets)} is too small for its shape"
                raise self._error(key, what)
        return StoredTensor(key, dtype, shape, chunks)

    def _chunk(self, key: str, shape: tuple[int, ...], entry: Stored) -> Chunk:
        offsets, sizes = _numbers(entry.fields["offsets"]), _numbers(entry.fields["sizes"])
        spans = zip(offsets, sizes, shape, strict=True)
        if not all(size and offset + size <= whole for offset, size, whole in spans):
            what = f"the chunk {list(sizes)} at {list(offsets)} does not lie in {list(shape)}"
            raise self._error(key, what)
        place = self._places.get((key, offsets))
        if place is None:
            raise self._error(key, f"the chunk at {list(offsets)} lies in no file")
        transforms = place.fields.get("transform_descriptors")
        if transforms:
            raise SourceError(
                f"{self._file}: {shown(key)} is stored through {shown(transforms)}, which is not "
                "supported. Save the checkpoint without extensions."
            )
        start, length = _numbers((place.fields["offset"], place.fields["length"]))
        path = self._path(key, place.fields["relative_path"])
        return Chunk(offsets, sizes, path, start, start + length)

    def _path(self, key: str, name: str) -> Path:
        """The path of a file in the checkpoint's folder, which its name must not leave."""
        if name not in self._paths:
            path = PurePosixPath(name)
            leaves = not name or path.is_absolute() or ".." in path.parts or "\\" in name
            if leaves or not name.isprintable():
                raise SourceError(
                    f"{self._file}: {shown(key)} points to {shown(name)}, outside the checkpoint's "
                    "folder. Do not use this checkpoint."
                )
            self._paths[name] = self._folder / name
        return self._paths[name]


def _numbers(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value < _LIMIT for value in values):
        raise ValueError(f"{shown(values)} are not sizes or positions")
    return tuple(values)


def _check_files(checkpoint: StoredCheckpoint, stamps: Stamps) -> None:
    """Raise `SourceError` unless every file that holds chunks is present and long enough."""
    ends: dict[Path, tuple[int, str]] = {}
    for tensor in checkpoint.tensors.values():
        for chunk in tensor.chunks:
            if chunk.stop > ends.get(chunk.file, (0, ""))[0]:
                ends[chunk.file] = chunk.stop, tensor.key
    for file, (end, key) in sorted(ends.items()):
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
