# SPDX-License-Identifier: Apache-2.0
"""Proves that an NVFP4 checkpoint, dequantized, is the source that it was made of: the same
tensors of the same shapes and dtypes, whatever their layout, their values the dequantized ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fourfold
from families import FAMILIES, LAYOUTS, Truth
from fourfold.config import OutputConfig
from fourfold.errors import SourceError, UsageError
from fourfold.sources.decoded import open_decoded
from fourfold.sources.safetensors import open_source
from fourfold.storage.source import Source
from nvfp4_folders import BOUND, changed, dequantized, linears_in, tensors_of, with_input_scales

Written = Callable[[str], tuple[Path, Truth]]
Made = Callable[[str], Path]

OTHERS = [
    name
    for name, family in FAMILIES.items()
    if name not in {*LAYOUTS, "jetmoe"} and family.layout != "dense" and not family.why_not
]
RECIPE = "w4a16_nvfp4_experts_only"


@pytest.fixture(scope="module")
def made(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Family's name -> its quantized checkpoint. Tests must not write into the folder."""

    @cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp(f"{name}-out") / "out"
        fourfold.quantize(written(name)[0], out, RECIPE, output=OutputConfig(verify=False))
        return out

    return make


def whole(source: Source, key: str) -> torch.Tensor:
    shape = source.tensors[key].shape
    return source.slab(key, 0, shape[0] if shape else 1)


