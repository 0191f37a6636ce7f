# SPDX-License-Identifier: Apache-2.0
"""Proves that every source keeps the contract of reading: rows go into the caller's buffer, what is
returned is a view of it, and bytes are the same however they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fourfold
from conftest import Written
from families import FAMILIES, read_back
from fourfold.config import OutputConfig
from fourfold.sources.cached import CachedTensors
from fourfold.sources.decoded import open_decoded
from fourfold.sources.live.source import LiveSource
from fourfold.sources.megatron import LiveMegatron, MegatronCheckpoint
from fourfold.sources.safetensors import SafetensorsFolder
from fourfold.storage.source import Source
from torch_dist.inverse import to_megatron
from torch_dist.stand_in import Rank, build
from torch_dist.writing import write_torch_dist


def cached(written: Written, tmp_path: Path) -> Source:
    """Every second tensor is in memory."""
    source = CachedTensors(SafetensorsFolder(written("qwen3_vl_moe")[0]))
    for key in list(source.tensors)[::2]:
        source.read(key)
    return source


def decoded(written: Written, tmp_path: Path) -> Source:
    """Fused experts, transposed, next to tensors that are copied."""
    fourfold.quantize(written("gpt_oss")[0], tmp_path / "out", output=OutputConfig(verify=False))
    return open_decoded(tmp_path / "out")


def live(written: Written, tmp_path: Path) -> Source:
    return LiveSource(read_back(FAMILIES["qwen3_moe"], written("qwen3_moe")[0])[0])


def megatron(written: Written, tmp_path: Path) -> Source:
    folder, truth = written("qwen3_moe")
    write_torch_dist(tmp_path / "saved", to_megatron(truth.raw))
    return MegatronCheckpoint(tmp_path / "saved", folder)


def live_megatron(written: Written, tmp_path: Path) -> Source:
    folder, truth = written("qwen3_moe")
    return LiveMegatron(build(to_megatron(truth.raw, dialect="B"), Rank(), {}), folder)


MEMBERS: dict[str, Callable[[Written, Path], Source]] = {
    "safetensors": lambda written, _: SafetensorsFolder(written("qwen3_vl_moe")[0]),
    "cached": cached,
    "decoded": decoded,
    "live": live,
    "megatron": megatron,
    "live megatron": live_megatron,
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_source_reads_into_the_callers_buffer(
    name: str, written: Written, tmp_path: Path
) -> None:
    source = MEMBERS[name](written, tmp_path)
    for key, info in source.tensors.items():
        whole = source.read(key)
        assert (whole.dtype, tuple(whole.shape)) == (info.torch_dtype, info.shape)
        data = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
        for start, stop in {(0, info.rows), (info.rows // 2, info.rows)}:
            out = np.full((stop - start) * info.row_bytes, 0xA5, dtype=np.uint8)
            rows = source.slab(key, start, stop, out)
            assert rows.data_ptr() == out.ctypes.data, key
            assert (rows.dtype, rows.numel()) == (
                whole.dtype,
                whole[start:].numel() if info.shape else 1,
            )
            assert out.tobytes() == data[start * info.row_bytes : stop * info.row_bytes], key
            source.will_need(key, start, stop)
        for start, stop in ((0, len(data)), (3, len(data) - 1), (1, 1)):
            out = np.empty(stop - start, dtype=np.uint8)
            source.read_bytes(key, start, out)
            assert out.tobytes() == data[start:stop], key
    source.close()
