# SPDX-License-Identifier: Apache-2.0
"""The time that a plan takes: from speeds that are measured, and only where that is wanted."""

from __future__ import annotations

import json
from pathlib import Path

import fourfold
from fourfold.run.estimate import Estimate, estimate
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
    disk = Estimate(BILLION, BILLION, 1, None, BILLION, runs_model=True)
    assert "thread" not in str(disk)
    assert str(disk).endswith("calibration, which runs the model, comes on top")


def test_a_plan_is_measured(written, tmp_path: Path) -> None:
    plan = fourfold.plan(written("qwen3_moe")[0])
    measured = estimate(plan, threads=1)
    assert measured.weights == sum(x.shape[0] * x.shape[1] for x in plan.linears)
    assert measured.nbytes == plan.nbytes + plan.nbytes_after
    assert measured.weights_per_second is not None
    assert measured.weights_per_second > 1000
    assert not measured.runs_model
    assert estimate(fourfold.plan(written("qwen3_moe")[0], "nvfp4_experts_only")).runs_model


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
