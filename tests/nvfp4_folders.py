# SPDX-License-Identifier: Apache-2.0
"""What tests do to NVFP4 checkpoints: read them without fourfold, and make new ones of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

Tensors = dict[str, Tensor]


def shards_of(folder: Path) -> dict[str, Tensors]:
    """Every shard that the index names, by its file's name."""
    names = set(weight_map_of(folder).values())
    return {name: load_file(folder / name) for name in sorted(names)}


def tensors_of(folder: Path) -> Tensors:
    return {key: value for shard in shards_of(folder).values() for key, value in shard.items()}


def weight_map_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write(folder: Path, shards: dict[str, Tensors]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps(index))


def changed(out: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of the checkpoint `out` in `folder`, where `change` was done to every shard."""
    shutil.copytree(out, folder)
    shards = shards_of(folder)
    for tensors in shards.values():
        change(tensors)
    write(folder, shards)
    return folder


def linears_in(tensors: Tensors) -> list[str]:
    ending = ".weight_scale_2"
    return sorted(key.removesuffix(ending) for key in tensors if key.endswith(ending))


def dequantized(tensors: Tensors, linear: str) -> Tensor:
    """fl32(q · fl32(s·S)), as the definition has it."""
    packed = tensors[f"{linear}.weight"]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    scale = tensors[f"{linear}.weight_scale"].float() * tensors[f"{linear}.weight_scale_2"]
    return E2M1[codes] * scale.repeat_interleave(16, dim=-1)


def with_input_scales(out: Path, folder: Path, scale_of: Callable[[str], float]) -> Path:
    """A W4A4 copy of a W4A16 checkpoint; `scale_of` gives the input scale of a linear layer."""

    def add(tensors: Tensors) -> None:
        for linear in linears_in(tensors):
            tensors[f"{linear}.input_scale"] = torch.tensor(scale_of(linear), dtype=torch.float32)

    changed(out, folder, add)
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = group["weights"]
    config["quantization_config"]["quant_algo"] = "NVFP4"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BOUND = 0.2
"""Relative Frobenius error: NVFP4 of Gaussian weights gives 0.08 to 0.1, a stranger's 1.4."""


def resembles(found: Tensor, truth: Tensor, bound: float = BOUND) -> bool:
    if found.shape != truth.shape:
        return False
    return float((found - truth.float()).norm() / truth.float().norm()) < bound


def match(linears: Tensors, truth: dict[object, Tensor], bound: float = BOUND) -> dict[str, object]:
    """Each dequantized linear and the one matrix of the truth that it resembles."""
    matches: dict[str, object] = {}
    for name, matrix in linears.items():
        near = [key for key, value in truth.items() if resembles(matrix, value, bound)]
        assert len(near) == 1, f"{name} resembles {near}"
        matches[name] = near[0]
    return matches
