# SPDX-License-Identifier: Apache-2.0
"""Recipes: what they may say, and that what they may not is answered with the nearest names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fourfold
from fourfold.recipes import Recipe, builtin_names

BUILTIN = [
    "nvfp4_default_mse-fp8_kv",
    "nvfp4_experts_only",
    "nvfp4_experts_only_mse",
    "nvfp4_experts_only_mse-constant_inputs",
    "nvfp4_experts_only_mse-fp8_cast_kv",
    "nvfp4_mlp_only_mse-fp8_cast_kv",
    "w4a16_nvfp4_default",
    "w4a16_nvfp4_default_mse",
    "w4a16_nvfp4_experts_only",
    "w4a16_nvfp4_experts_only_mse",
    "w4a16_nvfp4_mlp_only_mse",
]


def test_builtin_recipes() -> None:
    # The others: tests/test_mixed.py, tests/calibration/test_sequential.py, tests/test_budget.py.
    others = ("_rest", "_gptq", "_best", "_budget")
    assert [name for name in builtin_names() if not name.endswith(others)] == BUILTIN
    for name in BUILTIN:
        recipe = fourfold.Recipe.load(name)
        assert recipe.name == name
        assert recipe.weights.scale == ("mse" if "_mse" in name else "max")
        assert recipe.observes_inputs == (not name.startswith("w4a16") and "constant" not in name)
        assert recipe.needs_calibration == recipe.observes_inputs
        assert (recipe.kv_cache == "none") == ("-fp8" not in name)
        assert recipe.calibrates_kv == name.endswith("-fp8_kv")
        assert recipe.description


def test_other_rules_leave_everything_else(tmp_path: Path) -> None:
    """What a budget is spent on becomes rules; the recipe stays what it was otherwise."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "description: all keys\n"
        "weights: {scale: gptq_joint}\n"
        "quantize: [experts]\n"
        "kv_cache: {format: fp8}\n"
        "calibration: {propagate: quantized, all_experts: true}\n"
        "folds: {smooth: auto}\n"
        "layout: compressed-tensors\n"
        "budget: {bits_per_weight: 5}\n"
    )
    recipe = Recipe.load(file)
    changed = recipe.with_rules(recipe.all_rules)
    before, after = (x.model_dump(exclude={"budget"}) for x in (recipe, changed))
    assert after.pop("rules")
    for key in ("weights", "activations", "quantize", "quantize_if_present", "keep"):
        assert key not in after
        before.pop(key)
    assert after == before
    assert changed.budget is None
    assert (changed.all_rules, changed.name) == (recipe.all_rules, recipe.name)


