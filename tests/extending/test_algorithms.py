# SPDX-License-Identifier: Apache-2.0
"""Algorithms added through the registry alone: with a statistic, and with whole scale groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import fourfold
from executing import assert_same_shards
from families import Truth
from fourfold.algorithms import ALGORITHMS, Algorithm, Figures, Weight
from fourfold.config import OutputConfig
from fourfold.formats.base import FORMATS, WeightFormat
from fourfold.layouts.modelopt import ModelOpt
from jobs import flat, ids_file
from nvfp4_folders import tensors_of

from . import int8

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
        model, tmp_path / "out", tmp_path / "busy.yaml", **flat(calib_size=8, **data)
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
    assert not any(name.endswith("input_scale") for name in tensors_of(tmp_path / "out"))
    for scale in ("max", "mse"):
        (tmp_path / f"{scale}.yaml").write_text(f"weights: {{scale: {scale}}}\nquantize: [experts]")
        fourfold.quantize(
            model, tmp_path / scale, tmp_path / f"{scale}.yaml", output=OutputConfig(verify=False)
        )
    tensors = tensors_of(tmp_path / "out")
    alone = {scale: tensors_of(tmp_path / scale) for scale in ("max", "mse")}
    for name, amax in algorithm.seen.items():
        wanted = alone["mse" if amax > 0 else "max"][f"{name}.weight"]
        assert torch.equal(tensors[f"{name}.weight"], wanted)


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
        fourfold.quantize(
            written(name)[0], tmp_path / scale, recipe, output=OutputConfig(verify=False)
        )
    assert_same_shards(tmp_path / "mse", tmp_path / "whole_mse")


def test_modelopt_has_a_name_for_every_part() -> None:
    for fmt in ModelOpt.suffixes:
        parts = {*FORMATS[fmt].parts((16, 64)), *FORMATS[fmt].input_parts()}
        assert parts == set(ModelOpt.suffixes[fmt])


def test_what_a_layout_or_an_algorithm_cannot_do_is_refused(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = written("qwen3_moe")[0], tmp_path / "int8.yaml"
    monkeypatch.setitem(FORMATS, "int8_rows", int8.Int8Rows())
    recipe.write_text("weights: {format: int8_rows, scale: max}\nquantize: [experts]")
    with pytest.raises(fourfold.PlanError, match="no names for int8_rows weights"):
        fourfold.plan(model, recipe)
    recipe.write_text("weights: {format: int8_rows, scale: mse}\nquantize: [experts]")
    with pytest.raises(fourfold.RecipeError, match="mse does not quantize to"):
        fourfold.plan(model, recipe)
    recipe.write_text("activations: {format: int8_rows}\nquantize: [experts]")
    with pytest.raises(fourfold.RecipeError, match="engines do not round activations to int8_rows"):
        fourfold.plan(model, recipe)
