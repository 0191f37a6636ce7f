# SPDX-License-Identifier: Apache-2.0
"""Input scales that are not the largest input observed: constant ones, and those of a histogram.

A constant scale needs no data and runs no model. A histogram's is compared with percentiles of the
block amaxes that plain hooks on the whole model see.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fourfold
from families import FAMILIES, Truth, quiet, read_back
from fourfold.calibration.scales import histogram_amax
from fourfold.statistics import BLOCK_AMAXES, STATISTICS, Site
from fourfold.statistics.block_amaxes import BINS, percentile
from jobs import assert_same, flat, ids_file, start
from nvfp4_folders import tensors_of
from test_ranks import on_ranks

Written = Callable[[str], tuple[Path, Truth]]

EVERYTHING = "quantize_if_present: [experts, shared_experts, mlp, attention, linear_attention]\n"


def recipe(folder: Path, amax: str, rest: str = EVERYTHING) -> Path:
    file = folder / f"{amax}.yaml"
    file.write_text(f"activations: {{format: nvfp4, amax: {amax}}}\n{rest}")
    return file


def input_scales(folder: Path) -> dict[str, float]:
    tensors = tensors_of(folder)
    return {name: float(x) for name, x in tensors.items() if name.endswith(".input_scale")}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ids_file(tmp_path_factory.mktemp("calib"))


# ---------------------------------------------------------------------------------- constant


def test_constant_scales_need_no_data(written: Written, tmp_path: Path) -> None:
    """The source has no tokenizer, and its model is not run; all other bytes are those of W4A16."""
    model = written("qwen3_moe")[0]
    assert not list(model.glob("tokenizer*"))
    chosen = recipe(tmp_path, "constant")
    plan = fourfold.plan(model, chosen)
    assert not plan.needs_calibration
    assert plan.calibration_memory == 0
    assert any("scale 1 (amax: constant)" in note for note in plan.notes)
    result = fourfold.quantize(model, tmp_path / "out", chosen)
    assert result.clean, result.report
    scales = input_scales(tmp_path / "out")
    assert scales.keys() == {f"{linear.name}.input_scale" for linear in plan.linears}
    assert set(scales.values()) == {1.0}
    assert not (tmp_path / "out" / "calibration.safetensors").exists()
    summary = json.loads((tmp_path / "out" / "quant_summary.json").read_text())
    assert summary["calibration"] is None
    assert {x["input_scale"] for x in summary["linears"]} == {1.0}
    assert {x["input_amax"] for x in summary["linears"]} == {None}
    assert "all input scales are 1" in (tmp_path / "out" / "README.md").read_text()
    assert "all input scales are 1" in (tmp_path / "out" / "report.html").read_text()

    (tmp_path / "w4a16.yaml").write_text(EVERYTHING)
    fourfold.quantize(model, tmp_path / "w4a16", tmp_path / "w4a16.yaml")
    weights = tensors_of(tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "w4a16").items():
        mine, other = (x.reshape(-1).view(torch.uint8) for x in (weights[name], tensor))
        assert torch.equal(mine, other), name


def test_constant_scales_are_simulated(written: Written, tmp_path: Path) -> None:
    fourfold.quantize(written("qwen3_moe")[0], tmp_path / "out", recipe(tmp_path, "constant"))
    model: Any = fourfold.load(tmp_path / "out", simulate_activations=True)
    assert {x.scale for x in model.fourfold_simulation.sites.linears.values()} == {1.0}


def test_constant_scales_reach_mtp_layers(written: Written, tmp_path: Path) -> None:
    """transformers does not run them, so scales that are measured are refused."""
    roles = "quantize: [experts, mtp]\n"
    model = written("deepseek_v3_mtp")[0]
    with pytest.raises(fourfold.RecipeError, match="MTP"):
        fourfold.plan(model, recipe(tmp_path, "max", roles))
    result = fourfold.quantize(model, tmp_path / "out", recipe(tmp_path, "constant", roles))
    assert result.clean, result.report
    assert any(linear.role == "mtp" for linear in result.linears)


def test_data_is_refused_with_constant_scales(written: Written, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(fourfold.UsageError, match="constant"):
        fourfold.quantize(
            written("qwen3_moe")[0],
            tmp_path / "out",
            recipe(tmp_path, "constant"),
            **flat(calib=[ids]),
        )
    every = f"calibration: {{all_experts: true}}\n{EVERYTHING}"
    with pytest.raises(fourfold.RecipeError, match="all_experts"):
        fourfold.plan(written("qwen3_moe")[0], recipe(tmp_path, "constant", every))


def test_constant_scales_beside_observed_ones(written: Written, ids: Path, tmp_path: Path) -> None:
    """Only the layers of the other rule are observed, and no expert counts as unreached."""
    file = tmp_path / "both.yaml"
    file.write_text(
        "rules:\n"
        "  - {roles: [experts], activations: {format: nvfp4, amax: constant}}\n"
        "  - {roles: [attention], activations: {format: nvfp4, amax: max}}\n"
    )
    result = fourfold.quantize(
        written("qwen3_moe")[0], tmp_path / "out", file, **flat(calib=[ids], calib_seq=24)
    )
    assert result.clean, result.report
    assert {linear.role for linear in result.plan.observed} == {"attention"}
    for name, scale in input_scales(tmp_path / "out").items():
        assert (scale == 1.0) == (".experts." in name), name
    summary = json.loads((tmp_path / "out" / "quant_summary.json").read_text())
    assert summary["calibration"]["unreached_experts"] == 0


def test_one_site_has_one_origin(written: Written, tmp_path: Path) -> None:
    file = tmp_path / "split.yaml"
    file.write_text(
        "rules:\n"
        '  - {names: ["*.q_proj"], activations: {format: nvfp4, amax: constant}}\n'
        "  - {roles: [attention], activations: {format: nvfp4, amax: max}}\n"
    )
    with pytest.raises(fourfold.PlanError, match="q_proj"):
        fourfold.plan(written("qwen3_moe")[0], file)


# --------------------------------------------------------------------------------- histogram


def block_amaxes(model: Any, batches: Any) -> dict[str, torch.Tensor]:
    """The block amaxes of every input site, by plain hooks: of experts, by the router's choice."""
    blocks: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(path: str, rows: torch.Tensor) -> None:
        blocks[path].append(rows.reshape(-1, 16).abs().amax(-1).float())

    def experts(path: str, module: Any, args: Any) -> None:
        hidden, index = args[0], args[1]
        for expert in range(len(module.gate_up_proj)):
            rows = hidden[(index == expert).any(-1)]
            gate, up = torch.nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, -1)
            add(f"{path}.gate_up", rows)
            add(f"{path}.down", module.act_fn(gate) * up)

    for path, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            module.register_forward_pre_hook(lambda m, args, path=path: experts(path, m, args))
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, use_cache=False)
    return {path: torch.cat(parts) for path, parts in blocks.items()}


