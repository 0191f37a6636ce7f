# SPDX-License-Identifier: Apache-2.0
"""Writes `torch_dist` directories with PyTorch's own classes, cut as ranks would cut them."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""

Cut = Callable[[str, tuple[int, ...]], Iterable[Box]]


def whole(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
    """One chunk."""
    yield (0,) * len(shape), shape


def halves(*dims: int) -> Cut:
    """Two chunks along each of these dimensions (from the end, where negative)."""

    def cut(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
        wanted = {dim % len(shape) for dim in dims if -len(shape) <= dim < len(shape)}
        spans = [
            [(0, n // 2), (n // 2, n - n // 2)] if dim in wanted and n > 1 else [(0, n)]
            for dim, n in enumerate(shape)
        ]
        for box in itertools.product(*spans):
            yield tuple(start for start, _ in box), tuple(size for _, size in box)

    return cut


def singles(axes: int, then: Cut = whole) -> Cut:
    """A chunk for each index of the first axes, as layers and experts are saved."""

    def cut(key: str, shape: tuple[int, ...]) -> Iterable[Box]:
        if len(shape) <= axes:
            yield from whole(key, shape)
            return
        for index in itertools.product(*(range(n) for n in shape[:axes])):
            for offsets, sizes in then(key, shape[axes:]):
                yield (*index, *offsets), (*(1 for _ in index), *sizes)

    return cut


def write_torch_dist(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    cut: Cut = whole,
    *,
    files: int = 2,
    objects: Sequence[str] = (),
    common: Any = None,
) -> Metadata:
    """Write `tensors` into `folder`; return the metadata, to be changed and written again."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"__{number}_0.distcp" for number in range(files)]
    handles = [(folder / name).open("wb") for name in names]
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    storage = {MetadataIndex(key): _StorageInfo(names[0], 0, 0) for key in objects}
    turn = itertools.cycle(range(files))
    for key, tensor in tensors.items():
        chunks = []
        for offsets, sizes in cut(key, tuple(tensor.shape)):
            box = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
            number = next(turn)
            start = handles[number].tell()
            torch.save(tensor[box].clone(), handles[number])
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            storage[MetadataIndex(key, torch.Size(offsets), len(chunks) - 1)] = _StorageInfo(
                names[number], start, handles[number].tell() - start
            )
        entries[key] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.size(), chunks
        )
    for handle in handles:
        handle.close()
    metadata = Metadata(
        entries, planner_data={key: (key,) for key in tensors}, storage_data=storage
    )
    write_metadata(folder, metadata)
    if common is not None:
        torch.save(common, folder / "common.pt")
    return metadata


def write_metadata(folder: Path, metadata: Any) -> None:
    """Replace `.metadata`."""
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
