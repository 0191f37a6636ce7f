# SPDX-License-Identifier: Apache-2.0
"""MTP layers that follow the decoder's, as GLM-4.5 has them, beside a calibrated KV cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import fourfold
from conftest import Written
from families import mtp
from jobs import flat, ids_file


def test_mtp_layers_need_no_kv_scales(written: Written, tmp_path: Path) -> None:
    """transformers does not run them, so there is nothing to calibrate their cache by."""
    model = Path(shutil.copytree(written("glm4_moe")[0], tmp_path / "model"))
    file, config = model / "model.safetensors", AutoConfig.from_pretrained(model)
    known = load_file(file)
    save_file(known | mtp.deepseek(known, config, seed=0), file, metadata={"format": "pt"})
    data = {"calib": [ids_file(tmp_path)], "calib_seq": 24, "batch_size": 3}
    result = fourfold.quantize(
        model, tmp_path / "out", "nvfp4_default_mse-fp8_kv", **flat(threads=1, **data)
    )
    assert result.report is not None
    assert result.clean, result.report
    assert result.report.counts.kv_scales == 2 * config.num_hidden_layers
    drop(tmp_path / "out", "model.layers.0.self_attn.v_proj.v_scale")
    assert "kv-scale-missing" in {x.id for x in fourfold.verify(tmp_path / "out").errors}


def drop(folder: Path, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop(name)
    left = {key: x for key, x in load_file(shard).items() if key != name}
    save_file(left, shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
