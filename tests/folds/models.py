# SPDX-License-Identifier: Apache-2.0
"""A tiny model with outlier channels, and recipes that fold."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES, write_checkpoint
from fourfold.models.folds import Kind, find_folds
from fourfold.models.inventory_builder import take_inventory
from fourfold.sources.safetensors import open_source

_ROLES = "quantize_if_present: [experts, shared_experts, mlp, attention, linear_attention]\n"
W4A4 = "weights: {format: nvfp4, scale: mse}\nactivations: {format: nvfp4}\n" + _ROLES
W4A16 = "weights: {format: nvfp4, scale: mse}\n" + _ROLES
SEQUENTIAL = (
    "weights: {format: nvfp4, scale: gptq_joint, descent: 1}\nactivations: {format: nvfp4}\n"
    "calibration: {propagate: quantized, asymmetric: auto}\n" + _ROLES
)
FOLDS = "folds: {smooth: auto}\n"


def write_outliers(folder: Path, family: str = "qwen3_moe") -> Path:
    """Write a family's tiny model, whose norms have six channels 20 to 100 times larger.

    What reads them is smaller by as much, so that the model computes nothing unusual.
    """
    write_checkpoint(FAMILIES[family], folder)
    source = open_source(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    sizes = torch.ones(64)
    sizes[torch.tensor([5, 20, 22, 37, 50, 60])] = torch.logspace(1.301, 2, 6)
    for fold in find_folds(take_inventory(source), source.config).folds.values():
        if fold.kind is Kind.NORM:
            for region in fold.writers:
                tensors[region.key] = (tensors[region.key].float() * sizes).bfloat16()
            for region in fold.readers:
                part = region.view(tensors[region.key][slice(*region.slab)])
                part.copy_(part.float() / sizes)
    source.close()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def recipe_file(folder: Path, text: str) -> Path:
    """Write a recipe."""
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file
