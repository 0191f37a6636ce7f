# SPDX-License-Identifier: Apache-2.0
"""A statistic and an algorithm that needs it, added in one file through the registries alone.

The second moment XᵀX of every linear layer's input, and of every expert's, is compared with one
that plain hooks accumulate over the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourfold
from families import FAMILIES, Truth, quiet, read_back
from fourfold.algorithms import ALGORITHMS, Algorithm, Figures, Weight
from fourfold.calibration.data import load_calibration
from fourfold.calibration.store import StatisticsStore
from fourfold.formats.base import WeightFormat
from fourfold.statistics import STATISTICS, Reduction, Site, State, Statistic
from jobs import flat, ids_file

Written = Callable[[str], tuple[Path, Truth]]

RECIPE = """
weights: {scale: by_moment}
quantize_if_present: [experts, shared_experts, mlp, attention, linear_attention]
"""


class SecondMoment(Statistic):
    """XᵀX of the rows X that reached a site, `[I, I]` or `[E, I, I]`, and their number."""

    name = "moment"
    reduction: Reduction = "sum"

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            "moment": (torch.float64, (*site.lead, site.width, site.width)),
            "moment.rows": (torch.int64, site.lead),
        }

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        rows = rows.double()
        if experts is None:
            state["moment"] += rows.T @ rows
            state["moment.rows"] += len(rows)
            return
        for expert in range(len(state["moment"])):
            mine = rows[(experts == expert).reshape(len(rows), -1).any(-1)]
            state["moment"][expert] += mine.T @ mine
            state["moment.rows"][expert] += len(mine)


class ByMoment(Algorithm):
    """`mse`; it keeps the statistics that it is given."""

    name = "by_moment"
    needs = frozenset({"moment"})

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        for weight in weights:
            self.moments[weight.name] = weight.statistics["moment"].clone()
            self.rows[weight.name] = int(weight.statistics["moment.rows"])
        return ALGORITHMS["mse"].quantize(weights, fmt)


def plain_moments(model: Any, batches: Any) -> dict[str, tuple[Tensor, int]]:
    """By module path: of linear layers by hooks; of experts by the router's choice, computed by the
    formula of `down(silu(gate x) · up x)`. Experts' products are named `<module>.<expert>.down`."""
    moments: dict[str, tuple[Tensor, int]] = {}

    def add(path: str, rows: Tensor) -> None:
        rows = rows.reshape(-1, rows.shape[-1]).double()
        moment, count = moments.get(path, (torch.zeros(rows.shape[1], rows.shape[1]), 0))
        moments[path] = moment + rows.T @ rows, count + len(rows)

    def experts(path: str, module: Any, args: Any) -> None:
        hidden, index = args[0], args[1]
        for expert in range(len(module.gate_up_proj)):
            rows = hidden[(index == expert).any(-1)]
            gate, up = nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
            add(f"{path}.{expert}.gate_up", rows)
            add(f"{path}.{expert}.down", module.act_fn(gate) * up)

    for path, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            module.register_forward_pre_hook(lambda m, args, path=path: experts(path, m, args))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, use_cache=False)
    return moments


@pytest.fixture
def algorithm(monkeypatch: pytest.MonkeyPatch) -> ByMoment:
    algorithm = ByMoment()
    monkeypatch.setitem(STATISTICS, "moment", SecondMoment())
    monkeypatch.setitem(ALGORITHMS, "by_moment", algorithm)
    return algorithm


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_second_moments_reach_the_algorithm(
    name: str, algorithm: ByMoment, written: Written, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    model, ids = written(name)[0], ids_file(tmp_path)
    options = flat(calib=[ids], calib_seq=24, calib_size=8, threads=1)
    result = fourfold.quantize(model, tmp_path / "out", tmp_path / "recipe.yaml", **options)
    assert result.clean, result.report
    assert algorithm.moments.keys() == {linear.name for linear in result.plan.linears}

    calibration = options["calibration"]
    data = load_calibration(
        model,
        calibration,
        vocab_size=result.plan.inventory.vocab_size,
        max_positions=result.plan.inventory.max_positions,
    )
    with quiet():
        whole, _ = read_back(FAMILIES[name], model)
    wanted = plain_moments(whole.eval(), data.batches)
    for linear in result.plan.linears:
        path = linear.module
        if linear.expert is not None:
            product = "down" if linear.name.endswith("down_proj") else "gate_up"
            path = f"{path}.{linear.expert}.{product}"
        moment, rows = wanted[path]
        assert algorithm.rows[linear.name] == rows
        torch.testing.assert_close(
            algorithm.moments[linear.name], moment.double(), rtol=1e-2, atol=1e-3
        )
    qkv = [
        x for x in result.plan.linears if "layers.0.self_attn" in x.name and "o_proj" not in x.name
    ]
    if name == "qwen3_moe":
        assert len({result.plan.site_of(linear, "moment") for linear in qkv}) == 1 < len(qkv)


def test_the_plan_counts_their_memory(
    algorithm: ByMoment, written: Written, tmp_path: Path
) -> None:
    memory = {}
    for scale in ("by_moment", "mse"):
        recipe = tmp_path / f"{scale}.yaml"
        recipe.write_text(
            f"weights: {{scale: {scale}}}\nactivations: {{format: nvfp4}}\nquantize: [experts]"
        )
        memory[scale] = fourfold.plan(written("qwen3_moe")[0], recipe).calibration_memory
    plan = fourfold.plan(written("qwen3_moe")[0], tmp_path / "by_moment.yaml")
    widths = {linear.input_site: linear.shape[1] for linear in plan.linears if linear.layer == 1}
    assert memory["by_moment"] - memory["mse"] == sum(4 * (8 * w * w + 8) for w in widths.values())


def test_large_statistics_are_not_kept(
    algorithm: ByMoment, written: Written, tmp_path: Path
) -> None:
    """They are dropped with their layer; the file that is left does not serve the recipe again."""
    (tmp_path / "recipe.yaml").write_text("weights: {scale: by_moment}\nquantize: [experts]")
    model, ids = written("qwen3_moe")[0], ids_file(tmp_path)
    result = fourfold.quantize(
        model,
        tmp_path / "out",
        tmp_path / "recipe.yaml",
        **flat(calib=[ids], calib_seq=24, calib_size=8),
    )
    assert result.statistics is not None
    assert {x for state in result.statistics.sites.values() for x in state} == {"amax", "tokens"}
    assert StatisticsStore(tmp_path / "out" / ".fourfold" / "statistics").load() == {}
    with pytest.raises(fourfold.CalibrationError, match="needs the statistic moment"):
        fourfold.quantize(
            model,
            tmp_path / "again",
            tmp_path / "recipe.yaml",
            **flat(statistics=tmp_path / "out" / "calibration.safetensors", verify=False),
        )
