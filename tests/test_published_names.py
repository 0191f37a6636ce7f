# SPDX-License-Identifier: Apache-2.0
"""Checkpoints under transformers' names in memory come out under the published names.

Each family is written in upstream's layout, and saved by transformers with
`save_original_format=False`: the plans of both must write the same tensors, or say what no engine's
loader reads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fourfold
from families import FAMILIES, Truth, build_model, quiet
from fourfold.models.families import FAMILIES as TABLE
from fourfold.models.names import EXPERT_LINEAR
from nvfp4_folders import tensors_of

Written = Callable[[str], tuple[Path, Truth]]
EXPERTS = "w4a16_nvfp4_experts_only"

USUAL = ["mixtral", "phimoe", "nemotron_h", "deepseek_v4", "granitemoe", "aria", "qwen3_moe"]
OTHERS = [
    "axk1", "axk2", "deepseek_ocr2", "ernie4_5_moe", "exaone_moe", "flint", "hy_v3", "hy_v4",
    "inkling2", "kolibri1", "laguna", "mimo_v2_flash", "minimax", "minimax_m2",
]  # fmt: skip
IN_PARTS = {
    "kimi_linear": "conv1d",
    "minimax_m3_vl": "gate_up_proj",
    "step3p7": r"experts.<number>.gate_proj",
}
"""Families that publish some tensors in parts, and what the plan's note names."""


def in_memory(name: str, published: Path, folder: Path) -> Path:
    with quiet():
        build_model(FAMILIES[name]).save_pretrained(folder, save_original_format=False)
    shutil.copy(published / "config.json", folder)
    return folder


def names_in(plan: fourfold.Plan) -> set[str]:
    return {name for shard in plan.shards for name in shard.tensors}


@pytest.mark.parametrize(
    "name", [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_the_published_names_are_written(name: str, written: Written, tmp_path: Path) -> None:
    published, _ = written(name)
    expected = fourfold.plan(published, EXPERTS)
    assert not any("in transformers' memory" in note for note in expected.notes)
    plan = fourfold.plan(in_memory(name, published, tmp_path / "model"), EXPERTS)
    assert names_in(plan) == names_in(expected)
    assert plan.ignore == expected.ignore
    said = any("written under the published names" in note for note in plan.notes)
    assert said is (name != "qwen3_moe")


@pytest.mark.parametrize("name", IN_PARTS)
def test_what_no_engine_reads_is_said(name: str, written: Written, tmp_path: Path) -> None:
    published, _ = written(name)
    plan = fourfold.plan(in_memory(name, published, tmp_path / "model"), EXPERTS)
    assert any("engine" in note and IN_PARTS[name] in note for note in plan.notes)
    expected = fourfold.plan(published, EXPERTS)
    assert not any("engine" in note and IN_PARTS[name] in note for note in expected.notes)


def test_the_whole_way(written: Written, tmp_path: Path) -> None:
    """Renamed when it is read: quantized, verified, loaded and compared under the new names."""
    published, _ = written("mixtral")
    model, out = in_memory("mixtral", published, tmp_path / "model"), tmp_path / "out"
    result = fourfold.quantize(model, out, EXPERTS)
    assert result.clean, str(result.report)
    assert "model.layers.0.block_sparse_moe.gate.weight" in tensors_of(out)
    fourfold.quantize(published, tmp_path / "expected", EXPERTS)
    theirs, ours = tensors_of(tmp_path / "expected"), tensors_of(out)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key].view(torch.uint8), ours[key].view(torch.uint8))
               for key in ours if ours[key].ndim)  # fmt: skip
    loaded, expected = fourfold.load(out), fourfold.load(tmp_path / "expected")
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_with_another_dtype(written: Written, tmp_path: Path) -> None:
    """A source that is presented otherwise is renamed, too."""
    published, _ = written("mixtral")
    model, out = in_memory("mixtral", published, tmp_path / "model"), tmp_path / "out"
    result = fourfold.quantize(model, out, EXPERTS, dtype="bfloat16")
    assert result.clean, str(result.report)
    assert names_in(result.plan) == names_in(fourfold.plan(published, EXPERTS))


def test_a_model_that_was_loaded_from_such_a_checkpoint(written: Written, tmp_path: Path) -> None:
    import transformers

    published, _ = written("mixtral")
    folder = in_memory("mixtral", published, tmp_path / "model")
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert names_in(fourfold.plan(model, EXPERTS)) == names_in(fourfold.plan(published, EXPERTS))


def test_every_family_has_the_names_of_its_published_experts(written: Written) -> None:
    for name in ("mixtral", "gemma4", "nemotron_h", "deepseek_v4", "jamba", "step3p7", "qwen3_moe"):
        plan = fourfold.plan(written(name)[0], EXPERTS)
        family = TABLE[plan.inventory.model_types[0]]
        experts = [x.name for x in plan.linears if EXPERT_LINEAR.match(x.name)]
        assert experts
        assert all(map(family.maps, experts)), name
    assert not TABLE["mixtral"].maps("model.layers.0.mlp.experts.0.w1")
    assert not TABLE["mixtral"].maps("model.layers.0.block_sparse_moe.experts.w1.0")
    assert not TABLE["qwen3_moe"].maps("model.layers.0.mlp.experts.0.w1")
