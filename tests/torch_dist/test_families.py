# SPDX-License-Identifier: Apache-2.0
"""Each family's checkpoint, written in Megatron's layout and read again, is unchanged.

The way there is `inverse.py`, which knows nothing of our rules; the way back is the package. What
megatron-core itself computes is held against transformers in `test_logits.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fourfold
from conftest import Written
from families import FAMILIES, mtp, write_checkpoint
from fourfold.sources.megatron import MegatronCheckpoint
from fourfold.sources.megatron.families import FAMILIES as BOOKS
from fourfold.sources.megatron.rules import Transform

from .conftest import FAMILY
from .inverse import to_megatron
from .writing import Cut, halves, singles, whole, write_torch_dist

NAMES = [
    "qwen3",
    "qwen3_tied",
    "qwen3_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_vl",
    "qwen3_5_moe_text",
    "qwen3_vl_moe",
    "mixtral",
    "deepseek_v3",
    "nemotron_h",
]
WITH_MTP = ["qwen3_5_moe", "qwen3_5_moe_text", "deepseek_v3"]

SHARDINGS: Mapping[str, Cut] = {
    "one rank": whole,
    "rows": halves(-2),
    "columns": halves(-1),
    "rows, experts": singles(2, halves(0)),
}


def expected(raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron shares embedding and head with the MTP layers; norms of a delta net lose a bit."""
    found = dict(raw)
    for key, of in (
        ("model.layers.3.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.3.shared_head.head.weight", "lm_head.weight"),
    ):
        if key in found:
            found[key] = raw[of]
    for key, tensor in raw.items():
        if key.endswith("linear_attn.norm.weight"):
            kept = (tensor.double() - 1).to(tensor)
            found[key] = (kept.double() + 1).to(tensor)
    return found


def presented(folder: Path, hf: Path) -> dict[str, torch.Tensor]:
    source = MegatronCheckpoint(folder, hf)
    found = {
        key: source.slab(key, 0, info.shape[0] if info.shape else 1)
        for key, info in source.tensors.items()
    }
    source.close()
    return found


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key


def test_every_family_of_the_table_is_tried() -> None:
    assert set(BOOKS) <= set(NAMES)
    used = {
        rule.transform
        for book in BOOKS.values()
        for section in book.sections
        for rule in section.rules
    }
    assert used == set(Transform)


def cases() -> Iterator[Any]:
    """Every family in one sharding, one family in all of them; the other pairs are slow."""
    for name, sharding in itertools.product(NAMES, SHARDINGS):
        is_quick = sharding == "columns" or name == FAMILY
        marks = () if is_quick else pytest.mark.slow
        yield pytest.param(name, sharding, marks=marks, id=f"{name}, {sharding}")


@pytest.mark.parametrize(("name", "sharding"), list(cases()))
def test_a_family_comes_back_bit_for_bit(
    name: str, sharding: str, written: Written, tmp_path: Path
) -> None:
    folder, truth = written(name)
    write_torch_dist(tmp_path, to_megatron(truth.raw), SHARDINGS[sharding], files=3)
    assert_same(presented(tmp_path, folder), expected(truth.raw))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dialect", "te"), [("B", False), ("B", True), ("C", True)])
def test_a_family_comes_back_from_other_dialects(
    name: str, dialect: str, te: bool, written: Written, tmp_path: Path
) -> None:
    folder, truth = written(name)
    write_torch_dist(tmp_path, to_megatron(truth.raw, te=te, dialect=dialect), halves(0))
    assert_same(presented(tmp_path, folder), expected(truth.raw))


@pytest.mark.parametrize("name", NAMES)
def test_slabs_and_bytes_are_parts_of_the_whole(
    name: str, written: Written, tmp_path: Path
) -> None:
    folder, truth = written(name)
    write_torch_dist(tmp_path, to_megatron(truth.raw), halves(-1, -2))
    source = MegatronCheckpoint(tmp_path, folder)
    draw = np.random.default_rng(0)
    for key, tensor in expected(truth.raw).items():
        if not tensor.ndim:
            continue
        start, stop = sorted(draw.integers(0, tensor.shape[0] + 1, 2))
        source.will_need(key, start, stop)
        assert torch.equal(source.slab(key, start, stop), tensor[start:stop]), key
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        first, last = sorted(draw.integers(0, len(data) + 1, 2))
        out = np.empty(last - first, dtype=np.uint8)
        source.read_bytes(key, int(first), out)
        assert np.array_equal(out, data[first:last]), key
    source.close()


@pytest.mark.parametrize("name", WITH_MTP)
def test_mtp_layers_come_back(name: str, tmp_path: Path) -> None:
    extra = mtp.deepseek if name == "deepseek_v3" else mtp.qwen
    truth = write_checkpoint(replace(FAMILIES[name], extra=extra), tmp_path / "hf")
    assert any("eh_proj" in key or "mtp.fc" in key for key in truth.raw)
    write_torch_dist(tmp_path / "mega", to_megatron(truth.raw), halves(0))
    assert_same(presented(tmp_path / "mega", tmp_path / "hf"), expected(truth.raw))


@pytest.mark.parametrize("name", NAMES)
def test_convert_writes_the_published_checkpoint(
    name: str, written: Written, tmp_path: Path
) -> None:
    folder, truth = written(name)
    write_torch_dist(tmp_path / "mega", to_megatron(truth.raw), halves(-1))
    done = fourfold.convert(tmp_path / "mega", tmp_path / "out", hf_config=folder)
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert_same(found, expected(truth.raw))
    assert done.tensors == len(found)
    assert not list((tmp_path / "out").rglob("*.partial"))


# Vision towers.


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe_vl"])
def test_a_language_model_takes_the_vision_tower_from_beside(
    name: str, written: Written, tmp_path: Path
) -> None:
    folder, truth = written(name)
    assert any(key.startswith("model.visual.") for key in truth.raw)
    tensors = to_megatron(truth.raw)
    language = {key: x for key, x in tensors.items() if not key.startswith("vision_model.")}
    write_torch_dist(tmp_path / "language", language, halves(0))
    assert_same(presented(tmp_path / "language", folder), expected(truth.raw))
    write_torch_dist(tmp_path / "all", tensors, halves(0))
    recipe = "w4a16_nvfp4_experts_only"
    outputs = []
    for which in ("language", "all"):
        result = fourfold.quantize(
            tmp_path / which, tmp_path / f"{which} out", recipe, hf_config=folder
        )
        assert result.clean
        has_note = any("the vision tower is that of" in note for note in result.plan.notes)
        assert has_note is (which == "language")
        files = sorted((tmp_path / f"{which} out").glob("*.safetensors"))
        outputs.append([file.read_bytes() for file in files])
    assert outputs[0] == outputs[1]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(
        fourfold.SourceError, match=r"language model alone.*model\.visual"
    ) as caught:
        fourfold.plan(tmp_path / "language", recipe, hf_config=tmp_path / "bare")
    assert str(tmp_path / "bare") in str(caught.value)