def is_close(found: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool((found.float() - truth.float()).norm() <= BOUND * truth.float().norm())


def check(written: Written, out: Path, name: str) -> None:
    source, found = open_source(written(name)[0]), open_decoded(out)
    assert {key: (info.dtype, info.shape, info.nbytes) for key, info in found.tensors.items()} == {
        key: (info.dtype, info.shape, info.nbytes) for key, info in source.tensors.items()
    }
    kept = tensors_of(out)
    for key in source.tensors:
        tensor = whole(found, key)
        if key in kept and key.removesuffix(".weight") not in found.linears:
            assert torch.equal(tensor, kept[key])
        else:
            assert is_close(tensor, whole(source, key))
    source.close()
    found.close()


@pytest.mark.parametrize("name", LAYOUTS)
def test_has_the_tensors_of_the_source(name: str, written: Written, made: Made) -> None:
    check(written, made(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_family(name: str, written: Written, made: Made) -> None:
    check(written, made(name), name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_are_parts_of_the_whole(name: str, made: Made) -> None:
    found = open_decoded(made(name))
    for key, info in found.tensors.items():
        if not info.shape or info.shape[0] < 3:
            continue
        tensor, rows = whole(found, key), info.shape[0]
        for start, stop in ((0, 1), (rows // 3, rows - 1), (rows - 1, rows)):
            assert torch.equal(found.slab(key, start, stop), tensor[start:stop])
        into = np.empty(info.nbytes // rows * 2, dtype=np.uint8)
        assert torch.equal(found.slab(key, 1, 3, into), tensor[1:3])
        part = np.empty(info.nbytes // 2, dtype=np.uint8)
        found.read_bytes(key, info.nbytes // 3, part)
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert np.array_equal(part, data[info.nbytes // 3 :][: len(part)])
        found.will_need(key, 1, 3)
    found.close()


def test_weights_are_rounded_once(made: Made) -> None:
    """To the source's dtype, or to the one that was asked for."""
    out = made("qwen3_moe")
    tensors = tensors_of(out)
    for dtype, name in ((None, "BF16"), (torch.float32, "F32"), (torch.float16, "F16")):
        found = open_decoded(out, dtype=dtype)
        assert sorted(found.linears) == linears_in(tensors)
        for linear in found.linears:
            info = found.tensors[f"{linear}.weight"]
            expected = dequantized(tensors, linear).to(dtype or torch.bfloat16)
            assert info.dtype == name
            assert torch.equal(whole(found, f"{linear}.weight"), expected)
    assert found.tensors["model.norm.weight"].dtype == "BF16"


def test_fused_weights_are_rounded_once(made: Made) -> None:
    """Interleaved and transposed: expert 2's gate is every second column, from 0."""
    out = made("gpt_oss")
    tensors = tensors_of(out)
    fused = whole(open_decoded(out), "model.layers.1.mlp.experts.gate_up_proj")
    for leaf, columns in (("gate_proj", fused[2, :, 0::2]), ("up_proj", fused[2, :, 1::2])):
        expected = dequantized(tensors, f"model.layers.1.mlp.experts.2.{leaf}").T.bfloat16()
        assert torch.equal(columns, expected)


def test_it_can_be_planned_like_a_source(written: Written, made: Made) -> None:
    source, found = written("qwen3_5_moe_vl")[0], open_decoded(made("qwen3_5_moe_vl"))
    again = fourfold.plan(found, RECIPE).to_dict()
    first = fourfold.plan(source, RECIPE).to_dict()
    by_name = itemgetter("name")
    assert sorted(again["tensors"], key=by_name) == sorted(first["tensors"], key=by_name)
    assert again["side_files"] == first["side_files"]
    assert again["dropped_files"] == first["dropped_files"]
    assert found.config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx"])
def test_it_can_be_quantized_like_a_source(name: str, made: Made, tmp_path: Path) -> None:
    """Weights that are codes times scales already: the same again, to float32's last bits."""
    found = open_decoded(made(name), dtype=torch.float32)
    result = fourfold.quantize(found, tmp_path / "again", RECIPE)
    assert result.clean, str(result.report)
    assert all(linear.relative_error < 1e-6 for linear in result.linears)
    files = {path.name for path in made(name).iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == files


def test_scales_of_inputs_and_kv_cache_are_no_tensors(made: Made, tmp_path: Path) -> None:
    out = made("qwen3_moe")
    assert open_decoded(out).input_scales == {}
    w4a4 = with_input_scales(out, tmp_path / "w4a4", lambda name: len(name) / 1024)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if key.endswith("k_proj.weight"):
                tensors[key.replace("weight", "k_scale")] = torch.tensor(1.0)

    found = open_decoded(changed(w4a4, tmp_path / "kv", add))
    assert found.input_scales == {name: len(name) / 1024 for name in found.linears}
    assert found.tensors.keys() == open_decoded(out).tensors.keys()


# --- checkpoints that are not fourfold's --------------------------------------------------


def without_record(out: Path, folder: Path) -> Path:
    changed(out, folder, lambda tensors: None)
    (folder / "quant_summary.json").unlink()
    return folder


def test_without_a_record_each_linear_layer_has_a_weight(made: Made, tmp_path: Path) -> None:
    out = made("qwen3_moe")
    found = open_decoded(without_record(out, tmp_path / "foreign"))
    ours = open_decoded(out)
    assert found.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(whole(found, key), whole(ours, key)) for key in ours.tensors)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, "F16"),
        ({"torch_dtype": "float32"}, "F32"),
        ({"text_config": {"dtype": "float16"}}, "F16"),
        ({}, "BF16"),
        ({"dtype": "float8_e4m3fn"}, "BF16"),
    ],
)
def test_without_a_record_the_config_says_the_dtype(
    made: Made, tmp_path: Path, config: dict[str, Any], dtype: str
) -> None:
    folder = without_record(made("qwen3_moe"), tmp_path / "foreign")
    (folder / "config.json").write_text(json.dumps(config))
    found = open_decoded(folder)
    assert {found.tensors[f"{linear}.weight"].dtype for linear in found.linears} == {dtype}


def test_a_nested_quantization_config_is_left_out(made: Made, tmp_path: Path) -> None:
    folder = changed(made("qwen3_moe"), tmp_path / "nested", lambda tensors: None)
    config = {"text_config": {"a": 1, "quantization_config": {"quant_algo": "NVFP4"}}}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_decoded(folder).config == {"text_config": {"a": 1}}


# --- what is refused ----------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def put(key: str, value: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change: of the shard where `EXPERT` lies, one tensor is another one, or gone."""
    beside = "model.layers.1.mlp.experts.0.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if beside in tensors:
            tensors.pop(key, None)
            if value is not None:
                tensors[key] = value

    return change


BYTES = torch.zeros(4, 8, dtype=torch.uint8)
BROKEN = [
    (f"{EXPERT}.weight", None, f"{EXPERT}.weight: missing, while"),
    (f"{EXPERT}.weight_scale", None, f"{EXPERT}.weight_scale: missing, while"),
    (f"{EXPERT}.weight_scale_2", None, f"{EXPERT}.weight_scale_2: missing, while"),
    (f"{EXPERT}.weight", BYTES, "codes U8 [4, 8], block scales F8_E4M3 [48, 4]"),
    (f"{EXPERT}.weight", torch.zeros(48, 64), "codes F32 [48, 64]"),
    (f"{EXPERT}.weight_scale_2", torch.ones(2), "global scale F32 [2]: not NVFP4"),
    ("model.layers.1.other.weight", BYTES, "model.layers.1.other.weight in model-"),
    ("model.layers.1.other.weight_scale", torch.ones(1), "of a weight that is not NVFP4"),
    ("model.layers.1.other.input_scale", torch.ones(1), "of a weight that is not NVFP4"),
    ("model.x.weight", torch.ones(2).to(torch.float8_e4m3fn), "F8_E4M3, of a weight"),
]


@pytest.mark.parametrize(("key", "value", "message"), BROKEN)
def test_what_is_not_nvfp4_is_named(
    made: Made, tmp_path: Path, key: str, value: torch.Tensor | None, message: str
) -> None:
    folder = changed(made("qwen3_moe"), tmp_path / "broken", put(key, value))
    with pytest.raises(SourceError, match=re.escape(message)):
        open_decoded(folder)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_named(made: Made, tmp_path: Path, value: float) -> None:
    name = f"{EXPERT}.weight_scale_2"
    folder = changed(made("qwen3_moe"), tmp_path / "global", put(name, torch.tensor(value)))
    with pytest.raises(SourceError, match=re.escape(f"{name}: {value}; a scale must be")):
        whole(open_decoded(folder), f"{EXPERT}.weight")
    w4a4 = with_input_scales(made("qwen3_moe"), tmp_path / "w4a4", lambda name: 1.0)
    name = f"{EXPERT}.input_scale"
    folder = changed(w4a4, tmp_path / "input", put(name, torch.tensor(value)))
    with pytest.raises(SourceError, match=re.escape(f"{name}: {value}; a scale must be")):
        _ = open_decoded(folder).input_scales


def test_a_source_has_no_nvfp4_weights(written: Written) -> None:
    with pytest.raises(SourceError, match="holds no quantized weights"):
        open_decoded(written("qwen3_moe")[0])


def test_a_dtype_that_weights_do_not_have(made: Made) -> None:
    with pytest.raises(UsageError, match=r"weights of torch\.float64 cannot be made"):
        open_decoded(made("qwen3_moe"), dtype=torch.float64)


KEY = "model.layers.1.mlp.experts.gate_up_proj"
GATE, UP = (f"model.layers.1.mlp.experts.2.{leaf}" for leaf in ("gate_proj", "up_proj"))


def entry(record: dict[str, Any], section: str, name: str) -> dict[str, Any]:
    return next(each for each in record[section] if name in (each.get("name"), each.get("key")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: entry(r, "linears", UP)["raw"].update(expert=9), f"{UP}.weight: [48, 64] does"),
        (lambda r: entry(r, "linears", UP)["raw"].update(cols=[1, 98, 2]), "does not fit"),
        (lambda r: entry(r, "linears", UP)["raw"].update(cols=[1, 96, 0]), "raw.cols: "),
        (lambda r: entry(r, "linears", UP)["raw"].update(cols=None), "does not fit"),
        (lambda r: entry(r, "linears", UP)["raw"].update(transposed=False), "does not fit"),
        (lambda r: entry(r, "linears", UP)["raw"].update(key="no"), "no: has no dtype and shape"),
        (lambda r: entry(r, "linears", UP).pop("raw"), "its parts have 21,504 of 24,576 elements"),
        (lambda r: entry(r, "raw_tensors", KEY).update(shape=[4, 64, 128]), "parts have 24,576 of"),
        (lambda r: entry(r, "raw_tensors", KEY).update(dtype="F8_E4M3"), "dtype: Input should be"),
        (lambda r: r["raw_tensors"].clear(), "no dtype and shape in raw_tensors"),
        (lambda r: r["biases"][0].update(name="x"), "x.bias: is not in the checkpoint"),
        (lambda r: r["biases"].pop(), "gate_up_proj_bias: its parts have 336 of 384 elements"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    made: Made, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = changed(made("gpt_oss"), tmp_path / "broken", lambda tensors: None)
    record = json.loads((folder / "quant_summary.json").read_text())
    change(record)
    (folder / "quant_summary.json").write_text(json.dumps(record))
    with pytest.raises(SourceError, match=re.escape(message)):
        open_decoded(folder)