def wanted_amax(amaxes: torch.Tensor) -> tuple[float, float]:
    """The bounds of what the formula may give, where a bin is 1/32 of its octave wide."""
    sizes = amaxes[amaxes > 0].double().numpy()
    small, large = np.percentile(sizes, [1, 99.99], method="inverted_cdf")
    return max(2**14 * small / (1 + 1 / 32), large), max(2**14 * small, large * (1 + 1 / 32))


def test_histogram_scales_are_those_of_plain_hooks(
    written: Written, ids: Path, tmp_path: Path
) -> None:
    from fourfold.calibration.data import load_calibration

    model, options = written("qwen3_moe")[0], flat(calib=[ids], calib_seq=24, calib_size=8)
    result = fourfold.quantize(model, tmp_path / "out", recipe(tmp_path, "histogram"), **options)
    assert result.clean, result.report
    data = load_calibration(model, options["calibration"], vocab_size=96)
    with quiet():
        whole, _ = read_back(FAMILIES["qwen3_moe"], model)
    blocks = block_amaxes(whole.eval(), data.batches)
    scales = input_scales(tmp_path / "out")
    for linear in result.plan.linears:
        path = linear.module
        if linear.expert is not None:
            path += ".down" if linear.name.endswith("down_proj") else ".gate_up"
        low, high = wanted_amax(blocks[path])
        amax = scales[f"{linear.name}.input_scale"] * 2688
        assert low * 0.99 <= amax <= high * 1.01, linear.name


