# SPDX-License-Identifier: Apache-2.0
"""The layout with stacked experts: what engines' loaders read, `load`, `verify`, refusals.

`READERS` repeats the loaders' rules for one layer, written from the files that are named there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fourfold
from conftest import Written
from fourfold.config import CalibrationConfig
from fourfold.errors import PlanError, RecipeError, SourceError
from fourfold.layouts.stacked import STACKED
from nvfp4_folders import Tensors, changed, tensors_of

LAYOUT = "modelopt-stacked"
FAMILIES = list(STACKED)
LEVELS = 448 * 6  # what an input's largest magnitude is divided by
RECIPE = """
weights: {format: nvfp4, scale: max, scale_group: layer}
activations: {format: nvfp4}
quantize: [experts]
"""


class Read(NamedTuple):
    """One linear layer of one expert, as a loader hands it to the engine's kernels."""

    codes: Tensor
    block_scale: Tensor
    global_scale: Tensor
    input_scale: Tensor
    """Engines take the largest of the layer."""


Linears = Iterator[tuple[str, Read]]


def muse_spark(t: Tensors, at: str) -> Linears:
    """vLLM: models/muse_spark/common/omni.py renames, common/moe.py
    (MuseSparkConsolidatedRoutedExperts.load_weights) takes apart. SGLang:
    layers/muse_spark/muse_spark_nvfp4_moe.py (create_weights) has tensors of these shapes."""
    up, down = f"{at}.gate_up_proj", f"{at}.down_proj"
    for e in range(len(t[up])):
        for column, name in enumerate(("gate_proj", "up_proj")):
            yield (
                f"{at}.{e}.{name}",
                Read(
                    t[up].chunk(2, dim=1)[column][e],
                    t[f"{up}_weight_scale"].chunk(2, dim=1)[column][e],
                    t[f"{up}_weight_scale_2"][e, column],
                    t[f"{up}_input_scale"].max(),
                ),
            )
        yield (
            f"{at}.{e}.down_proj",
            Read(
                t[down][e],
                t[f"{down}_weight_scale"][e],
                t[f"{down}_weight_scale_2"][e],
                t[f"{down}_input_scale"].max(),
            ),
        )


def inkling(t: Tensors, at: str) -> Linears:
    """vLLM: models/inkling/nvidia/moe.py (InklingMoE.load_expert_weight)."""
    for leaf, names in (("w13_weight", ("gate_proj", "up_proj")), ("w2_weight", ("down_proj",))):
        stack, count = f"{at}.{leaf}", len(names)
        for e in range(len(t[stack])):
            for index, name in enumerate(names):
                yield (
                    f"{at}.{e}.{name}",
                    Read(
                        t[stack][e][index::count],
                        t[f"{stack}.scale"][e][index::count],
                        t[f"{stack}.scale2"][e],
                        t[f"{stack}.input_amax"].max() / LEVELS,
                    ),
                )


