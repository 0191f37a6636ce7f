# SPDX-License-Identifier: Apache-2.0
"""Recipes with rules: the first rule that matches a linear weight decides about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fourfold
from families import Truth
from fourfold.config import CalibrationConfig, OutputConfig
from fourfold.layouts import LAYOUTS
from fourfold.planning import Scheme
from fourfold.recipes import Recipe
from jobs import assert_same, ids_file
from nvfp4_folders import tensors_of

Written = Callable[[str], tuple[Path, Truth]]

MAX_AND_MSE = """
rules:
  - {names: ["*.layers.2.*"], keep: true}
  - {roles: [experts], weights: {format: nvfp4, scale: max}}
  - {roles_if_present: [attention, lm_head], weights: {format: nvfp4, scale: mse}}
"""


def recipe(tmp_path: Path, text: str, name: str = "mine") -> Path:
    file = tmp_path / f"{name}.yaml"
    file.write_text(text)
    return file


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_each_rule_has_its_algorithm(written: Written, tmp_path: Path) -> None:
    """The bytes are those of recipes that give everything the one algorithm, or the other."""
    model = written("qwen3_moe")[0]
    result = fourfold.quantize(model, tmp_path / "out", recipe(tmp_path, MAX_AND_MSE))
    assert result.clean, result.report
    algorithms = {(x.role, result.plan.scheme_of(x).algorithm) for x in result.plan.linears}
    assert algorithms == {("experts", "max"), ("attention", "mse"), ("lm_head", "mse")}
    assert not any(linear.layer == 2 for linear in result.plan.linears)
    both = "quantize: [experts, attention, lm_head]"
    for scale in ("max", "mse"):
        file = recipe(tmp_path, f"weights: {{scale: {scale}}}\n{both}", scale)
        fourfold.quantize(model, tmp_path / scale, file, output=OutputConfig(verify=False))
    tensors, alone = (
        tensors_of(tmp_path / "out"),
        {x: tensors_of(tmp_path / x) for x in ("max", "mse")},
    )
    for linear in result.plan.linears:
        wanted = alone[result.plan.scheme_of(linear).algorithm]
        for part in ("weight", "weight_scale", "weight_scale_2"):
            name = f"{linear.name}.{part}"
            assert torch.equal(bits(tensors[name]), bits(wanted[name])), name


def test_the_other_keys_are_one_rule(written: Written, tmp_path: Path) -> None:
    model = written("qwen3_moe")[0]
    short = "weights: {scale: max}\nquantize: [experts]\nkeep: ['*.layers.1.*']"
    long = """
rules:
  - {names: ['*.layers.1.*'], keep: true}
  - {roles: [experts], weights: {scale: max}}
"""
    plans = [
        fourfold.plan(model, recipe(tmp_path, text, name))
        for name, text in (("short", short), ("long", long))
    ]
    assert plans[0].digest == plans[1].digest
    assert plans[0].rows == plans[1].rows
    assert Recipe.load(recipe(tmp_path, short)).all_rules == plans[1].recipe.all_rules


def test_activations_for_some_roles(written: Written, tmp_path: Path) -> None:
    """Each role has the activations of its rule, and headroom of its own."""
    model = written("qwen3_moe")[0]
    text = """
rules:
  - {roles: [experts], activations: {format: nvfp4}}
  - {roles: [attention]%s}
