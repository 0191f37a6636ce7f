# SPDX-License-Identifier: Apache-2.0
"""Jobs whose output is frozen, and the digests of what they write.

Weights are drawn with NumPy, so that they are the same on every machine, and quantized bytes must
not depend on the machine. What calibration measures does (the rounding of matrix products), so
calibrated scalars have a digest of their own, and a probe of each family says whether this machine
rounds as the one did that the digests were taken on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fourfold
from families import FAMILIES, quiet, read_back, write_checkpoint
from jobs import flat
from torch_dist.inverse import to_megatron
from torch_dist.writing import halves, write_torch_dist

RECIPES = {
    "w4a16_experts_max": "w4a16_nvfp4_experts_only",
    "w4a16_default_mse": "w4a16_nvfp4_default_mse",
    "w4a4_default_kv": "nvfp4_default_mse-fp8_kv",
    "w4a16_layer_groups": """
weights: {format: nvfp4, scale: mse, scale_group: layer}
kv_cache: {format: fp8, scale: cast}
quantize: [experts]
quantize_if_present: [mtp, shared_experts, mlp, attention]
keep: ["*.layers.0.*"]
""",
    "w4a4_headroom": """
weights: {format: nvfp4, scale: max}
activations: {format: nvfp4, amax: {headroom: 2}}
calibration: {all_experts: true}
quantize: [experts]
""",
}
"""By short name: a built-in recipe, or one in YAML."""

OTHER_LAYOUT = {
    "w4a16_compressed_tensors": """
weights: {format: nvfp4, scale: mse}
quantize: [experts]
layout: compressed-tensors
""",
    "w4a4_compressed_tensors": """