def test_histograms_serve_another_run(written: Written, ids: Path, tmp_path: Path) -> None:
    """They are in `calibration.safetensors`; the same recipe gives the same bytes from it."""
    model, chosen = written("qwen3_moe")[0], recipe(tmp_path, "histogram")
    fourfold.quantize(model, tmp_path / "out", chosen, **flat(calib=[ids], calib_seq=24))
    file = tmp_path / "out" / "calibration.safetensors"
    fourfold.quantize(model, tmp_path / "again", chosen, **flat(statistics=file))
    for written_file in (tmp_path / "out").glob("*.safetensors"):
        assert written_file.read_bytes() == (tmp_path / "again" / written_file.name).read_bytes()
    fourfold.quantize(model, tmp_path / "max", recipe(tmp_path, "max"), **flat(statistics=file))
    fourfold.quantize(
        model, tmp_path / "own", recipe(tmp_path, "max"), **flat(calib=[ids], calib_seq=24)
    )
    assert input_scales(tmp_path / "max") == input_scales(tmp_path / "own")
    with pytest.raises(fourfold.CalibrationError, match="needs the statistic block_amaxes"):
        fourfold.quantize(
            model,
            tmp_path / "none",
            chosen,
            **flat(statistics=tmp_path / "own" / "calibration.safetensors"),
        )


def test_damaged_histograms_are_refused(written: Written, ids: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, chosen = written("qwen3_moe")[0], recipe(tmp_path, "histogram")
    fourfold.quantize(model, tmp_path / "out", chosen, **flat(calib=[ids], calib_seq=24))
    with safe_open(tmp_path / "out" / "calibration.safetensors", framework="pt") as opened:
        head = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith(BLOCK_AMAXES))
    for damaged in (tensors[name][:-1], tensors[name] - tensors[name].max() - 1):
        save_file(tensors | {name: damaged.clone()}, tmp_path / "bad.safetensors", metadata=head)
        with pytest.raises(fourfold.CalibrationError, match="block_amaxes"):
            fourfold.quantize(
                model, tmp_path / "x", chosen, **flat(statistics=tmp_path / "bad.safetensors")
            )


def test_the_plan_counts_histograms(written: Written, tmp_path: Path) -> None:
    model = written("qwen3_moe")[0]
    memory = {
        amax: fourfold.plan(model, recipe(tmp_path, amax)).calibration_memory
        for amax in ("max", "histogram")
    }
    plan = fourfold.plan(model, recipe(tmp_path, "histogram"))
    sites = {plan.site_of(linear, BLOCK_AMAXES) for linear in plan.linears}
    assert memory["histogram"] - memory["max"] == 8 * BINS * len(sites)


def test_counts_do_not_depend_on_the_order_of_rows() -> None:
    statistic, site = STATISTICS[BLOCK_AMAXES], Site("x", 64, 3)
    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows[3], rows[4, :16] = 0, 2.0**40
    experts = torch.arange(80).view(40, 2) % 4 - 1
    whole, halves = statistic.new(site), [statistic.new(site), statistic.new(site)]
    statistic.update(whole, rows, experts)
    statistic.update(halves[1], rows[:7], experts[:7])
    statistic.update(halves[0], rows[7:], experts[7:])
    merged = statistic.merge(*halves)
    assert torch.equal(whole[BLOCK_AMAXES], merged[BLOCK_AMAXES])
    readers = (experts >= 0).sum(-1)
    assert int(whole[BLOCK_AMAXES].sum()) == 4 * int(readers.sum() - readers[3])
    assert int(whole[BLOCK_AMAXES][-1]) == int(readers[4])


