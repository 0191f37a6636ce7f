# SPDX-License-Identifier: Apache-2.0
"""`scale_group: layer`: one global scale for the gates and ups of all experts of a layer, one for
their downs; from any source, whatever their tensors look like, held or read in pieces."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fourfold
from conftest import Written
from executing import assert_same_shards, execute
from families import FAMILIES, Truth, write_checkpoint
from families.configs import tiny_config
from fourfold.config import OutputConfig
from fourfold.errors import FourfoldWarning, RecipeError, WeightLostError
from fourfold.execution import Arena
from fourfold.formats import nvfp4
from fourfold.planning import Limits
from fourfold.recipes import Recipe
from nvfp4_folders import tensors_of

LAYER = """
description: one global scale for all experts of a layer
weights: {format: nvfp4, scale: mse, scale_group: layer}
quantize: [experts]
quantize_if_present: [attention, mlp]
"""
FAMILIES_OF_EACH_KIND = ["qwen3_moe", "qwen3_5_moe", "gpt_oss", "mixtral"]
"""Experts one by one; fused; fused, transposed and interleaved; other names."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "layer.yaml").write_text(LAYER)
    return tmp_path / "layer.yaml"


def by_half(truth: Truth) -> dict[tuple[str, bool], float]:
    """The largest magnitude of each layer's experts: of gates and ups, and of downs (True)."""
    found: dict[tuple[str, bool], float] = defaultdict(float)
    for (module, _, projection), matrix in truth.experts.items():
        half = module, projection == "down"
        found[half] = max(found[half], float(matrix.abs().max()))
    return found


@pytest.mark.parametrize("name", FAMILIES_OF_EACH_KIND)
def test_one_scale_for_a_layer(name: str, written: Written, recipe: Path, tmp_path: Path) -> None:
    folder, truth = written(name)
    result = fourfold.quantize(folder, tmp_path / "out", recipe)
    assert result.clean, result.report
    wanted = sorted(nvfp4.global_scale(amax) for amax in by_half(truth).values())
    found = {
        group.name: {each.global_scale for each in result.linears if each.name in names}
        for group in result.plan.groups
        if (names := {linear.name for linear in group.linears if linear.expert is not None})
    }
    assert all(len(scales) == 1 for scales in found.values())
    assert sorted(scale for scales in found.values() for scale in scales) == wanted
    tensors = tensors_of(tmp_path / "out")
    for each in result.linears:
        assert float(tensors[f"{each.name}.weight_scale_2"]) == each.global_scale
    # What is no expert keeps its own: q, k and v of a layer, and another one for each layer.
    queries = {x.global_scale for x in result.linears if x.name.endswith("q_proj")}
    assert len(queries) == len({x.layer for x in result.linears if x.name.endswith("q_proj")})


@pytest.mark.parametrize("name", FAMILIES_OF_EACH_KIND)
def test_in_pieces_it_is_the_same(
    name: str, written: Written, recipe: Path, tmp_path: Path
) -> None:
    folder, _ = written(name)
    fourfold.quantize(folder, tmp_path / "whole", recipe)
    execute(folder, tmp_path / "pieces", recipe, Limits(group_bytes=2048))
    assert_same_shards(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_memory_is_that_of_a_piece(
    name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what a worker takes nor what is planned for grows with the number of experts."""
    limits = Limits(group_bytes=1 << 18, copy_bytes=1 << 12)
    experts = {"qwen3_moe": "num_experts", "gpt_oss": "num_local_experts"}[name]
    planned, taken = [], [0]
    take = Arena.take

    def taking(arena: Arena, nbytes: int) -> Any:
        found = take(arena, nbytes)
        taken.append(arena._wanted)
        return found

    monkeypatch.setattr(Arena, "take", taking)
    peaks = []
    for count in (16, 64):
        sizes = {"hidden_size": 512, "intermediate_size": 256, "moe_intermediate_size": 256}
        config = partial(tiny_config, name, {**sizes, experts: count})
        folder = tmp_path / str(count)
        write_checkpoint(replace(FAMILIES[name], build_config=config), folder)
        plan = execute(folder, tmp_path / f"out {count}", recipe, limits, threads=1)
        planned.append(plan.memory(1))
        peaks.append(max(taken))
        taken.clear()
    assert planned[0] == planned[1]
    assert peaks[0] == peaks[1]


def test_an_expert_that_the_others_drown_is_repaired(
    recipe: Path, tmp_path: Path, written: Written
) -> None:
    _, truth = written("qwen3_moe")
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    with torch.no_grad():
        small = {**truth.raw, key: truth.raw[key] * 1e-6}
    folder = tmp_path / "model"
    write_checkpoint(FAMILIES["qwen3_moe"], folder)
    from safetensors.torch import save_file

    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(FourfoldWarning, match=r"experts\.2\.down_proj"):
        result = fourfold.quantize(folder, tmp_path / "out", recipe)
    assert result.clean
    assert list(result.repairs) == [key.removesuffix(".weight")]
    strict = OutputConfig(strict=True)
    lost = r"experts\.2\.down_proj: lost in NVFP4: .* share its glo"
    with pytest.raises(WeightLostError, match=lost):
        fourfold.quantize(folder, tmp_path / "strict", recipe, output=strict)
    fourfold.quantize(folder, tmp_path / "alone", "w4a16_nvfp4_experts_only_mse", output=strict)


def test_recipes_say_so(tmp_path: Path) -> None:
    assert Recipe.load("w4a16_nvfp4_experts_only").weights.scale_group == "expert"
    (tmp_path / "r.yaml").write_text("weights: {scale_group: layer}\nquantize: [attention]")
    with pytest.raises(RecipeError, match=re.escape("scale_group: layer is of routed experts")):
        Recipe.load(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("weights: {scale_group: layers}\nquantize: [experts]")
    with pytest.raises(RecipeError, match=r"scale_group.*'layers' is not known here"):
        Recipe.load(tmp_path / "r.yaml")