weights: {format: nvfp4, scale: mse}
activations: {format: nvfp4}
kv_cache: {format: fp8, scale: calibrated}
quantize: [experts]
quantize_if_present: [shared_experts, mlp, attention]
layout: compressed-tensors
""",
}
"""Recipes that two families are quantized with."""

LAYOUTS = (
    "qwen3_moe",
    "mixtral",
    "qwen3_5_moe_vl",
    "gpt_oss",
    "granitemoe",
    "nemotron_h",
    "deepseek_v3_mtp",
    "llama4",
)
"""One family for each way in which experts lie on disk; with MTP, vision towers and biases."""

CALIBRATED = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")


def write_source(name: str, folder: Path) -> Mapping[str, torch.Tensor]:
    """A family's tiny checkpoint, with weights that are the same on every machine."""
    write_checkpoint(FAMILIES[name], folder)
    generator = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for key in sorted(tensors):
        tensor = tensors[key]
        if tensor.is_floating_point():
            tensors[key] = _draw(tensor, generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def _draw(tensor: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Values like a trained weight's: quotients of small integers, with a few outliers."""
    integers = generator.integers(-128, 129, size=tuple(tensor.shape), dtype=np.int64)
    far = generator.integers(0, 64, size=tuple(tensor.shape), dtype=np.int64) == 0
    values = torch.from_numpy(integers * np.where(far, 4, 1)).float()
    if tensor.ndim < 2:
        return (1 + values / 4096).to(tensor.dtype)
    return (values / 1024).to(tensor.dtype)


def write_calibration(folder: Path) -> Path:
    """Token ids that every tiny model knows."""
    generator = np.random.default_rng(1)
    rows = [generator.integers(3, 90, size=30 + n % 7).tolist() for n in range(20)]
    file = folder / "ids.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def recipe_file(name: str, folder: Path) -> str:
    """What `quantize` takes for a recipe of `RECIPES`."""
    recipe = (RECIPES | OTHER_LAYOUT)[name]
    if "\n" not in recipe:
        return recipe
    file = folder / f"{name}.yaml"
    file.write_text(recipe)
    return str(file)


def quantize(model: Any, out: Path, recipe: str, calib: Path, **options: Any) -> None:
    """`fourfold.quantize`, with calibration data where the recipe wants it."""
    chosen = fourfold.Recipe.load(recipe_file(recipe, out.parent))
    data = {"calib": [calib], "calib_size": 9, "calib_seq": 24, "batch_size": 3}
    result = fourfold.quantize(
        model, out, chosen, **flat(threads=1, **data if chosen.needs_calibration else {}, **options)
    )
    assert result.clean, str(result.report)


def of_folder(name: str, recipe: str, work: Path) -> None:
    """A checkpoint's folder."""
    write_source(name, work / "source")
    quantize(work / "source", work / "out", recipe, write_calibration(work))


def of_live_model(name: str, recipe: str, work: Path) -> None:
    """A model of transformers in memory."""
    write_source(name, work / "source")
    model, _ = read_back(FAMILIES[name], work / "source")
    quantize(model, work / "out", recipe, write_calibration(work))


def of_megatron(name: str, recipe: str, work: Path) -> None:
    """A Megatron checkpoint."""
    tensors = write_source(name, work / "source")
    write_torch_dist(work / "megatron", to_megatron(dict(tensors)), halves(-2))
    calib = write_calibration(work)
    quantize(work / "megatron", work / "out", recipe, calib, hf_config=work / "source")


JOBS: dict[str, tuple[Callable[[str, str, Path], None], str, str]] = {
    **{
        f"{name}-{recipe}": (of_folder, name, recipe)
        for name in LAYOUTS
        for recipe in RECIPES
        if (name, recipe) != ("llama4", "w4a4_headroom")  # its experts cannot see every token
    },
    **{
        f"{name}-{recipe}": (of_folder, name, recipe)
        for name in ("qwen3_moe", "gpt_oss")
        for recipe in OTHER_LAYOUT
    },
    "qwen3_moe-live": (of_live_model, "qwen3_moe", "w4a16_default_mse"),
    "qwen3_moe-live-w4a4": (of_live_model, "qwen3_moe", "w4a4_default_kv"),
    "qwen3_moe-megatron": (of_megatron, "qwen3_moe", "w4a16_default_mse"),
    "qwen3_moe-megatron-w4a4": (of_megatron, "qwen3_moe", "w4a4_default_kv"),
}
"""By name: what is quantized, of which family, with which recipe."""


def digests_of(out: Path) -> dict[str, str]:
    """What is frozen of an output: `tensors`, `calibrated` and `config`."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    exact, calibrated = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(_tensors(out, sorted(set(index["weight_map"].values())))):
        digest = calibrated if name.endswith(CALIBRATED) else exact
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        if digest is calibrated:
            exact.update(about.encode())
        digest.update(about.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "tensors": exact.hexdigest(),
        "calibrated": calibrated.hexdigest(),
        "config": _config_digest(out),
    }


def _tensors(out: Path, files: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(out / file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                yield key, handle.get_tensor(key)


def _config_digest(out: Path) -> str:
    """Of the entries on quantization in both config files, but for fourfold's version."""
    stated = [json.loads((out / "config.json").read_text())["quantization_config"]]
    if (out / "hf_quant_config.json").exists():
        stated.append(json.loads((out / "hf_quant_config.json").read_text()))
    for entries in stated:
        entries["producer"].pop("version")
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def probe(name: str, folder: Path) -> str:
    """A digest of what every module of a tiny model gives for batches as calibration draws them.

    Kernels for matrix products are chosen by their shapes, and differ between processors.
    """
    write_source(name, folder)
    digest = hashlib.sha256()
    with quiet():
        model, _ = read_back(FAMILIES[name], folder)
    for module in model.modules():
        module.register_forward_hook(lambda _module, _args, output: _update(digest, output))
    lines = write_calibration(folder).read_text().splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    with torch.no_grad():
        for first in range(0, 18, 3):
            model(torch.tensor([row[:24] for row in rows[first : first + 3]]))
    return digest.hexdigest()


def _update(digest: Any, output: Any) -> None:
    for value in output if isinstance(output, tuple | list) else [output]:
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
