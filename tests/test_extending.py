"""An algorithm, a weight format and a layout, each added through a registry alone.

Nothing of fourfold is changed or patched: the new member is registered, a recipe names it, and the
checkpoint that comes out holds what the new member says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fourfold
from executing import assert_same_shards
from families import Truth
from fourfold.algorithms import ALGORITHMS, Algorithm, Figures, Weight
from fourfold.formats.base import FORMATS, Spec, WeightFormat
from fourfold.layouts import LAYOUTS, CheckpointContents, Layout
from fourfold.layouts.modelopt import ModelOpt
from jobs import ids_file
from test_quantize_families import read_all

Written = Callable[[str], tuple[Path, Truth]]


class BusyExperts(Algorithm):
    """`max` for weights that saw few tokens, `mse` for the others: it looks at a statistic, and is
    given each group whole."""

    name = "busy"
    needs = frozenset({"amax"})

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        amaxes = [fmt.amax(weight.matrix_OI, name=weight.name) for weight in weights]
        group_scale = fmt.group_scale(max(amaxes))
        figures = []
        for weight, amax in zip(weights, amaxes, strict=True):
            self.seen[weight.name] = float(weight.statistics["amax"])
            scale = "mse" if weight.statistics["amax"] > 0 else "max"
            sums = fmt.quantize(
                weight.matrix_OI, weight.out, scale=scale, group_scale=group_scale, name=weight.name
            )
            figures.append(Figures(amax, *sums))
        return group_scale, figures


def test_an_algorithm_with_a_statistic(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = BusyExperts()
    monkeypatch.setitem(ALGORITHMS, "busy", algorithm)
    (tmp_path / "busy.yaml").write_text("weights: {scale: busy}\nquantize: [experts]")
    model, data = written("qwen3_moe")[0], {"calib": [ids_file(tmp_path)], "calib_seq": 24}
    result = fourfold.quantize(
        model, tmp_path / "out", tmp_path / "busy.yaml", calib_size=8, **data
    )
    assert result.clean, result.report
    assert {name for names in result.plan.statistics.values() for name in names} > algorithm.needs
    assert set(algorithm.seen) == {linear.name for linear in result.plan.linears}
    assert result.statistics is not None
    for linear in result.plan.linears:
        experts = result.statistics.experts[linear.module]
        is_down = linear.name.endswith("down_proj")
        amaxes = experts.down_amax if is_down else experts.gate_up_amax
        assert algorithm.seen[linear.name] == float(amaxes[linear.expert])
    assert not any(name.endswith("input_scale") for name in read_all(tmp_path / "out"))
    for scale in ("max", "mse"):
        (tmp_path / f"{scale}.yaml").write_text(f"weights: {{scale: {scale}}}\nquantize: [experts]")
        fourfold.quantize(model, tmp_path / scale, tmp_path / f"{scale}.yaml", verified=False)
    tensors = read_all(tmp_path / "out")
    alone = {scale: read_all(tmp_path / scale) for scale in ("max", "mse")}
    for name, amax in algorithm.seen.items():
        wanted = alone["mse" if amax > 0 else "max"][f"{name}.weight"]
        assert torch.equal(tensors[f"{name}.weight"], wanted)


class RowInt8(WeightFormat):
    """int8 codes and a float32 scale for each row: no blocks, and nothing that a group shares."""

    name = "row_int8"
    title = "INT8"
    block = 1
    scales = frozenset({"max"})
    worst_error = 0.1

    def parts(self, shape: tuple[int, int]) -> dict[str, Spec]:
        return {"codes": ("I8", shape), "row_scale": ("F32", (shape[0], 1))}

    def amax(self, weight: torch.Tensor, *, name: str) -> float:
        return float(weight.abs().max())

    def quantize(
        self,
        w_OI: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        *,
        scale: str,
        group_scale: float | None,
        name: str,
    ) -> tuple[float, float]:
        assert (scale, group_scale) == ("max", None)
        w_OI = w_OI.float()
        scale_O1 = w_OI.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
        codes_OI = (w_OI / scale_O1).round()
        out["codes"].view(torch.int8).copy_(codes_OI)
        out["row_scale"].view(torch.float32).copy_(scale_O1)
        d_OI = (w_OI - codes_OI * scale_O1).double()
        return float((d_OI * d_OI).sum()), float((w_OI.double() ** 2).sum())

    def dequantize(
        self, parts: Mapping[str, torch.Tensor], group_scale: float | None, out_OI: torch.Tensor
    ) -> None:
        codes, scale = parts["codes"].view(torch.int8), parts["row_scale"].view(torch.float32)
        out_OI.copy_(codes.float() * scale)

    def error(
        self, w_OI: torch.Tensor, parts: Mapping[str, torch.Tensor], group_scale: float | None
    ) -> tuple[float, float]:
        out_OI = torch.empty(w_OI.shape)
        self.dequantize(parts, group_scale, out_OI)
        d_OI = w_OI.double() - out_OI.double()
        return float((d_OI * d_OI).sum()), float((w_OI.double() ** 2).sum())


class Plain(Layout):
    """A layout for both formats, with a reciprocal of the global scale in a tensor of shape [1]."""

    name = "plain"
    marker_files = ("plain.json",)
    suffixes = {  # noqa: RUF012
        "row_int8": {"codes": "weight", "row_scale": "weight_scale"},
        "nvfp4": {
            "codes": "weight_packed",
            "block_scale": "weight_scale",
            "global_scale": "weight_global_scale",
            "input_scale": "input_global_scale",
        },
    }

    def encoded(self, part: str, spec: Spec) -> Spec:
        return (spec[0], (1,)) if part.endswith(("global_scale", "input_scale")) else spec

    def encode(self, part: str, value: float) -> np.ndarray[Any, Any]:
        return np.array([1 / np.float32(value)], dtype=np.float32)

    def is_leftover(self, name: str, dtype: str) -> bool:
        return dtype == "U8"

    def kv_scale_names(self, linears: Iterable[str]) -> dict[str, tuple[str, str]]:
        return {}

    def ignore(self, quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
        return list(kept)

    def quantization_config(self, contents: CheckpointContents) -> dict[str, Any]:
        return {"quant_method": "plain", "ignore": list(contents.ignore)}

    def config_files(self, contents: CheckpointContents) -> dict[str, dict[str, Any]]:
        return {"plain.json": {name: str(scheme) for name, scheme in contents.schemes.items()}}

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return "plain" in str(config.get("quantization_config"))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "plain", Plain())


@pytest.mark.usefixtures("plain")
def test_a_layout(written: Written, tmp_path: Path) -> None:
    """The codes are those of ModelOpt, under other names and with other global scales."""
    model = written("qwen3_5_moe")[0]
    text = "quantize: [experts]\nquantize_if_present: [attention]\n"
    for layout in ("plain", "modelopt"):
        (tmp_path / f"{layout}.yaml").write_text(f"{text}layout: {layout}")
        recipe = tmp_path / f"{layout}.yaml"
        result = fourfold.quantize(model, tmp_path / layout, recipe, verified=False)
    ours, theirs = read_all(tmp_path / "plain"), read_all(tmp_path / "modelopt")
    for linear in result.linears:
        name = linear.name
        assert torch.equal(ours[f"{name}.weight_packed"], theirs[f"{name}.weight"])
        (inverse,) = ours[f"{name}.weight_global_scale"].tolist()
        assert inverse == float(1 / np.float32(linear.global_scale))
    assert len(ours) == len(theirs)
    marker = json.loads((tmp_path / "plain" / "plain.json").read_text())
    assert set(marker) == {linear.name for linear in result.linears}
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "plain"
    assert [x for x in LAYOUTS.values() if x.recognizes(config)] == [LAYOUTS["plain"]]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_format(
    name: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "row_int8", RowInt8())
    model, truth = written(name)
    weights = "weights: {format: row_int8, scale: max}\n"
    (tmp_path / "int8.yaml").write_text(f"{weights}quantize: [experts]\nlayout: plain")
    result = fourfold.quantize(model, tmp_path / "out", tmp_path / "int8.yaml", verified=False)
    tensors = read_all(tmp_path / "out")
    assert len(result.linears) == len(truth.experts)
    for linear in result.linears:
        assert linear.global_scale is None
        assert 0 < linear.relative_error < 0.02
        codes = tensors[f"{linear.name}.weight"]
        assert codes.dtype == torch.int8
        assert tuple(codes.shape) == linear.shape
        assert int(codes.abs().max()) == 127
    (tmp_path / "modelopt.yaml").write_text(f"{weights}quantize: [experts]")
    with pytest.raises(fourfold.PlanError, match="no names for row_int8 weights"):
        fourfold.plan(model, tmp_path / "modelopt.yaml")
    (tmp_path / "mse.yaml").write_text("weights: {format: row_int8}\nquantize: [experts]")
    with pytest.raises(fourfold.RecipeError, match="mse does not quantize to INT8"):
        fourfold.plan(model, tmp_path / "mse.yaml")


class WholeMSE(Algorithm):
    """`mse`, without saying that it works row by row."""

    name = "whole_mse"

    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        return ALGORITHMS["mse"].quantize(weights, fmt)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_whole_group_gives_the_bytes_of_its_pieces(
    name: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "whole_mse", WholeMSE())
    for scale in ("mse", "whole_mse"):
        recipe = tmp_path / f"{scale}.yaml"
        recipe.write_text(f"weights: {{scale: {scale}}}\nquantize: [experts]")
        fourfold.quantize(written(name)[0], tmp_path / scale, recipe, verified=False)
    assert_same_shards(tmp_path / "mse", tmp_path / "whole_mse")


def test_modelopt_has_a_name_for_every_part() -> None:
    for fmt in ModelOpt.suffixes:
        parts = {*FORMATS[fmt].parts((16, 64)), *FORMATS[fmt].input_parts()}
        assert parts == set(ModelOpt.suffixes[fmt])
