# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the algorithms that read second moments: their output is clean, and its bytes are
the same for any number of threads, and after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourfold
from executing import assert_same_shards
from families import Truth
from fourfold.events import Resumed, ShardWritten
from fourfold.recipes import Recipe
from jobs import MODEL, assert_same, flat, ids_file, only, start

Written = Callable[[str], tuple[Path, Truth]]

ROLES = "quantize_if_present: [experts, shared_experts, mlp, attention]"


def options_for(folder: Path, weights: str, **options: Any) -> dict[str, Any]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"weights: {{{weights}}}\n{ROLES}\n")
    data: dict[str, Any] = {"calib": [ids_file(folder)], "calib_seq": 24, "batch_size": 3}
    if not Recipe.load(recipe).needs_calibration:
        data = {}
    return {"recipe": recipe, "threads": 1, **data, **options}


RUNS = [
    *((MODEL, scale) for scale in ("four_over_six", "mse_weighted", "local_hessian", "gptq")),
    *((name, "gptq_joint, descent: 1") for name in (MODEL, "deepseek_v3")),
]


@pytest.mark.parametrize(("name", "scale"), RUNS)
def test_the_output_is_clean_for_any_threads(
    name: str, scale: str, written: Written, tmp_path: Path
) -> None:
    options = options_for(tmp_path, f"scale: {scale}")
    for threads in (1, 2):
        result = fourfold.quantize(
            written(name)[0], tmp_path / str(threads), **flat(**options | {"threads": threads})
        )
        assert result.clean, result.report
        assert all(0 < linear.relative_error < 0.5 for linear in result.linears)
    assert_same_shards(tmp_path / "1", tmp_path / "2")


def test_finished_shards_stay(written: Written, tmp_path: Path) -> None:
    """Statistics are dropped with their layer: those of what is left are taken again."""
    model, out = written(MODEL)[0], tmp_path / "out"
    options = options_for(tmp_path, "scale: gptq_joint", verify=False, shards=4)
    fourfold.quantize(model, tmp_path / "whole", **flat(**options))

    def stop(progress: ShardWritten) -> None:
        if progress.shards_done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fourfold.quantize(model, out, **flat(on_event=only(ShardWritten, stop), **options))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    resumed: list[Resumed] = []
    fourfold.quantize(model, out, **flat(on_event=only(Resumed, resumed.append), **options))
    assert resumed[0].finished >= 5
    assert all((out / name).stat().st_mtime_ns == then for name, then in before.items())
    assert_same(out, tmp_path / "whole")


@pytest.mark.parametrize("name", [MODEL, pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    name: str, written: Written, tmp_path: Path
) -> None:
    """Before many a change of the disk, and, when it goes on, before a later one."""
    model = written(name)[0]
    options = options_for(tmp_path, "scale: gptq_joint", verify=False, shards=2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(model, whole, 0, options) == 0
    number = 8
    while run(model, out, number, options):
        run(model, out, number // 2, options)
        if not (out / "config.json").exists():
            assert run(model, out, 0, options) == 0
            assert_same(out, whole)
        shutil.rmtree(out)
        number += 10 + number
    assert number > 100
    assert_same(out, whole)


def run(model: Path, out: Path, kill_at: int, options: dict[str, Any]) -> int:
    process = start(model, out, kill_at=kill_at, **options)
    process.join(120)
    assert process.exitcode in (0, -9)
    return int(process.exitcode)