"""
    config = fourfold.plan(model, recipe(tmp_path, text % "")).quantization_config
    assert config["quant_algo"] == "MIXED_PRECISION"
    layers = config["quantized_layers"]
    assert {layers[name]["quant_algo"] for name in layers if "attn" in name} == {"W4A16_NVFP4"}
    assert {layers[name]["quant_algo"] for name in layers if "experts" in name} == {"NVFP4"}
    same = ", activations: {format: nvfp4, amax: {headroom: 1}}"
    result = fourfold.quantize(
        model,
        tmp_path / "out",
        recipe(tmp_path, text % same),
        calibration=CalibrationConfig(calib=[ids_file(tmp_path)], calib_seq=24, calib_size=4),
    )
    assert result.clean, result.report
    headrooms = {(x.role, result.plan.scheme_of(x).headroom) for x in result.plan.linears}
    assert headrooms == {("experts", 0), ("attention", 1)}
    for linear in result.linears:
        assert linear.input_amax is not None or linear.role == "experts"
        if linear.role == "attention":
            assert linear.input_scale == pytest.approx(2 * linear.input_amax / 2688)


def test_yaml_of_rules_comes_back(tmp_path: Path, written: Written) -> None:
    chosen = Recipe.load(recipe(tmp_path, MAX_AND_MSE))
    again = Recipe.load(recipe(tmp_path, chosen.to_yaml()))
    assert again == chosen
    assert [rule.keep for rule in again.rules] == [True, False, False]
    assert again.schemes == (Scheme("nvfp4", "max"), Scheme("nvfp4", "mse"))
    model = written("qwen3_moe")[0]
    for name in ("one", "two"):
        fourfold.quantize(model, tmp_path / name, chosen if name == "one" else again)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("[{weights: {scale: mse}}]", ["rules.0", "matches nothing", "roles_if_present"]),
        ("[{roles: [router]}]", ["rules.0.roles", "'router' cannot be quantized"]),
        ("[{rolls: [mlp]}]", ["unknown key 'rules.0.rolls'", "did you mean roles"]),
        ("[{roles: [mlp], weights: {scal: mse}}]", ["rules.0.weights.scal", "scale"]),
        ("[{roles: [mlp], weights: {scale: mean}}]", ["rules.0.weights.scale", "'mean'"]),
        ("[{roles: [mlp], keep: true}]", ["all of them keep"]),
        ("[{roles: [mlp], keep: true, activations: none}]", ["keep: true", "activations"]),
        ("{roles: [mlp]}", ["rules: a list is expected"]),
        ("[{roles: [mlp], weights: {scale_group: layer}}]", ["layer is of routed experts"]),
        ("[{roles: [mlp]}]\nquantize: [mlp]", ["quantize has no effect beside rules"]),
        ("[{roles: [mlp]}]\nlayout: gguf", ["layout", "'gguf' is not known", *LAYOUTS]),
    ],
)
def test_what_is_wrong_is_named(rules: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(fourfold.RecipeError) as caught:
        Recipe.load(recipe(tmp_path, f"rules: {rules}"))
    for word in ["mine.yaml", *words]:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("[{names: ['*.experts.9.*']}]", "rule 1: pattern .* matches no linear weight"),
        (
            "[{roles: [experts]}, {names: ['*.nothing.*'], keep: true}]",
            "rule 2: keep pattern .* matches no linear weight",
        ),
        (
            "[{roles: [experts]}, {names: ['*.experts.*'], keep: true}]",
            "rule 2: earlier rules decide about all that it matches",
        ),
        ("[{roles: [experts]}, {roles: [shared_experts]}]", "the model has no shared_experts"),
        ("[{roles_if_present: [shared_experts]}]", "has none of shared_experts"),
        ("[{roles: [attention], names: ['*.experts.*']}]", "rule 1: pattern .* matches no linear"),
    ],
)
def test_a_rule_without_a_match(rules: str, words: str, written: Written, tmp_path: Path) -> None:
    with pytest.raises(fourfold.RecipeError, match=words):
        fourfold.plan(written("qwen3_moe")[0], recipe(tmp_path, f"rules: {rules}"))


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("{names: ['*.up_proj'], weights: {scale: max}}", "engines fuse them"),
        ("{names: ['*.q_proj'], weights: {scale: max}}", "engines fuse them"),
    ],
)
def test_what_engines_fuse_has_one_scheme(
    first: str, words: str, written: Written, tmp_path: Path
) -> None:
    rules = f"rules: [{first}, {{roles: [experts, attention]}}]"
    with pytest.raises(fourfold.PlanError, match=words):
        fourfold.plan(written("qwen3_moe")[0], recipe(tmp_path, rules))


def test_a_rule_by_name_alone(written: Written, tmp_path: Path) -> None:
    rules = "rules: [{names: ['*.layers.1.self_attn.*']}]"
    plan = fourfold.plan(written("qwen3_moe")[0], recipe(tmp_path, rules))
    assert {linear.role for linear in plan.linears} == {"attention"}
    assert {linear.layer for linear in plan.linears} == {1}
