# SPDX-License-Identifier: Apache-2.0
"""A model on the hub is measured like a folder, and is not fetched for what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import fourfold
from fourfold.config import EvaluationConfig, OutputConfig

from .helpers import HEADER, NAME, sizes_of
from .stand_in import Hub


def test_the_source_is_on_the_hub(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    hub.add(NAME, sharded)
    out, data = tmp_path / "out", tmp_path / "ids.jsonl"
    data.write_text(json.dumps({"input_ids": [*range(3, 67)]}))
    options = EvaluationConfig(data, length=32, cache=tmp_path / "cache")
    fourfold.quantize(sharded, out, "w4a16_nvfp4_default", output=OutputConfig(verify=False))
    wanted = fourfold.evaluate(sharded, out, options)
    found = fourfold.evaluate(NAME, out, options)
    assert not found.from_cache
    assert found.models == wanted.models
    sizes = sizes_of(sharded)
    sent = {name: hub.sent[name] for name in sizes}
    assert all(sent[name] >= sizes[name] for name in sizes)
    for path in (tmp_path / "home").rglob("*.safetensors"):
        path.unlink()
    again = fourfold.evaluate(NAME, out, options)
    assert again.from_cache
    assert again.models == wanted.models
    assert all(hub.sent[name] - sent[name] <= HEADER for name in sizes)