def step3p7(t: Tensors, at: str) -> Linears:
    """SGLang: models/step3p5.py (Step3p5ForCausalLM.load_weights) indexes every tensor by the
    expert."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack = f"{at.removesuffix('.experts')}.{name}"
        parts = [t[f"{stack}.{x}"] for x in ("weight", "weight_scale", "weight_scale_2")]
        for e in range(len(parts[0])):
            rows = [part[e] for part in parts]
            yield f"{at}.{e}.{name}", Read(*rows, t[f"{stack}.input_scale"].max())


def llama4(t: Tensors, at: str) -> Linears:
    """TensorRT-LLM: _torch/modules/fused_moe/quantization.py, weight loading mode
    FUSED_GATE_UP_PROJ: transposed, then halved; the other scales belong to the layer."""
    for leaf, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        stack = f"{at}.{leaf}"
        for e in range(len(t[stack])):
            codes, scales = (x[e].transpose(0, 1) for x in (t[stack], t[f"{stack}_weight_scale"]))
            for index, name in enumerate(names):
                yield (
                    f"{at}.{e}.{name}",
                    Read(
                        codes.chunk(len(names), dim=0)[index],
                        scales.chunk(len(names), dim=0)[index],
                        t[f"{stack}_weight_scale_2"],
                        t[f"{stack}_input_scale"],
                    ),
                )


READERS: dict[str, Callable[[Tensors, str], Linears]] = {
    "inkling": inkling,
    "llama4": llama4,
    "muse_spark": muse_spark,
    "step3p7": step3p7,
}

Converted = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def converted(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Family's name → its checkpoint with experts one by one, and stacked."""

    @cache
    def convert(family: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        ids, recipe = folder / "ids.jsonl", folder / "recipe.yaml"
        ids.write_text(json.dumps({"input_ids": list(range(3, 35))}) + "\n")
        recipe.write_text(RECIPE if family == "llama4" else RECIPE.replace("layer", "expert"))
        calibration = CalibrationConfig(ids, calib_size=1, calib_seq=32)
        fourfold.quantize(written(family)[0], folder / "out", recipe, calibration=calibration)
        fourfold.convert(folder / "out", folder / "stacked", layout=LAYOUT)
        return folder / "out", folder / "stacked"

    return convert


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_loaders_read_what_lay_there_one_by_one(family: str, converted: Converted) -> None:
    apart, stacked = map(tensors_of, converted(family))
    linears = {key.removesuffix(".weight_scale_2") for key in apart if key.endswith("scale_2")}
    modules = {re.sub(r"\.\d+\.\w+$", "", name) for name in linears}
    left = {key for key in apart if key.rpartition(".")[0] not in linears}
    assert all(same(apart[key], stacked[key]) for key in left)
    for module in sorted(modules):
        largest = {
            is_down: max(
                float(apart[f"{name}.input_scale"])
                for name in linears
                if name.startswith(f"{module}.") and name.endswith("down_proj") is is_down
            )
            for is_down in (False, True)
        }
        for name, read in READERS[family](stacked, module):
            linears.remove(name)
            assert same(read.codes, apart[f"{name}.weight"])
            assert same(read.block_scale, apart[f"{name}.weight_scale"])
            assert same(read.global_scale, apart[f"{name}.weight_scale_2"])
            scale = largest[name.endswith("down_proj")]
            assert float(read.input_scale) == pytest.approx(scale, rel=2**-22)
    assert not linears


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_and_verifies_like_the_other(
    family: str, converted: Converted, written: Written
) -> None:
    out, stacked = converted(family)
    report, other = (fourfold.verify(x, source=written(family)[0]) for x in (stacked, out))
    assert report.clean, str(report)
    assert report.relative_errors == other.relative_errors
    models = [fourfold.load(x, simulate_activations=True) for x in (out, stacked)]
    one, two = (model.state_dict() for model in models)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    ids = torch.tensor([[5, 9, 11, 60, 7]])
    with torch.no_grad():
        logits, theirs = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(logits, theirs)


def test_only_w4a4_is_stacked(written: Written, tmp_path: Path) -> None:
    fourfold.quantize(written("step3p7")[0], tmp_path / "out", "w4a16_nvfp4_experts_only")
    with pytest.raises(PlanError, match="in W4A4 alone"):
        fourfold.convert(tmp_path / "out", tmp_path / "stacked", layout=LAYOUT)


def test_other_families_are_refused(written: Written, tmp_path: Path) -> None:
    recipe = "nvfp4_experts_only_mse-constant_inputs"
    fourfold.quantize(written("qwen3_moe")[0], tmp_path / "out", recipe)
    with pytest.raises(PlanError, match=r"stacked NVFP4 experts of qwen3_moe\. It is for inkling"):
        fourfold.convert(tmp_path / "out", tmp_path / "stacked", layout=LAYOUT)


def test_llama4_needs_one_global_scale_a_layer(written: Written, tmp_path: Path) -> None:
    recipe = "nvfp4_experts_only_mse-constant_inputs"
    fourfold.quantize(written("llama4")[0], tmp_path / "out", recipe)
    with pytest.raises(PlanError, match=r"one for all experts.*\{scale_group: layer\}"):
        fourfold.convert(tmp_path / "out", tmp_path / "stacked", layout=LAYOUT)


def test_quantize_names_the_second_step(written: Written, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"quantize: [experts]\nlayout: {LAYOUT}\n")
    with pytest.raises(RecipeError, match=f"`fourfold convert` with `layout={LAYOUT}` then"):
        fourfold.quantize(written("step3p7")[0], tmp_path / "out", recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_finds_a_spoilt_scale(family: str, converted: Converted, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        for tensor in tensors.values():
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.uint8).view(-1)[-1] = 0x7F  # NaN

    folder = changed(converted(family)[1], tmp_path / "spoilt", spoil)
    report = fourfold.verify(folder)
    assert not report.clean
    assert report.counts.nan_block_scales > 0


@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_2", "input_scale"])
def test_verify_misses_a_part(ending: str, converted: Converted, tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(f"gate_up_proj_{ending}")]:
            del tensors[key]

    folder = changed(converted("muse_spark")[1], tmp_path / "part", drop)
    rules = {finding.id for finding in fourfold.verify(folder).errors}
    expected = {"weight_scale": "block", "weight_scale_2": "global", "input_scale": "input"}
    assert f"{expected[ending]}-scale-missing" in rules


@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_2"])
def test_load_refuses_parts_that_do_not_fit(
    ending: str, converted: Converted, tmp_path: Path
) -> None:
    def cut(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(f"down_proj_{ending}")]:
            tensors[key] = tensors[key][:-1].clone()

    folder = changed(converted("muse_spark")[1], tmp_path / "cut", cut)
    with pytest.raises(SourceError, match=rf"down_proj_{ending} in .* where stacked NVFP4 has"):
        fourfold.load(folder)


def test_stacks_are_not_carried_over(converted: Converted, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not carried over to another layout"):
        fourfold.convert(converted("step3p7")[1], tmp_path / "back", layout="modelopt")


def test_the_support_page_has_the_families() -> None:
    page = (Path(__file__).parents[1] / "docs" / "support.md").read_text()
    pattern = r"^\| (\w+) \| `[^|]+ \| ([\w, -]+) \| its (?:function|rule): "
    rows = dict(re.findall(pattern, page, re.MULTILINE))
    short = {"vLLM": "vLLM", "SGLang": "SGLang", "TensorRT-LLM": "TRT-LLM"}
    expected = {x: ", ".join(short[e] for e in f.readers) for x, f in STACKED.items()}
    assert rows == expected
