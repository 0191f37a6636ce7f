# SPDX-License-Identifier: Apache-2.0
"""Algorithms that read second moments give a model in memory the bytes of its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fourfold
from families import FAMILIES, Truth, read_back
from fourfold.calibration.data import Batch, load_calibration
from fourfold.config import CalibrationConfig, Runtime
from fourfold.execution import Backend
from fourfold.planning import Plan
from fourfold.run.preflight import check_moments
from jobs import assert_same, flat, ids_file
from ranks import leave_together, run_on_ranks

Written = Callable[[str], tuple[Path, Truth]]

SIZES = {"calib_size": 6, "calib_seq": 24, "batch_size": 3}
ROLES = "quantize_if_present: [experts, shared_experts, mlp, attention]"
W4A4 = "activations: {format: nvfp4, amax: max}"

RUNS = [
    ("qwen3_moe", f"weights: {{scale: gptq_joint, descent: 1}}\n{W4A4}\n{ROLES}"),
    ("gpt_oss", f"weights: {{scale: mse_weighted}}\n{ROLES}"),
    *(
        pytest.param(name, f"weights: {{scale: {scale}}}\n{ROLES}", marks=pytest.mark.slow)
        for name, scale in (
            ("qwen3_moe", "gptq, pooled: true"),
            ("qwen3_moe", "local_hessian"),
            ("llama4", "gptq_joint"),
        )
    ),
]


def recipe_in(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(f"{text}\n")
    return folder / "recipe.yaml"


def batches_of(folder: Path, ids: Path) -> tuple[Batch, ...]:
    return load_calibration(folder, CalibrationConfig(ids, **SIZES), vocab_size=96).batches


def loop_over(batches: tuple[Batch, ...]) -> Callable[[Any], None]:
    def loop(model: Any) -> None:
        for batch in batches:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    return loop


def shards(folder: Path) -> dict[str, bytes]:
    names = (path.name for path in folder.glob("model*.safetensors"))
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(("name", "recipe"), RUNS)
def test_the_bytes_of_the_checkpoint(
    name: str, recipe: str, written: Written, tmp_path: Path
) -> None:
    """From calibration data every file is the same; from a loop, all but what names the data."""
    folder, ids, recipe_file = written(name)[0], ids_file(tmp_path), recipe_in(tmp_path, recipe)
    options = flat(calib=[ids], threads=1, **SIZES)
    streamed = fourfold.quantize(folder, tmp_path / "streamed", recipe_file, **options)
    model, _ = read_back(FAMILIES[name], folder)
    live = fourfold.quantize(model, tmp_path / "live", recipe_file, **options)
    assert live.clean, str(live.report)
    assert_same(tmp_path / "streamed", tmp_path / "live")
    assert [x.relative_error for x in live.linears] == [x.relative_error for x in streamed.linears]
    loop = loop_over(batches_of(folder, ids))
    looped = fourfold.quantize(
        model, tmp_path / "looped", recipe_file, forward_loop=loop, runtime=Runtime(threads=1)
    )
    assert looped.clean, str(looped.report)
    assert shards(tmp_path / "looped") == shards(tmp_path / "live")


def test_experts_that_no_token_reached(written: Written, tmp_path: Path) -> None:
    """They take the moment of all experts, as they do in a run from the checkpoint."""
    folder, ids = written("qwen3_moe")[0], ids_file(tmp_path)
    recipe = recipe_in(tmp_path, f"weights: {{scale: gptq_joint}}\n{ROLES}")
    options = flat(calib=[ids], threads=1, calib_size=1, calib_seq=2)
    streamed = fourfold.quantize(folder, tmp_path / "streamed", recipe, **options)
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    live = fourfold.quantize(model, tmp_path / "live", recipe, **options)
    assert live.unreached_experts
    assert live.unreached_experts == streamed.unreached_experts
    assert_same(tmp_path / "streamed", tmp_path / "live")


def test_moments_are_dropped_with_their_layer(written: Written, tmp_path: Path) -> None:
    """Before the first layer is written those of all layers are there; in the end none is."""
    folder, ids = written("qwen3_moe")[0], ids_file(tmp_path)
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    recipe = recipe_in(tmp_path, f"weights: {{scale: gptq_joint}}\n{ROLES}")
    result = fourfold.quantize(
        model, tmp_path / "out", recipe, **flat(calib=[ids], threads=1, **SIZES)
    )
    assert result.statistics is not None
    assert {name for state in result.statistics.sites.values() for name in state} == {
        "amax", "tokens",
    }  # fmt: skip
    assert (tmp_path / "out" / "calibration.safetensors").exists()


def planned(written: Written, folder: Path, weights: str) -> Plan:
    model, _ = read_back(FAMILIES["qwen3_moe"], written("qwen3_moe")[0])
    return fourfold.plan(model, recipe_in(folder, f"weights: {{{weights}}}\n{ROLES}"))


def test_the_plan_states_the_moments_of_all_layers(written: Written, tmp_path: Path) -> None:
    """Float64 matrices of 3 layers, and once more half of those of one: its means in float32."""
    plan = planned(written, tmp_path, "scale: gptq_joint")
    sites = {
        (plan.site(linear, name), name): linear.layer
        for linear in plan.observed
        for name in plan.algorithm_needs(linear)
    }
    nbytes = [0, 0, 0]
    for (site, _), layer in sites.items():
        assert layer is not None
        nbytes[layer] += 8 * (site.experts or 1) * (site.width**2 + 1)
    small = plan.calibration_memory - sum(nbytes) - max(nbytes) // 2
    assert 0 < small < 4096
    assert plan.memory(1) + plan.calibration_memory < plan.to_dict()["memory_bytes"] + 1


def test_moments_that_do_not_fit_are_refused(written: Written, tmp_path: Path) -> None:
    """With the remedies that help."""
    backend = Backend.none(1)
    plan = planned(written, tmp_path, "scale: gptq_joint")
    beside, needed = backend.memory(plan), plan.calibration_memory
    check_moments(plan, backend, available=beside + needed)
    folder = "Save the model with `save_pretrained` and quantize the folder"
    with pytest.raises(fourfold.ResourceError, match=folder) as refused:
        check_moments(plan, backend, available=beside + needed - 1)
    assert "or set `pooled: true`" in str(refused.value)
    with pytest.raises(fourfold.ResourceError, match=folder) as refused:
        check_moments(plan, backend, available=beside + 1)
    assert "pooled" not in str(refused.value)
    with pytest.raises(fourfold.ResourceError, match="on 2 ranks"):
        check_moments(plan, backend, ranks=2, available=beside + needed)
    shared = planned(written, tmp_path, "scale: gptq_joint, pooled: true")
    assert plan.statistics_memory(pooled=True) == shared.calibration_memory < needed


def test_a_run_without_room_does_not_call_the_model(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(written, tmp_path, "scale: gptq_joint")
    model, _ = read_back(FAMILIES["qwen3_moe"], written("qwen3_moe")[0])
    room = plan.memory(1) + plan.statistics_memory(pooled=True)
    monkeypatch.setattr("fourfold.run.preflight.memory_available", lambda: room)
    calls: list[Any] = []
    with pytest.raises(fourfold.ResourceError, match="statistics of the inputs of all layers"):
        fourfold.quantize(
            model, tmp_path / "out", tmp_path / "recipe.yaml",
            forward_loop=calls.append, runtime=Runtime(threads=1, device="cpu"),
        )  # fmt: skip
    assert calls == []
    assert not (tmp_path / "out").exists()


READS = ["loop", *(pytest.param(reads, marks=pytest.mark.slow) for reads in ("padding", "data"))]


@pytest.mark.parametrize("reads", READS)
def test_sharded_by_fsdp2_over_two_ranks(reads: str, written: Written, tmp_path: Path) -> None:
    """Moments are summed over the ranks' loops, also if all that the first rank reads is padding;
    of data that all of them read they count once."""
    folder, ids = written("qwen3_moe")[0], ids_file(tmp_path)
    recipe = recipe_in(tmp_path, f"weights: {{scale: gptq_joint}}\n{ROLES}")
    fourfold.quantize(folder, tmp_path / "streamed", recipe,
                      **flat(calib=[ids], threads=1, **SIZES))  # fmt: skip
    run_on_ranks(2, run_rank, reads, folder, tmp_path)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["", ""]
    assert shards(tmp_path / "out") == shards(tmp_path / "streamed")


def run_rank(rank: int, reads: str, folder: Path, tmp_path: Path) -> None:
    """One of two ranks; what went wrong goes into a file."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2
    )
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    options = flat(calib=[tmp_path / "ids.jsonl"], threads=1, **SIZES)
    mine = batches = batches_of(folder, tmp_path / "ids.jsonl")
    if reads == "loop":
        mine = batches[rank::2]
    if reads == "padding" and rank == 0:
        mine = tuple(Batch(x.input_ids, torch.zeros_like(x.attention_mask)) for x in batches)
    if reads != "data":
        options = {"forward_loop": loop_over(mine), "runtime": Runtime(threads=1)}
    problem = ""
    try:
        result = fourfold.quantize(model, tmp_path / "out", tmp_path / "recipe.yaml", **options)
        if rank == 0 and not result.clean:
            problem = str(result.report)
    except Exception as error:
        problem = repr(error)
    (tmp_path / f"rank{rank}").write_text(problem)
    leave_together(2, tmp_path)
