# SPDX-License-Identifier: Apache-2.0
"""Proves the test checkpoints themselves.

FAMILIES has every family whose experts transformers decorates; each checkpoint is what
transformers' own loader expects, and gives back the model it came from, bit for bit; and its
experts differ from each other.
"""

from __future__ import annotations

import pytest
import torch

from . import (
    FAMILIES,
    build_model,
    decorated_classes,
    difference,
    list_decorated,
    mostly_slow,
    read_back,
    write_checkpoint,
)

UNDECORATED = {
    "dbrx",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "nllb_moe",
    "step3p7",
    "switch_transformers",
}
DENSE = {"llama", "qwen3"}
NOT_BY_16 = {"inkling": {"model.vision_tower.encoder_layers.0.projection"}}  # its patches: 12
LOADABLE = [f.name for f in FAMILIES.values() if f.why_not is None and f.load_error is None]


def test_families_cover_every_decorated_family():
    assert {f.package for f in FAMILIES.values()} - UNDECORATED - DENSE == list_decorated()


def test_families_cover_every_decorated_class():
    built = {
        type(module).__name__
        for family in FAMILIES.values()
        if family.why_not is None
        for module in build_model(family).modules()
    }
    assert decorated_classes().keys() - built == set()


def test_every_family_can_be_built():
    assert [f.name for f in FAMILIES.values() if f.why_not] == []


@pytest.mark.parametrize("name", mostly_slow(LOADABLE))
def test_checkpoint_loads_back_bit_for_bit(name, written):
    folder, truth = written(name)
    assert difference(FAMILIES[name], folder, truth, dtype=torch.bfloat16) == []


@pytest.mark.parametrize("name", mostly_slow(LOADABLE, *NOT_BY_16))
def test_weights_differ_and_are_divisible(name, written):
    _, truth = written(name)
    fingerprints = {tuple(matrix.flatten()[:64].tolist()) for matrix in truth.experts.values()}
    assert len(fingerprints) == len(truth.experts)
    assert all(matrix.ndim == 2 for matrix in truth.weights.values())
    odd = {name for name, matrix in truth.weights.items() if matrix.shape[1] % 16}
    assert odd == NOT_BY_16.get(name, set())
    assert all(tensor.isfinite().all() for tensor in truth.raw.values())


def test_what_transformers_does_not_load(tmp_path):
    family = FAMILIES["longcat_flash_zero"]
    write_checkpoint(family, tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        read_back(family, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype, tmp_path):
    family = FAMILIES["qwen3_moe"]
    truth = write_checkpoint(family, tmp_path, dtype=dtype)
    assert {t.dtype for t in truth.raw.values()} == {dtype}
    assert difference(family, tmp_path, truth, dtype=dtype) == []


def test_shards(tmp_path):
    family = FAMILIES["deepseek_v3_mtp"]
    truth = write_checkpoint(family, tmp_path, shards=3)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert difference(family, tmp_path, truth, dtype=torch.bfloat16) == []


def test_seed_decides_the_bytes(tmp_path):
    family = FAMILIES["olmoe"]
    one, again, other = (
        write_checkpoint(family, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))
    )
    assert all(torch.equal(tensor, again.raw[key]) for key, tensor in one.raw.items())
    assert not all(torch.equal(tensor, other.raw[key]) for key, tensor in one.raw.items())


def test_mtp_tensors_are_extra(written):
    _, truth = written("qwen3_5_moe_vl")
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in truth.extra
    assert all(key.startswith("mtp.") for key in truth.extra)
    assert any(key.startswith("model.visual.") for key in truth.raw)


def test_tied_head_is_not_on_disk(written):
    _, truth = written("qwen3_moe_tied")
    assert "lm_head.weight" not in truth.raw
    assert torch.equal(truth.linears["lm_head"], truth.raw["model.embed_tokens.weight"])
