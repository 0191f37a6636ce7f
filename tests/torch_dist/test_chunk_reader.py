# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are read as PyTorch wrote them; damaged and unsafe ones are refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from fourfold.errors import SourceError
from fourfold.sources.megatron.chunk_reader import ChunkReader
from fourfold.sources.megatron.metadata import find_iteration, read_metadata
from fourfold.storage.fingerprints import Stamps

from .writing import halves, singles, whole, write_metadata, write_torch_dist


def opened(folder: Path) -> ChunkReader:
    stamps = Stamps()
    return ChunkReader(read_metadata(folder, stamps), stamps)


def read(stored: ChunkReader, key: str, *box: tuple[int, int]) -> torch.Tensor:
    tensor = stored.tensors[key]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}[tensor.dtype]
    shape = [b - a for a, b in box]
    out = np.empty(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    stored.read(key, box, out)
    return torch.from_numpy(out).view(dtype).reshape(shape)


TENSORS = {
    "matrix": torch.randn(10, 6),
    "experts": torch.randn(3, 4, 8, 6).bfloat16(),
    "norm": torch.randn(6),
    "count": torch.tensor(7),
}

CUTS = {
    "whole": whole,
    "rows": halves(-2),
    "columns": halves(-1),
    "both": halves(-1, -2),
    "experts": singles(2, halves(0)),
    "experts' columns": singles(2, halves(1)),
}


@pytest.mark.parametrize("cut", CUTS)
def test_any_box_is_read_from_any_chunks(tmp_path: Path, cut: str) -> None:
    write_torch_dist(tmp_path, TENSORS, CUTS[cut])
    stored = opened(tmp_path)
    boxes = {
        "matrix": [((0, 10), (0, 6)), ((3, 7), (0, 6)), ((4, 5), (2, 4)), ((0, 10), (5, 6))],
        "experts": [((1, 2), (2, 3), (1, 7), (0, 6)), ((0, 3), (0, 4), (0, 8), (0, 6))],
        "norm": [((0, 6),), ((2, 5),)],
        "count": [()],
    }
    for key, wanted in boxes.items():
        for box in wanted:
            expected = TENSORS[key][tuple(slice(a, b) for a, b in box)]
            assert torch.equal(read(stored, key, *box), expected), (key, box)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_pytorch_itself_saves_is_read(tmp_path: Path) -> None:
    dcp.save(dict(TENSORS), checkpoint_id=str(tmp_path), no_dist=True)
    stored = opened(tmp_path)
    for key, tensor in TENSORS.items():
        assert torch.equal(read(stored, key, *((0, n) for n in tensor.shape)), tensor)


def test_views_of_larger_storages_are_read(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"][2:5].clone()}, files=1)
    with (tmp_path / "__0_0.distcp").open("wb") as handle:
        torch.save(TENSORS["matrix"][2:5], handle)  # keeps the rows before it, too
    place = next(iter(metadata.storage_data.values()))
    place.length = (tmp_path / "__0_0.distcp").stat().st_size
    write_metadata(tmp_path, metadata)
    assert torch.equal(read(opened(tmp_path), "a", (0, 3), (0, 6)), TENSORS["matrix"][2:5])


def read_all(folder: Path) -> None:
    stored = opened(folder)
    for key, tensor in stored.tensors.items():
        if np.prod(tensor.shape, dtype=float) < 1e6:
            read(stored, key, *((0, n) for n in tensor.shape))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(SourceError) as error:
        read_all(folder)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 2


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("where", ["planner_data", "storage_data", "state_dict_metadata"])
def test_metadata_that_names_functions_runs_nothing(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = write_torch_dist(tmp_path, TENSORS)
    setattr(metadata, where, {"x": Harmful()})
    write_metadata(tmp_path, metadata)
    refused(tmp_path, ".metadata", "system", "Do not use this checkpoint")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\\b", "", "sub/../../x", "a\0b"])
def test_files_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]})
    next(iter(metadata.storage_data.values())).relative_path = name
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "a", "outside the checkpoint's folder")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, TENSORS, halves(0))
    (tmp_path / "__1_0.distcp").unlink()
    refused(tmp_path, "__1_0.distcp", "missing", "Copy the checkpoint again")


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, TENSORS, halves(0))
    file = tmp_path / "__1_0.distcp"
    os.truncate(file, file.stat().st_size - 10)
    refused(tmp_path, "__1_0.distcp", "truncated")


def test_a_missing_chunk_is_named(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]}, halves(0))
    del metadata.state_dict_metadata["a"].chunks[1]
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "a [10, 6]", "no chunk holds [5:10]")