@pytest.mark.parametrize("name", BUILTIN)
def test_yaml_comes_back(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    (tmp_path / f"{name}.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / f"{name}.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantise: [experts]", ["'quantise'", "did you mean quantize"]),
        ("weights: {scal: mse}\nquantize: [experts]", ["weights.scal", "scale"]),
        (
            "weights: {scale: mean}\nquantize: [experts]",
            ["weights.scale", "'mean'", "not known"],
        ),
        ("quantize: [expert]", ["'expert'", "did you mean experts"]),
        ("quantize: [router]", ["'router'", "cannot be quantized"]),
        ("quantize: experts", ["quantize", "a list is expected, not 'experts'"]),
        ("quantize: []", ["at least one role"]),
        ("{}", ["at least one role"]),
        ("", ["mapping"]),
        ("[1]", ["mapping"]),
        ("a: [", ["not valid YAML"]),
        ("kv_cache: {format: fp9}\nquantize: [mlp]", ["kv_cache", "fp9"]),
        ("kv_cache: {scale: casted}\nquantize: [mlp]", ["kv_cache.scale", "casted"]),
        ("activations: {format: int4}\nquantize: [mlp]", ["activations.format", "int4"]),
        ("activations: {amax: least}\nquantize: [mlp]", ["activations.amax", "least"]),
        ("activations: {format: fp8, amax: histogram}\nquantize: [mlp]", ["block scales", "fp8"]),
        ("activations: {format: mxfp8, amax: constant}\nquantize: [mlp]", ["no effect", "mxfp8"]),
        ("activations: {amax: {headroom: 7}}\nquantize: [mlp]", ["headroom", "6"]),
        ("activations: {amax: {headroom: 1.5}}\nquantize: [mlp]", ["headroom", "integer"]),
        ("activations: {amax: {hedroom: 1}}\nquantize: [mlp]", ["hedroom", "headroom"]),
        ("activations: {amx: max}\nquantize: [mlp]", ["activations.amx", "amax"]),
        ("calibration: {every_expert: true}\nquantize: [mlp]", ["all_experts"]),
        ("calibration: {all_experts: 1}\nquantize: [mlp]", ["all_experts"]),
        ("calibration: {all_experts: true}\nquantize: [mlp]", ["all_experts", "activations"]),
        ("keep: 3\nquantize: [mlp]", ["keep: a list is expected, not 3"]),
        ("weights: {scale: mse, descent: 1}\nquantize: [mlp]", ["descent", "scale: mse", "remove"]),
        ("weights: {range: 256}\nquantize: [mlp]", ["range has no effect with scale: mse"]),
        ("weights: {scale: four_over_six, damping: 1}\nquantize: [mlp]", ["damping", "no effect"]),
        ("weights: {scale: local_hessian, descent: 1}\nquantize: [mlp]", ["descent", "no effect"]),
        ("weights: {scale: gptq_joint, sweeps: 1}\nquantize: [mlp]", ["weights.sweeps"]),
        (
            "weights: {scale: gptq_joint, descent: 17}\nquantize: [mlp]",
            ["descent: Input", "to 16"],
        ),
        ("weights: {scale: gptq_joint, descent: 1.5}\nquantize: [mlp]", ["descent", "integer"]),
        (
            "weights: {scale: gptq_joint, descent: -1}\nquantize: [mlp]",
            ["descent: Input", "to 0"],
        ),
        (
            "weights: {scale: gptq_joint, range: 300}\nquantize: [mlp]",
            ["weights.range", "300"],
        ),
        ("weights: {scale: gptq_joint, damping: 0}\nquantize: [mlp]", ["damping", "0.001"]),
        ("weights: {scale: gptq_joint, damping: .nan}\nquantize: [mlp]", ["weights.damping", "10"]),
        ("weights: {scale: gptq_joint, damping: .inf}\nquantize: [mlp]", ["damping", "10"]),
        ("weights: {scale: gptq_joint, pooled: 1}\nquantize: [mlp]", ["weights.pooled", "boolean"]),
    ],
)
def test_what_is_wrong_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(fourfold.RecipeError) as caught:
        Recipe.load(file)
    for word in ["mine.yaml", *words]:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    "text",
    [
        f"{BOMB}quantize: *a8",
        f"{BOMB}quantize: [experts]\nactivations: *a8",
        f"{BOMB}quantize: [experts]\nweights: {{format: *a8}}",
        "[" * 5000,
        "quantize: [experts]\ndescription: 2001-13-45",
        "quantize: [experts]\ndescription: !!int abc",
        'quantize: [experts]\ndescription: "\\ud800"',
        "quantize: [experts]\ndescription: !!python/object/apply:os.getcwd []",
    ],
)
def test_hostile_recipes_end_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(text)
    with pytest.raises(fourfold.RecipeError, match=r"evil\.yaml") as caught:
        Recipe.load(tmp_path / "evil.yaml")
    assert len(str(caught.value)) < 1000


def test_a_folder_or_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path, tmp_path / "pipe.yaml"):
        with pytest.raises(fourfold.RecipeError, match=r"is a folder or a pipe\. Write the recipe"):
            Recipe.load(path)


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(fourfold.RecipeError, match="did you mean w4a16_nvfp4_experts_only"):
        Recipe.load("w4a16_nvfp4_expert_only")
    with pytest.raises(fourfold.RecipeError, match=r"nothing\.yaml: no such recipe file"):
        Recipe.load("nothing.yaml")
