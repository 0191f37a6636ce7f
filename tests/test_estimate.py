# SPDX-License-Identifier: Apache-2.0
"""The time that a plan takes: from speeds that are measured, and only where that is wanted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import fourfold
from fourfold.embedded import model_dir
from fourfold.planning.work import calibration_operations
from fourfold.recipes import Recipe
from fourfold.run.budget import budget_operations
from fourfold.run.estimate import Estimate, estimate, seconds_by_width
from test_cli import run  # noqa: F401  # a fixture

BILLION = 10**9


def test_the_slower_of_search_and_disk_counts_and_the_verification() -> None:
    search_bound = Estimate(100 * BILLION, 100 * BILLION, 2, 0.5 * BILLION, 1.0 * BILLION)
    assert search_bound.seconds == 200 + 100
    disk_bound = Estimate(100 * BILLION, 300 * BILLION, 2, 0.5 * BILLION, 1.0 * BILLION)
    assert disk_bound.seconds == 300 + 300
    assert "time about 10 min, verified" in str(disk_bound)
    assert "500 million weights a second with 2 threads" in str(disk_bound)
    assert "1.0 GB a second from the disk" in str(disk_bound)
    assert "about 11.1 hours" in str(Estimate(BILLION, 20_000 * BILLION, 2, None, BILLION))


def test_what_was_not_measured_is_left_out() -> None:
    nothing = Estimate(BILLION, BILLION, 1, None, None)
    assert nothing.seconds == 0
    assert "not estimated" in str(nothing)
    assert nothing.to_dict()["weights_per_second"] is None
    disk = Estimate(BILLION, BILLION, 1, None, BILLION, operations=1e12)
    assert "thread" not in str(disk)
    assert str(disk).endswith("calibration, which runs the model, comes on top")
    assert disk.to_dict()["without_calibration"]


def test_calibration_is_counted_beside_the_search() -> None:
    plain = Estimate(100 * BILLION, 100 * BILLION, 2, 0.5 * BILLION, 1.0 * BILLION)
    counted = replace(plain, operations=60e12, operations_per_second=100e9)
    assert counted.seconds == plain.seconds + 600
    assert "calibration on 65,536 tokens is about 10 min of it, with 100 GFLOP/s" in str(counted)
    assert counted.to_dict()["calibration_seconds"] == 600
    assert not counted.to_dict()["without_calibration"]


def test_a_budget_is_counted_beside_the_rest() -> None:
    plain = Estimate(100 * BILLION, 100 * BILLION, 2, 2e6, 1.0 * BILLION)
    counted = replace(plain, budget_operations=60e12, operations_per_second=100e9)
    assert counted.seconds == plain.seconds + 600
    assert "to choose what the budget buys takes about 10 min of it" in str(counted)
    assert "2.0 million weights a second" in str(counted)
    assert counted.to_dict()["budget_seconds"] == 600
    unknown = replace(plain, budget_operations=60e12)
    assert "calibration, which runs the model, comes on top" in str(unknown)


def test_a_plan_with_a_budget_is_measured() -> None:
    """It reads what the choice reads: as many tokens, of all variants of the first round."""
    values = Recipe.load("w4a16_nvfp4_default_mse").model_dump(mode="json", exclude_defaults=True)
    recipe = Recipe.model_validate({**values, "budget": {"bits_per_weight": 4.8, "tokens": 2048}})
    plan = fourfold.plan(model_dir(), recipe)
    measured = estimate(plan, threads=1)
    assert measured.budget_operations == budget_operations(plan)
    assert measured.budget_seconds is not None
    assert measured.calibration_seconds is None
    twice = recipe.model_copy(
        update={"budget": recipe.budget.model_copy(update={"tokens": 4096})}  # type: ignore[union-attr]
    )
    assert budget_operations(fourfold.plan(model_dir(), twice)) == 2 * budget_operations(plan)
    assert budget_operations(fourfold.plan(model_dir())) == 0


def test_wide_inputs_take_longer() -> None:
    """A matrix of second moments is as wide as the inputs, and multiplies each weight."""
    narrow, wide = 0.5e-6, 0.75e-6  # seconds at 512 and at 1024 inputs
    assert seconds_by_width([(1000, 512)], narrow, wide) == pytest.approx(512_000 * 0.5e-6)
    assert seconds_by_width([(1000, 1024)], narrow, wide) == pytest.approx(1_024_000 * 0.75e-6)
    assert seconds_by_width([(10, 7168)], narrow, wide) == pytest.approx(71_680 * 3.75e-6)
    assert seconds_by_width([(10, 16)], narrow, wide) == pytest.approx(160 * 0.2578e-6, rel=1e-3)
    assert seconds_by_width([(10, 7168)], 1e-6, 0.9e-6) == pytest.approx(71_680 * 0.9e-6)


def test_a_plan_is_measured(written, tmp_path: Path) -> None:
    plan = fourfold.plan(written("qwen3_moe")[0])
    measured = estimate(plan, threads=1)
    assert measured.weights == sum(x.shape[0] * x.shape[1] for x in plan.linears)
    assert measured.nbytes == plan.nbytes + plan.nbytes_after
    assert measured.weights_per_second is not None
    assert measured.weights_per_second > 1000
    assert measured.calibration_seconds is None


@pytest.mark.parametrize("recipe", ["nvfp4_experts_only", "nvfp4_default_best"])
def test_a_plan_with_calibration_is_measured(written, recipe: str) -> None:
    measured = estimate(fourfold.plan(written("qwen3_moe")[0], recipe), threads=1)
    assert measured.weights_per_second is not None
    assert measured.weights_per_second > 1000
    assert measured.calibration_seconds is not None
    assert measured.calibration_seconds > 0


def test_operations_are_those_of_the_products() -> None:
    """Counted by hand for a model that everyone can check."""
    plan = fourfold.plan(model_dir(), "nvfp4_default_gptq")
    config = json.loads((model_dir() / "config.json").read_text())
    width, heads, key_heads = (
        config[x] for x in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    inner, experts, routed = (
        config[x] for x in ("moe_intermediate_size", "num_experts", "num_experts_per_tok")
    )
    head = config["head_dim"]
    attention = 2 * width * head * (heads + key_heads)
    model = 2 * (attention + experts * width + routed * 3 * width * inner)
    moments = 1.5 * (width**2 + (heads * head) ** 2 + routed * (width**2 + inner**2))
    factors = 4 / 3 * (width**3 + (heads * head) ** 3 + experts * (width**3 + inner**3))
    layers = config["num_hidden_layers"]
    assert calibration_operations(plan, 1000) == pytest.approx(
        layers * (1000 * (model + moments) + factors)
    )
    sequential = fourfold.plan(model_dir(), "nvfp4_default_best")
    assert calibration_operations(sequential, 1000) > 3 * calibration_operations(plan, 1000)
    assert calibration_operations(fourfold.plan(model_dir()), 1000) == 0


def test_where_it_is_shown(run, written, terminal) -> None:  # noqa: F811
    model = written("qwen3_moe")[0]
    _, text, _ = run("plan", model)
    assert text.splitlines()[-1].startswith("time less than a minute, verified")
    terminal(60)
    assert max(map(len, run("plan", model)[1].splitlines()[-3:])) <= 60
    assert "time less" not in run("plan", model, "--no-time")[1]
    assert json.loads(run("plan", model, "--json")[1])["time"] is None
    document = json.loads(run("plan", model, "--json", "--time")[1])
    assert document["time"]["seconds"] >= 0
