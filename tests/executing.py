# SPDX-License-Identifier: Apache-2.0
"""Execute a plan alone, with limits of one's own: shards are written, and nothing beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourfold.execution import ExecutionContext, Scheduler
from fourfold.planning import Limits, Plan, make_plan
from fourfold.recipes import Recipe
from fourfold.sources.safetensors import open_source
from fourfold.storage.output import OutputFolder


def execute(
    model: Path, out: Path, recipe: str | Path, limits: Limits, threads: int = 2, **options: Any
) -> Plan:
    """Write the shards that `recipe` makes of a checkpoint into `out`.

    options: further fields of the `ExecutionContext`.
    """
    source = open_source(model)
    try:
        plan = make_plan(source, Recipe.load(recipe), limits=limits)
        target = OutputFolder(out)
        target.lock("test")
        target.begin(None, plan.files)
        with Scheduler(ExecutionContext(plan, source, target, threads, **options)) as scheduler:
            scheduler.run()
            scheduler.finish()
        target.state.release()
    finally:
        source.close()
    return plan


def assert_same_shards(one: Path, other: Path) -> None:
    """Both folders have the same safetensors files, byte for byte."""
    names = sorted(path.name for path in other.glob("*.safetensors"))
    assert names == sorted(path.name for path in one.glob("*.safetensors"))
    assert names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