def test_a_chunk_without_a_place_is_named(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]}, halves(0))
    del metadata.storage_data[MetadataIndex("a", torch.Size((5, 0)))]
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "chunk at [5, 0] lies in no file")


@pytest.mark.parametrize("offset", [(0, 0), (4, 0)])
def test_overlapping_chunks_are_named(tmp_path: Path, offset: tuple[int, int]) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]}, halves(0))
    second = metadata.state_dict_metadata["a"].chunks[1]
    metadata.state_dict_metadata["a"].chunks[1] = ChunkStorageMetadata(
        torch.Size(offset), second.sizes
    )
    metadata.storage_data[MetadataIndex("a", torch.Size(offset))] = metadata.storage_data.pop(
        MetadataIndex("a", torch.Size((5, 0)))
    )
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "a [10, 6]", "overlap")


def test_overlap_and_gap_of_the_same_size_are_seen(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]}, halves(0, 1))
    chunks = metadata.state_dict_metadata["a"].chunks
    chunks[3] = ChunkStorageMetadata(torch.Size((4, 3)), chunks[3].sizes)
    metadata.storage_data[MetadataIndex("a", torch.Size((4, 3)))] = metadata.storage_data.pop(
        MetadataIndex("a", torch.Size((5, 3)))
    )
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "a [10, 6]", "overlap at [4:5, 3:6]")


def test_a_chunk_beyond_its_tensor_is_refused(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]})
    metadata.state_dict_metadata["a"].size = torch.Size((9, 6))
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "'a'", "does not lie in")


def test_a_chunk_of_another_dtype_is_refused(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]})
    metadata.state_dict_metadata["a"].properties.dtype = torch.bfloat16
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "a at [0, 0]", "F32", "BF16")


def test_a_chunk_of_another_shape_is_refused(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"], "b": torch.zeros(6, 10)})
    places = metadata.storage_data
    first, second = list(places)
    places[first], places[second] = places[second], places[first]
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "a at [0, 0]", "[6, 10]")


def test_chunks_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]}, files=1)
    file = tmp_path / "__0_0.distcp"
    torch.save(Harmful(), file)
    next(iter(metadata.storage_data.values())).length = file.stat().st_size
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "__0_0.distcp", "system", "Do not use this checkpoint")
    assert not (tmp_path / "harmed").exists()


def test_compressed_streams_are_refused(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"a": TENSORS["matrix"]})
    next(iter(metadata.storage_data.values())).transform_descriptors = ["stream.zstd"]
    write_metadata(tmp_path, metadata)
    refused(tmp_path, "stream.zstd", "without extensions")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_end_in_a_clean_error_or_in_values(tmp_path: Path, seed: int) -> None:
    """A flipped byte may be a value of a weight; anything else is reported as a `SourceError`."""
    write_torch_dist(tmp_path, TENSORS, halves(0), files=1)
    draw = np.random.default_rng(seed)
    file = tmp_path / (".metadata" if seed % 2 else "__0_0.distcp")
    raw = bytearray(file.read_bytes())
    for at in draw.integers(0, len(raw), 8):
        raw[at] = draw.integers(0, 256)
    file.write_bytes(raw)
    told = None
    try:
        read_all(tmp_path)
    except SourceError as error:
        told = str(error)
    assert told is None or len(told.splitlines()) <= 2


def test_older_classes_of_megatron_are_stood_in_for(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, TENSORS)
    raw = pickle.dumps(metadata, protocol=2).replace(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n",
    )
    assert b"MCoreMetadata" in raw
    (tmp_path / ".metadata").write_bytes(raw)
    assert torch.equal(read(opened(tmp_path), "norm", (0, 6)), TENSORS["norm"])


def test_a_file_that_changes_is_seen(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, TENSORS)
    stored = opened(tmp_path)
    os.utime(tmp_path / "__0_0.distcp", (1, 1))
    with pytest.raises(SourceError, match="changed while it was read"):
        read(stored, "matrix", (0, 10), (0, 6))


def test_the_latest_iteration_is_found(tmp_path: Path) -> None:
    inside = tmp_path / "iter_0000120"
    write_torch_dist(inside, TENSORS)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("120\n")
    assert find_iteration(tmp_path) == inside
    assert find_iteration(inside) == inside
    assert find_iteration(tmp_path.parent) is None


@pytest.mark.parametrize("text", ["../x", "", "latest"])
def test_an_iteration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(SourceError, match="no iteration"):
        find_iteration(tmp_path)


def test_the_old_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(SourceError, match="--ckpt-format torch_dist"):
        find_iteration(tmp_path)
