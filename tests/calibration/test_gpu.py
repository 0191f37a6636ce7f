# SPDX-License-Identifier: Apache-2.0
"""Streamed calibration on a CUDA device: what the whole model there computes, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fourfold
from families import FAMILIES, Truth, read_back
from fourfold.calibration.data import load_calibration
from fourfold.config import CalibrationConfig
from jobs import flat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

Written = Callable[[str], tuple[Path, Truth]]
RECIPE = "nvfp4_default_mse-fp8_kv"
SIZES = {"calib_size": 12, "calib_seq": 24, "batch_size": 3}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe_vl", "llama4"])
def test_streamed_and_live_on_the_device(name: str, written: Written, tmp_path: Path) -> None:
    """Activations are parked off the device (and in a file); statistics are the live model's."""
    folder = written(name)[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 90, (20, 30), generator=generator).tolist()
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    streamed = fourfold.quantize(
        folder,
        tmp_path / "streamed",
        RECIPE,
        **flat(calib=[ids], device="cuda", activation_memory=0, **SIZES),
    )
    assert streamed.clean, str(streamed.report)
    options = CalibrationConfig(ids, calib_size=12, calib_seq=24, batch_size=3)
    batches = load_calibration(folder, options, vocab_size=96).batches
    model, _ = read_back(FAMILIES[name], folder)
    model.cuda()

    def loop(model: torch.nn.Module) -> None:
        for batch in batches:
            model(input_ids=batch.input_ids.cuda(), attention_mask=batch.attention_mask.cuda())

    live = fourfold.quantize(model, tmp_path / "live", RECIPE, forward_loop=loop)
    assert live.clean, str(live.report)
    for file in sorted((tmp_path / "streamed").glob("model-*.safetensors")):
        assert file.read_bytes() == (tmp_path / "live" / file.name).read_bytes(), file.name
