# SPDX-License-Identifier: Apache-2.0
"""A budget for a model on the hub: its shards are read several times, so they must stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fourfold
from fourfold.config import CalibrationConfig, Runtime
from fourfold.errors import UsageError

from .helpers import NAME
from .stand_in import Hub


def test_shards_stay_or_the_budget_is_refused(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    hub.add(NAME, sharded)
    recipe, data = tmp_path / "mine.yaml", tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [*range(3, 67)]}) + "\n" for _ in range(4)))
    recipe.write_text(
        "activations: {format: nvfp4}\nquantize: [experts]\nquantize_if_present: [attention]\n"
        "budget: {bits_per_weight: 8, tokens: 32}\n"
    )
    options = {"calibration": CalibrationConfig(data, calib_size=2, calib_seq=32)}
    with pytest.raises(UsageError, match=r"would be deleted once .* Give `keep_source=True`"):
        fourfold.quantize(
            NAME, tmp_path / "out", recipe, runtime=Runtime(keep_source=False), **options
        )
    assert not (tmp_path / "out").exists()
    kept = fourfold.quantize(
        NAME, tmp_path / "out", recipe, runtime=Runtime(keep_source=True), **options
    )
    assert kept.clean
    wanted = fourfold.quantize(sharded, tmp_path / "wanted", recipe, **options)
    assert kept.plan.recipe == wanted.plan.recipe
