# SPDX-License-Identifier: Apache-2.0
"""Models of megatron-core in memory, spread over ranks: quantized, they are the bytes of their
checkpoint, however they are spread; and what is wrong on one rank is an error of all.

Ranks are processes on the CPU that talk through gloo. Each launch does many jobs: what takes time
is to start. What needs no megatron-core is tried in `test_live_modules.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fourfold
from jobs import flat, once

from .core_jobs import Case, Ranks, run_ranks
from .test_logits import CASES, HYBRID, SEQUENTIAL, digests

pytestmark = pytest.mark.skipif(
    find_spec("megatron") is None or find_spec("megatron.core") is None,
    reason="megatron-core is not installed (pip install 'fourfold[megatron]')",
)

RECIPE = "w4a16_nvfp4_default_mse"
LAYERS = """
description: one global scale for all experts of a layer
weights: {format: nvfp4, scale: max, scale_group: layer}
quantize: [experts]
"""


@dataclass(frozen=True)
class Job:
    """One way to quantize the model: how it is spread, and how it is damaged before."""

    ranks: Ranks
    spoiled: str | None = None
    given: Mapping[str, Any] | None = None
    of_rank: Mapping[str, Any] | None = None
    """Arguments that only rank 1 gets."""


def launch(case: Case, jobs: Mapping[str, Job], folder: Path) -> Path:
    """Save the model of `case` on one rank; then load it and quantize it, job by job."""
    hf = folder / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text(json.dumps(case.config()))
    (folder / "layers.yaml").write_text(LAYERS)
    common = {"hf": case.config(), "options": case.options}
    found: list[dict[str, Any]] = [
        {**common, "ranks": asdict(Ranks()), "save": str(folder / "saved")}
    ]
    for name, job in jobs.items():
        given = {"recipe": RECIPE, "hf_config": str(hf), "shards": 2, **(job.given or {})}
        each = {
            **common, "ranks": asdict(job.ranks), "load": str(folder / "saved"),
            "out": str(folder / name), "given": given,
            "ranks_given": {"1": {**(job.of_rank or {})}},
        }  # fmt: skip
        found.append(each if job.spoiled is None else {**each, "spoiled": job.spoiled})
    (folder / "jobs.json").write_text(json.dumps(found))
    worlds = [job.ranks.world for job in jobs.values()]
    run_ranks(folder / "jobs.json", max(worlds), "core_live")
    return folder


def of_rank(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


def offline(folder: Path, name: str, **given: Any) -> dict[str, str]:
    """Digests of the output from the checkpoint."""
    given = {"recipe": RECIPE, "shards": 2, **given}
    result = fourfold.quantize(
        folder / "saved", folder / f"offline {name}", **flat(hf_config=folder / "hf", **given)
    )
    assert result.clean
    return digests(folder / f"offline {name}")


def check(folder: Path, name: str, ranks: Ranks, wanted: Mapping[str, str]) -> None:
    """Every rank succeeded, rank 0 verified, and the bytes are those of the checkpoint."""
    for rank in range(ranks.world):
        found = of_rank(folder, name, rank)
        assert found.get("clean"), (name, rank, found)
        assert found["verified"] == (rank == 0)
    assert digests(folder / name) == dict(wanted), name


def check_failed(folder: Path, name: str, pattern: str, ranks: Sequence[int] = (0, 1)) -> None:
    """Every rank failed with that error, and no output is left."""
    for rank in ranks:
        found = of_rank(folder, name, rank)
        assert re.search(pattern, found.get("text", "")), (name, rank, found)
    assert not (folder / name).exists()


IN_BF16 = Case(HYBRID.family, {**HYBRID.options, "bf16": True}, HYBRID.changes)

SPREAD = {
    "tp2 ep2": Job(Ranks(tp=2, ep=2)),
    "pp2": Job(Ranks(pp=2)),
    "dp2": Job(Ranks(dp=2), given={"shards": 3}),
    "own shards": Job(Ranks(ep=2), given={"shards": None}),
}
CALIBRATED = {"recipe": "nvfp4_default_mse-fp8_kv", "calib_seq": 16, "threads": 1}
SPOILED = {
    "not finite": Job(Ranks(ep=2), "not finite"),
    "replica": Job(Ranks(tp=2), "replica"),
    "adapter": Job(Ranks(ep=2), "adapter"),
    "meta": Job(Ranks(ep=2), "meta"),
    "recipes": Job(Ranks(ep=2), of_rank={"recipe": "w4a16_nvfp4_default"}),
    "dead": Job(Ranks(ep=2), "dead"),  # the last: a rank is missing then
}


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "live on two ranks", launch_two_ranks)


def launch_two_ranks(folder: Path) -> None:
    rows = [[(7 * row + 3 * n) % 90 + 3 for n in range(20)] for row in range(12)]
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows]
    (folder / "ids.jsonl").write_text("".join(lines))
    spread = {
        **SPREAD,
        "layers": Job(Ranks(ep=2), given={"recipe": str(folder / "layers.yaml")}),
        "calibrated": Job(
            Ranks(tp=2, ep=2), given={**CALIBRATED, "calib": [str(folder / "ids.jsonl")]}
        ),
    }
    launch(IN_BF16, {**spread, **SPOILED}, folder)


def test_the_bytes_are_those_of_the_checkpoint(two_ranks: Path) -> None:
    wanted = offline(two_ranks, "two")
    for name in ("tp2 ep2", "pp2"):
        check(two_ranks, name, SPREAD[name].ranks, wanted)
    # As many shards for each layer as it has ranks, unless it is said otherwise.
    check(two_ranks, "own shards", SPREAD["own shards"].ranks, wanted)


def test_replicas_write_once(two_ranks: Path) -> None:
    check(two_ranks, "dp2", Ranks(dp=2), offline(two_ranks, "three", shards=3))


def test_one_scale_for_all_experts_of_a_layer(two_ranks: Path) -> None:
    wanted = offline(two_ranks, "layers", recipe=two_ranks / "layers.yaml")
    check(two_ranks, "layers", Ranks(ep=2), wanted)


def test_activations_are_calibrated(two_ranks: Path) -> None:
    wanted = offline(two_ranks, "calibrated", **CALIBRATED, calib=[two_ranks / "ids.jsonl"])
    check(two_ranks, "calibrated", Ranks(tp=2, ep=2), wanted)


def test_an_error_of_one_rank_is_one_of_all(two_ranks: Path) -> None:
    check_failed(
        two_ranks, "not finite", r"model\.layers\.0\.mlp\.experts\.2\.down_proj .*: nan at"
    )
    check_failed(two_ranks, "adapter", r"decoder\.layers\.0\.adapter\.\w+: no rule for it")
    check_failed(two_ranks, "meta", r"router\.weight: has no values in memory")


def test_replicas_that_differ_are_named(two_ranks: Path) -> None:
    check_failed(
        two_ranks,
        "replica",
        r"decoder\.layers\.0\.mlp\.router\.weight: rank 0 and rank 1 should have the same",
    )


def test_ranks_that_want_different_things_are_named(two_ranks: Path) -> None:
    check_failed(two_ranks, "recipes", r"rank 1 has another recipe")


def test_a_rank_that_dies_ends_the_others(two_ranks: Path) -> None:
    assert not (two_ranks / "dead.1.json").exists()  # rank 1 did not even fail
    found = of_rank(two_ranks, "dead", 0)
    assert found["error"] in ("RankFailedError", "SourceError"), found
    assert not (two_ranks / "dead" / "config.json").exists()


EVERY = [
    Ranks(tp=2),
    Ranks(ep=2),
    Ranks(tp=2, pp=2),
    Ranks(pp=2, vp=2),
    Ranks(tp=2, ep=2, pp=2),
    Ranks(ep=2, etp=2),
    Ranks(tp=2, ep=2, dp=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_sharding(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    is_dense = not case.options.get("grouped") and case.family == "qwen3"
    is_in_stages = case.options.get("mtp") or case.family == "nemotron_h"  # without virtual ones
    jobs = {
        str(ranks): Job(ranks)
        for ranks in EVERY
        if not (is_dense and ranks.ep > 1) and not (ranks.vp > 1 and is_in_stages)
    }
    folder = launch(case, jobs, tmp_path / "live")
    wanted = offline(folder, "two")
    for each, job in jobs.items():
        check(folder, each, job.ranks, wanted)


@pytest.mark.slow
def test_sequential_experts_of_eight_ranks(tmp_path: Path) -> None:
    """With more ranks than files, some write nothing but still serve the others."""
    ranks = Ranks(tp=2, ep=2, pp=2, dp=2)
    jobs = {"all": Job(ranks, given={"shards": 1}), "tp4": Job(Ranks(tp=4, ep=2))}
    folder = launch(SEQUENTIAL, jobs, tmp_path / "live")
    wanted = offline(folder, "one", shards=1)
    assert sum(name.endswith(".safetensors") for name in wanted) < ranks.world
    check(folder, "all", ranks, wanted)
    check(folder, "tp4", jobs["tp4"].ranks, offline(folder, "two"))