@pytest.mark.parametrize("percent", [1.0, 50.0, 99.99])
def test_percentiles_lie_in_their_bins(percent: float) -> None:
    statistic, site = STATISTICS[BLOCK_AMAXES], Site("x", 16)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(20_000, 16, generator=generator) * torch.logspace(-3, 3, 20_000)[:, None]
    state = statistic.new(site)
    statistic.update(state, rows, None)
    amaxes = rows.abs().amax(-1).double().numpy()
    exact = np.percentile(amaxes, percent, method="inverted_cdf")
    low, high = percentile(state[BLOCK_AMAXES], percent)
    assert low <= exact < high <= low * (1 + 1 / 32)


def test_histogram_amax() -> None:
    """2¹⁴ times the small blocks; the largest, but for one in ten thousand; never a block of 0."""
    histogram = torch.zeros(BINS, dtype=torch.int64)
    assert histogram_amax(histogram, 0.0) == 0.0
    one, thousand = 40 * 32, 40 * 32 + 320  # amaxes 1 and 1024
    histogram[one], histogram[thousand] = 50_000, 50_000
    assert histogram_amax(histogram, 1030.0) == 2.0**14
    histogram[0], histogram[thousand + 320] = 20_000, 5  # tiny ones, and 5 of 120,005 at 2²⁰
    assert histogram_amax(histogram, 2.0**20) == 1024 * (1 + 1 / 32)
    histogram[thousand + 320] = 20
    assert histogram_amax(histogram, 2.0**20) == 2.0**20


# ------------------------------------------------------------------------ ranks, kills


def test_ranks_add_their_histograms(written: Written, ids: Path, tmp_path: Path) -> None:
    """Every file, `calibration.safetensors` with the histograms among them, is that of one rank."""
    model, chosen = written("qwen3_moe")[0], recipe(tmp_path, "histogram")
    line = ["-r", chosen, "--threads", 1, "--calib", ids, "--calib-seq", 24, "--batch-size", 2]
    processes = on_ranks(["quantize", model, tmp_path / "out", *line], ranks=2)
    assert all(code == 0 for code, *_ in processes), processes
    given = flat(threads=1, calib=[ids], calib_seq=24, batch_size=2, shards=2)
    fourfold.quantize(model, tmp_path / "one", chosen, **given)
    assert_same(tmp_path / "out", tmp_path / "one")


@pytest.mark.parametrize("amax", ["constant", "histogram"])
def test_a_killed_run_goes_on(amax: str, written: Written, ids: Path, tmp_path: Path) -> None:
    model, chosen = written("qwen3_moe")[0], recipe(tmp_path, amax)
    options = {"recipe": chosen, "threads": 1, "verify": False}
    if amax == "histogram":
        options |= {"calib": [ids], "calib_seq": 24, "batch_size": 3}
    fourfold.quantize(model, tmp_path / "unbroken", **flat(**options))
    state = tmp_path / "out" / ".fourfold"
    for kill_at in (60, 20, 0):
        process = start(model, tmp_path / "out", kill_at=kill_at, **options)
        process.join()
        assert bool(process.exitcode) == bool(kill_at)
        assert state.exists() == bool(kill_at)
    assert_same(tmp_path / "out", tmp_path / "unbroken")


# ------------------------------------------------------------------------- models in memory


@pytest.mark.parametrize("amax", ["constant", "histogram"])
def test_a_live_model_gives_the_same_bytes(
    amax: str, written: Written, ids: Path, tmp_path: Path
) -> None:
    folder, chosen = written("qwen3_moe")[0], recipe(tmp_path, amax)
    data = {"calib": [ids], "calib_seq": 24, "batch_size": 3} if amax == "histogram" else {}
    options = flat(threads=1, **data)
    fourfold.quantize(folder, tmp_path / "streamed", chosen, **options)
    model, _ = read_back(FAMILIES["qwen3_moe"], folder)
    result = fourfold.quantize(model, tmp_path / "live", chosen, **options)
    assert result.clean, str(result.report)
    mine, theirs = tensors_of(tmp_path / "live"), tensors_of(tmp_path / "streamed")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        one, other = (x.reshape(-1).view(torch.uint8) for x in (tensor, theirs[name]))
        assert torch.equal(one, other), name
