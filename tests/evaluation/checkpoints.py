# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the embedded model that tests measure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import fourfold
from fourfold.config import EvaluationConfig, OutputConfig
from fourfold.embedded import model_dir
from fourfold.events import Event, WindowEvaluated
from nvfp4_folders import with_input_scales

HELDOUT = Path(model_dir()).parent / "heldout.txt"
LENGTH, WINDOWS = 96, 5


def write_outputs(folder: Path) -> tuple[Path, Path]:
    """The embedded model's linear layers in NVFP4, W4A16 and W4A4."""
    options = OutputConfig(verify=False)
    fourfold.quantize(model_dir(), folder / "w4a16", "w4a16_nvfp4_default", output=options)
    return folder / "w4a16", with_input_scales(
        folder / "w4a16", folder / "w4a4", lambda _: 16 / 2688
    )


def write_fp8(folder: Path, config: Mapping[str, Any]) -> Path:
    """The embedded model's experts in FP8, as another tool writes them: blocks of 128."""
    shutil.copytree(model_dir(), folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        weight = tensors[key].float()
        scales = torch.full([-(-size // 128) for size in weight.shape], weight.abs().max() / 448)
        tensors[key] = (weight / scales[0, 0]).to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=config)
    return folder


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def change_config(folder: Path, **entries: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return folder


def options_for(cache: Path | bool, **options: Any) -> EvaluationConfig:
    """A few short windows, with what the source predicts in the folder `cache`."""
    return EvaluationConfig(
        HELDOUT, **{"length": LENGTH, "windows": WINDOWS, "cache": cache, **options}
    )


class Ran:
    """The models that ran, in order: an `on_event`."""

    def __init__(self) -> None:
        self.models: list[str] = []

    def __call__(self, event: Event) -> None:
        assert isinstance(event, WindowEvaluated)
        if event.model not in self.models:
            self.models.append(event.model)

    def taken(self) -> list[str]:
        models, self.models = self.models, []
        return models
