# SPDX-License-Identifier: Apache-2.0
"""An algorithm with its statistic, a weight format, a layout and a codec, each added in one file.

Nothing of fourfold is changed or patched: each file adds its member to a registry, and a recipe
names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fourfold
from conftest import Written
from executing import assert_same_shards, execute
from fourfold.algorithms import ALGORITHMS
from fourfold.config import OutputConfig, Runtime
from fourfold.formats.base import FORMATS
from fourfold.layouts.base import LAYOUTS
from fourfold.planning import Limits
from fourfold.verification import Severity
from fourfold.verification.readers import READERS
from jobs import flat

from . import int8, reciprocal


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test adds is removed afterwards."""
    before = [(registry, set(registry)) for registry in (ALGORITHMS, FORMATS, LAYOUTS, READERS)]
    yield
    for registry, names in before:
        for name in set(registry) - names:
            del registry[name]


INDEX = "model.safetensors.index.json"


def recipe(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, framework="pt") as handle:
            tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return tensors


def test_a_layout(written: Written, tmp_path: Path) -> None:
    """The codes of the built-in layout, under other names, and reciprocals of its global scales."""
    folder, _ = written("mixtral")
    reciprocal.register()
    text = "quantize: [experts]\nlayout: {}\n"
    options = {"threads": 1, "verify": False}
    for layout in ("modelopt", "reciprocal"):
        fourfold.quantize(
            folder, tmp_path / layout, recipe(tmp_path, text.format(layout)), **flat(**options)
        )
    ours, theirs = read_all(tmp_path / "reciprocal"), read_all(tmp_path / "modelopt")
    linears = json.loads((tmp_path / "reciprocal/packed.json").read_text())
    assert linears
    for name in linears:
        assert torch.equal(ours.pop(f"{name}.packed_codes"), theirs.pop(f"{name}.weight"))
        scales = ours.pop(f"{name}.packed_scale"), theirs.pop(f"{name}.weight_scale")
        assert torch.equal(*(scale.view(torch.uint8) for scale in scales))
        divisor = ours.pop(f"{name}.packed_divisor")
        assert torch.equal(divisor, 1 / theirs.pop(f"{name}.weight_scale_2").reshape(1))
    assert ours.keys() == theirs.keys()
    config = json.loads((tmp_path / "reciprocal/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "reciprocal"
    check_verified(folder, tmp_path / "reciprocal")


def check_verified(source: Path, out: Path) -> None:
    """Its own reader finds it right, by every weight, and sees a wrong scale."""
    report = fourfold.verify(out, source=source)
    assert report.clean, str(report)
    assert len(report.relative_errors) == report.counts.quantized_linears > 0
    assert max(error.relative_error for error in report.relative_errors) < 0.2
    name = min(json.loads((out / "packed.json").read_text()))
    shard = out / json.loads((out / INDEX).read_text())["weight_map"][f"{name}.packed_divisor"]
    tensors = load_file(shard)
    tensors[f"{name}.packed_divisor"] *= 2
    save_file(tensors, shard, metadata={"format": "pt"})
    broken = fourfold.verify(out, source=source)
    errors = {(f.id, f.tensor) for f in broken.findings if f.severity is Severity.ERROR}
    assert ("weight-error", name) in errors


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe_vl", "gpt_oss"])
def test_a_weight_format(family: str, written: Written, tmp_path: Path) -> None:
    """Every expert of a family, fused or not, in a format that NVFP4's geometry does not fit."""
    folder, truth = written(family)
    int8.register()
    reciprocal.register()
    text = "weights: {format: int8_rows, scale: max}\nquantize: [experts]\nlayout: reciprocal\n"
    result = fourfold.quantize(
        folder,
        tmp_path / "out",
        recipe(tmp_path, text),
        runtime=Runtime(threads=1),
        output=OutputConfig(verify=False),
    )
    tensors = read_all(tmp_path / "out")
    experts = len({(path, number) for path, number, _ in truth.experts})
    assert len({(x.layer, x.expert) for x in result.linears}) == experts
    for linear in result.linears:
        codes = tensors[f"{linear.name}.packed_codes"]
        assert codes.dtype == torch.int8
        assert tuple(codes.shape) == linear.shape
        assert linear.relative_error < 0.01
        back = codes.float() * tensors[f"{linear.name}.packed_scale"]
        assert any(
            matrix.shape == back.shape and torch.allclose(matrix.float(), back, atol=0.02)
            for matrix in truth.experts.values()
        )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_rows_that_share_a_scale_are_not_cut_apart(
    family: str, written: Written, tmp_path: Path
) -> None:
    """A weight that is quantized in pieces has the bytes of one that is quantized whole."""
    int8.register()
    reciprocal.register()
    text = "weights: {format: int8_blocks, scale: max}\nquantize: [experts]\nlayout: reciprocal\n"
    file, rows = recipe(tmp_path, text), set()
    for name, limits in (("whole", Limits()), ("pieces", Limits(group_bytes=2048))):
        plan = execute(written(family)[0], tmp_path / name, file, limits, 1)
        rows |= {linear.shape[0] for linear in plan.linears}
    assert max(rows) > int8.Int8Blocks.row_block
    assert_same_shards(tmp_path / "whole", tmp_path / "pieces")
