# SPDX-License-Identifier: Apache-2.0
"""Sources that keep their experts fused: every expert finds its matrix, and only its own.

The truth (each expert's matrix [out, in]) comes from the modules in memory, not from fourfold.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from families.checkpoint import write_checkpoint
from families.table import FAMILIES
from families.truth import Truth
from fourfold.verification import Report, verify

from .build import flat_config, nested_config, pack, write_tensors

LAYOUTS = {
    "qwen3_5_moe": "fused",
    "llama4": "transposed",
    "gpt_oss": "transposed, gate and up interleaved, with biases",
    "granitemoe": "fused, renamed",
    "mixtral": "one tensor per expert",
}
LAST = {"mixtral": {"gate": "w1", "up": "w3", "down": "w2"}}
OURS = {
    "tensor-lost", "tensor-extra", "copied-bits-differ", "copied-dtype-differs",
    "copied-shape-differs", "quantized-shape-differs", "weight-error", "weight-error-outlier",
    "group-scale-differs", "group-partial", "expert-missing", "projection-missing",
}  # fmt: skip


def output(family: str, truth: Truth) -> dict[str, Tensor]:
    """Experts quantized, one linear each; the rest as it is."""
    fused = {key for key in truth.raw if ".experts." in key or "_linear.weight" in key}
    tensors = {key: tensor for key, tensor in truth.raw.items() if key not in fused}
    last = LAST.get(family, {part: f"{part}_proj" for part in ("gate", "up", "down")})
    named: dict[str, Tensor] = {}
    for (module, expert, part), matrix in truth.experts.items():
        if family == "mixtral":
            module = module.replace(".mlp.", ".block_sparse_moe.")
        named[f"{module}.{expert}.{last[part]}.weight"] = matrix
    for key in named:
        tensors.update(pack(key.removesuffix(".weight"), named, "W4A16_NVFP4"))
    tensors.update(_biases(family, truth))
    return tensors


def _biases(family: str, truth: Truth) -> dict[str, Tensor]:
    if family != "gpt_oss":
        return {}
    found = {}
    for key, tensor in truth.raw.items():
        stem = key.removesuffix("_bias")
        module = stem.rpartition(".")[0]
        for expert, bias in enumerate(tensor if stem != key else ()):
            if stem.endswith("down_proj"):
                found[f"{module}.{expert}.down_proj.bias"] = bias
            elif stem.endswith("gate_up_proj"):
                found[f"{module}.{expert}.gate_proj.bias"] = bias[0::2].clone()
                found[f"{module}.{expert}.up_proj.bias"] = bias[1::2].clone()
    return found


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    truth = write_checkpoint(FAMILIES[family], folder / "source")
    return folder / "source", output(family, truth)


def report_on(tensors: dict[str, Tensor], source: Path, out: Path) -> Report:
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = flat_config("W4A16_NVFP4", [], False, [])
    (out / "config.json").write_text(json.dumps(config))
    nested = nested_config("W4A16_NVFP4", [], False, [])
    (out / "hf_quant_config.json").write_text(json.dumps(nested))
    write_tensors(out, tensors, 1)
    return verify(out, source=source)


def ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings} & OURS


def weights_of(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix("_scale_2") for name in tensors if name.endswith("weight_scale_2")]


def test_every_expert_finds_its_matrix(made, tmp_path: Path) -> None:
    source, tensors = made
    report = report_on(tensors, source, tmp_path / "out")
    assert ids(report) == set()
    assert report.counts.compared_linears == len(weights_of(tensors))
    assert report.worst[0].relative_error < 0.15


def test_the_last_two_experts_swapped(made, tmp_path: Path) -> None:
    source, tensors = made[0], dict(made[1])
    down = [w for w in weights_of(tensors) if w.endswith(("down_proj.weight", "w2.weight"))][-2:]
    for part in ("", "_scale", "_scale_2"):
        a, b = (f"{name}{part}" for name in down)
        tensors[a], tensors[b] = tensors[b], tensors[a]
    report = report_on(tensors, source, tmp_path / "out")
    assert {f.tensor for f in report.findings if f.id == "weight-error"} == {
        name.removesuffix(".weight") for name in down
    }


def test_a_split_expert_that_is_not_quantized_is_compared_bit_for_bit(made, tmp_path) -> None:
    source, tensors = made[0], dict(made[1])
    name = weights_of(tensors)[0]
    report = report_on(tensors, source, tmp_path / "clean")
    before = report.counts.copied_tensors
    for part in ("_scale", "_scale_2"):
        del tensors[f"{name}{part}"]
    codes = tensors[name]
    tensors[name] = torch.zeros(codes.shape[0], codes.shape[1] * 2, dtype=torch.bfloat16)
    report = report_on(tensors, source, tmp_path / "out")
    assert ids(report) == {"copied-bits-differ", "group-partial"}
    assert report.counts.copied_tensors == before + 1


def test_a_lost_expert_is_told_by_its_own_name(made, tmp_path: Path) -> None:
    source, tensors = made[0], dict(made[1])
    name = weights_of(tensors)[-1]
    for part in ("", "_scale", "_scale_2"):
        del tensors[f"{name}{part}"]
    report = report_on(tensors, source, tmp_path / "out")
    lost = {f.tensor.removesuffix(".weight") for f in report.findings if f.id == "tensor-lost"}
    assert lost == {name.removesuffix(".weight")}


def test_a_fused_tensor_beside_its_experts_is_extra(made, tmp_path: Path) -> None:
    source, tensors = made
    with safe_open(source / "model.safetensors", "pt") as file:
        fused = [key for key in file.keys() if file.get_tensor(key).ndim == 3]  # noqa: SIM118
        fused = [key for key in fused if key not in tensors][:1]
        added = {key: file.get_tensor(key) for key in fused}
    report = report_on(tensors | added, source, tmp_path / "out")
    assert [f.tensor for f in report.findings if f.id == "tensor-extra"] == fused
