"""Every family that transformers can build, in upstream's layout, goes through quantize and verify.

The judge shares nothing with the writer: it reads OUT with the safetensors package, dequantizes
with its own table, and finds each matrix of the truth among the dequantized ones by its content
alone. Only then are the names looked at.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import fourfold
from families import FAMILIES, Truth

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PROJECTIONS = {
    "gate": {"gate_proj", "w1"},
    "up": {"up_proj", "w3", "v1", "fc3", "wi", "fc1"},
    "down": {"down_proj", "w2", "fc2", "wo"},
}
REFUSED = {"jetmoe": "JetMoeParallelExperts"}
"""Families whose experts cannot be cut out: the error names this module class."""

UNEVEN = {"ernie4_5_vl_moe"}
"""Experts of two widths in one list: without the source, verify takes them for damaged."""

BOUND = 0.2
"""Relative Frobenius error: NVFP4 of Gaussian weights gives 0.08 to 0.1, a stranger's 1.4."""

MOE = [name for name, family in FAMILIES.items() if family.layout != "dense"]


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, framework="pt") as handle:
            tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    assert set(tensors) == set(index["weight_map"])
    return tensors


def dequantize(tensors: dict[str, torch.Tensor], linear: str) -> torch.Tensor:
    packed = tensors[f"{linear}.weight"]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    scale = tensors[f"{linear}.weight_scale"].float().repeat_interleave(16, dim=-1)
    return E2M1[codes] * scale * tensors[f"{linear}.weight_scale_2"]


def quantized_linears(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [
        name.removesuffix(".weight_scale_2") for name in tensors if name.endswith("_scale_2")
    ]  # fmt: skip
    return {name: dequantize(tensors, name) for name in names}


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth.float()).norm() / truth.float().norm())


def match(linears: dict[str, torch.Tensor], truth: dict[object, torch.Tensor]) -> dict[str, object]:
    """Each dequantized linear and the one matrix of the truth that it resembles."""
    matches: dict[str, object] = {}
    for name, matrix in linears.items():
        near = [
            key
            for key, value in truth.items()
            if value.shape == matrix.shape and error(matrix, value) < BOUND
        ]
        assert len(near) == 1, f"{name} resembles {near}"
        matches[name] = near[0]
    return matches


def layer_of(name: str) -> str | None:
    found = re.search(r"(?:layers|blocks?|h)\.(\d+)\.", name)
    return found.group(1) if found else None


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("recipe", ["w4a16_nvfp4_experts_only", "w4a16_nvfp4_experts_only_mse"])
def test_every_family(name: str, recipe: str, written, tmp_path: Path) -> None:
    folder, truth = written(name)
    if name in REFUSED:
        with pytest.raises(fourfold.PlanError, match=REFUSED[name]):
            fourfold.quantize(folder, tmp_path / "out", recipe)
        assert not (tmp_path / "out").exists()
        return
    result = fourfold.quantize(folder, tmp_path / "out", recipe)
    assert result.clean, str(result.report)
    alone = fourfold.verify(tmp_path / "out")
    assert alone.clean or name in UNEVEN, str(alone)
    tensors = read_all(tmp_path / "out")
    linears = quantized_linears(tensors)
    text = {key: value for key, value in truth.experts.items() if not is_tower(key[0])}
    matches = match(linears, dict(text))
    assert sorted(matches.values(), key=str) == sorted(text, key=str)
    for linear, expert in matches.items():
        check_name(linear, expert)
    check_ledger(truth, tensors, linears)


def is_tower(module: str) -> bool:
    return re.search(r"talker|vision_encoder|vision_tower", module) is not None


def check_name(linear: str, expert: object) -> None:
    module, number, projection = expert  # type: ignore[misc]
    parts = linear.split(".")
    assert parts[-1] in PROJECTIONS[projection]
    assert layer_of(linear) == layer_of(module)
    in_list = int(parts[-2].removeprefix("expert_"))
    # ERNIE 4.5 VL numbers its vision experts after its text experts.
    assert in_list == number or ("vision_moe" in module and in_list > number)


def check_ledger(
    truth: Truth, tensors: dict[str, torch.Tensor], linears: dict[str, torch.Tensor]
) -> None:
    """Every source tensor is there bit for bit, or its elements are in what was cut out of it."""
    kept = {
        key for key in truth.raw if key in tensors and key.removesuffix(".weight") not in linears
    }
    for key in kept:
        source, copy = truth.raw[key], tensors[key]
        assert source.dtype == copy.dtype
        assert torch.equal(source.view(torch.uint8), copy.view(torch.uint8)) or source.ndim == 0
    gone = sum(value.numel() for key, value in truth.raw.items() if key not in kept)
    triples = {
        f"{n}.{leaf}" for n in linears for leaf in ("weight", "weight_scale", "weight_scale_2")
    }
    biases = set(tensors) - kept - triples
    assert all(name.endswith(".bias") and ".experts." in name for name in biases)
    made = sum(value.numel() for value in linears.values())
    assert gone == made + sum(tensors[name].numel() for name in biases)
