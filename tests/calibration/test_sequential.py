# SPDX-License-Identifier: Apache-2.0
"""Sequential quantization: each part of a layer is given the inputs that the quantized model has.

The judge is the checkpoint that was written. What a weight was quantized for must be what it reads
there: `fourfold.load` runs it, with inputs rounded for W4A4, and plain hooks sum up the inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourfold
from families import FAMILIES, Truth, quiet, read_back
from fourfold.algorithms import ALGORITHMS, Figures, Weight
from fourfold.algorithms.gptq_joint import GPTQJoint
from fourfold.calibration.asymmetry import confirmed_part, energies, predictor
from fourfold.calibration.data import load_calibration
from fourfold.calibration.sequential import stages_of
from fourfold.calibration.stream import RecordedRows, differences
from fourfold.errors import FourfoldError, RecipeError, UsageError
from fourfold.formats.base import FORMATS, WeightFormat
from fourfold.models.inventory import LinearWeight
from fourfold.planning import make_plan
from fourfold.planning.rows import observed_site
from fourfold.recipes import Recipe
from fourfold.reporting import read_summary, table_of
from fourfold.sources.opening import open_model
from fourfold.statistics import STATISTICS, Site
from jobs import assert_same, flat, ids_file, start

Written = Callable[[str], tuple[Path, Truth]]

RECIPE = """
weights: {{scale: {scale}, descent: 1}}
activations: {activations}
kv_cache: {kv_cache}
calibration: {{propagate: quantized, asymmetric: {asymmetric}}}
quantize_if_present: [experts, shared_experts, mlp, attention, linear_attention]
"""
DEFAULTS = {"scale": "gptq_joint", "asymmetric": 0.5, "kv_cache": "none"}
W4A4 = "{format: nvfp4}"
STATISTIC: Any = STATISTICS["second_moment"]


@dataclass(frozen=True)
class Recording(GPTQJoint):
    """Keeps the statistics that it is given."""

    name = "recording"
    seen: dict[str, Mapping[str, Tensor]] = field(default_factory=dict, compare=False)

    def quantize(
        self, weights: Sequence[Weight], fmt: WeightFormat
    ) -> tuple[float | None, list[Figures]]:
        for weight in weights:
            self.seen[weight.name] = {x: tensor.clone() for x, tensor in weight.statistics.items()}
        return super().quantize(weights, fmt)


def options_of(folder: Path) -> dict[str, Any]:
    return flat(calib=[ids_file(folder)], calib_seq=24, calib_size=8, batch_size=3, threads=1)


def recipe_in(folder: Path, **values: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(**(DEFAULTS | values)))
    return file


def inputs_of(
    model: nn.Module, batches: Any, rounded: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, list[Tensor]]:
    """The rows that linear layers and experts read, by module path or `<module>.<expert>.down`.

    Hooks see the inputs of linear layers after they were rounded; those of experts are computed
    here, by down(silu(gate x) · up x), and rounded by `rounded`.
    """
    rows: dict[str, list[Tensor]] = {}

    def add(path: str, x: Tensor) -> None:
        rows.setdefault(path, []).append(x.reshape(-1, x.shape[-1]).float())

    def experts(path: str, module: Any, args: Any) -> None:
        same: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
        hidden, index = rounded.get(f"{path}.gate_up", same)(args[0]), args[1]
        for expert in range(len(module.gate_up_proj)):
            x = hidden[(index == expert).any(-1)]
            gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
            add(f"{path}.{expert}.gate_up", x)
            inner = module.act_fn(gate) * up
            add(f"{path}.{expert}.down", rounded.get(f"{path}.down", same)(inner))

    for path, module in model.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            module.register_forward_pre_hook(lambda m, args, path=path: experts(path, m, args))
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, use_cache=False)
    return rows


def place_of(linear: LinearWeight) -> str:
    if linear.expert is None:
        return linear.module
    return f"{linear.module}.{linear.expert}.{observed_site(linear).rpartition('.')[2]}"


@pytest.mark.parametrize(
    ("name", "activations", "kv_cache"),
    [
        ("qwen3_moe", "none", "none"),
        ("qwen3_moe", W4A4, "none"),
        ("qwen3_moe", "none", "{format: fp8}"),
        ("qwen3_moe", W4A4, "{format: fp8, scale: cast}"),
        ("deepseek_v3", "none", "none"),
        ("deepseek_v3", W4A4, "none"),
    ],
)
def test_weights_are_quantized_for_the_inputs_that_they_will_have(
    name: str,
    activations: str,
    kv_cache: str,
    written: Written,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    algorithm = Recording()
    monkeypatch.setitem(ALGORITHMS, "recording", algorithm)
    model, options = written(name)[0], options_of(tmp_path)
    recipe = recipe_in(tmp_path, scale="recording", activations=activations, kv_cache=kv_cache)
    result = fourfold.quantize(model, tmp_path / "out", recipe, **options)
    assert result.clean, result.report
    plan = result.plan
    assert algorithm.seen.keys() == {linear.name for linear in plan.linears}

    data = load_calibration(
        model,
        options["calibration"],
        vocab_size=plan.inventory.vocab_size,
        max_positions=plan.inventory.max_positions,
    )
    summary = {entry.name: entry for entry in result.linears}
    rounded: dict[str, Callable[[Tensor], Tensor]] = {}
    for linear in plan.linears if activations != "none" else ():
        scale = summary[linear.name].input_scale
        rounded[observed_site(linear)] = lambda x, scale=scale: FORMATS["nvfp4"].round_activations(
            x, scale
        )
    with quiet():
        quantized = fourfold.load(
            tmp_path / "out",
            dtype=torch.float32,
            simulate_activations=bool(rounded) or kv_cache != "none",
        )
        source, _ = read_back(FAMILIES[name], model)
    wanted = inputs_of(quantized, data.batches, rounded)
    originals = inputs_of(source.eval().float(), data.batches, {})
    compared = 0
    for linear in plan.linears:
        seen, place = algorithm.seen[linear.name], place_of(linear)
        x = torch.cat(wanted[place]) if place in wanted else torch.empty(0, linear.shape[1])
        assert int(seen["second_moment.rows"]) == len(x), linear.name
        if not len(x):
            continue
        moment = x.T.double() @ x.double() / len(x)
        torch.testing.assert_close(
            seen["second_moment"].double(), moment, rtol=1e-4, atol=1e-5 * float(moment.max())
        )
        if linear.expert is None:
            moved = torch.cat(originals[place]) - x
            cross = moved.T.double() @ x.double() / len(x)
            torch.testing.assert_close(
                seen["second_moment.cross"].double(),
                cross,
                rtol=1e-3,
                atol=1e-4 * float(cross.abs().max()),
            )
            compared += float(cross.abs().max()) > 0
    assert compared, "no input has moved"


def test_stages_follow_the_layer(written: Written, tmp_path: Path) -> None:
    plan = make_plan(open_model(written("deepseek_v3")[0]), Recipe.load("nvfp4_default_best"))
    groups = [group for group in plan.groups if group.linears[0].layer == 1]
    leaves = ["q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj"]
    path = "model.layers.1"
    order = [f"{path}.self_attn.{leaf}" for leaf in leaves]
    order += [f"{path}.mlp.experts.gate_up", f"{path}.mlp.experts.down"]
    shared = f"{path}.mlp.shared_experts"
    order += [f"{shared}.gate_proj", f"{shared}.up_proj", f"{shared}.down_proj"]
    stages = [
        {linear.name.rpartition(".")[2] for linear in stage.linears}
        for stage in stages_of(groups, order)
    ]
    assert stages == [
        {"q_a_proj", "kv_a_proj_with_mqa"}, {"q_b_proj"}, {"o_proj"},
        {"gate_proj", "up_proj"}, {"down_proj"},
    ]  # fmt: skip
    assert sum(len(stage.groups) for stage in stages_of(groups, order)) == len(groups)


def test_threads_change_no_byte(written: Written, tmp_path: Path) -> None:
    model, recipe = written("qwen3_moe")[0], recipe_in(tmp_path, activations=W4A4)
    for threads in (1, 2):
        options = options_of(tmp_path) | flat(threads=threads)
        fourfold.quantize(model, tmp_path / f"out{threads}", recipe, **options)
    for file in sorted((tmp_path / "out1").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "out2" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "killed_at",
    [120, *(pytest.param(number, marks=pytest.mark.slow) for number in (40, 70, 100, 140, 160))],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    killed_at: int, written: Written, tmp_path: Path
) -> None:
    model, recipe = written("qwen3_moe")[0], recipe_in(tmp_path, activations=W4A4)
    options = {
        "calib": [ids_file(tmp_path)], "calib_seq": 24, "calib_size": 8, "batch_size": 3,
        "threads": 1,
    }  # fmt: skip
    fourfold.quantize(model, tmp_path / "whole", recipe, **flat(**options))
    process = start(model, tmp_path / "out", recipe, kill_at=killed_at, **options)
    process.join()
    assert process.exitcode == -9
    fourfold.quantize(model, tmp_path / "out", recipe, **flat(**options))
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calibration: {propagate: quantized}\nquantize: [experts]", "do not look at inputs"),
        (
            "weights: {scale: gptq_joint}\ncalibration: {asymmetric: 0.5}\nquantize: [experts]",
            "asymmetric has no effect without propagate: quantized",
        ),
        ("weights: {scale: mse, descent: 2}\nquantize: [experts]", "descent has no effect with"),
        ("weights: {scale: gptq_joint, range: 300}\nquantize: [experts]", "range"),
        (
            "weights: {scale: gptq_joint}\n"
            "calibration: {propagate: quantized, asymmetric: 2}\nquantize: [experts]",
            "calibration.asymmetric: Input should be less than or equal to 1",
        ),
    ],
)
def test_recipes_that_make_no_sense(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_model_in_memory_is_refused(written: Written, tmp_path: Path) -> None:
    with quiet():
        model, _ = read_back(FAMILIES["qwen3_moe"], written("qwen3_moe")[0])
    options = flat(calib=[ids_file(tmp_path)], calib_seq=24, calib_size=8)
    with pytest.raises(UsageError, match="use `propagate: source`"):
        fourfold.quantize(model, tmp_path / "out", "nvfp4_experts_only_best", **options)
    assert not (tmp_path / "out").exists()


def test_saved_statistics_are_refused(written: Written, tmp_path: Path) -> None:
    model, options = written("qwen3_moe")[0], options_of(tmp_path)
    first = fourfold.quantize(model, tmp_path / "first", "nvfp4_experts_only_mse", **options)
    with pytest.raises(FourfoldError, match="needs the statistic second_moment"):
        fourfold.quantize(
            model,
            tmp_path / "out",
            "nvfp4_experts_only_best",
            **flat(statistics=first.out / "calibration.safetensors"),
        )


def test_the_part_that_held_out_batches_confirm(written: Written, tmp_path: Path) -> None:
    """It is written for each weight: 0 where no input can have moved, and a resumed run has it."""
    model, options = written("qwen3_moe")[0], options_of(tmp_path)
    recipe = recipe_in(tmp_path, activations=W4A4, asymmetric="auto")
    result = fourfold.quantize(model, tmp_path / "out", recipe, **options)
    assert result.clean, result.report
    parts = {entry.name: entry.asymmetric for entry in result.linears}
    assert set(parts.values()) <= {0.0, 0.25, 0.5, 1.0}
    summary = json.loads((tmp_path / "out" / "quant_summary.json").read_text())
    assert {entry["name"]: entry["asymmetric"] for entry in summary["linears"]} == parts
    for entry in summary["linears"]:
        assert ("asymmetric_gain" in entry) == (entry["asymmetric"] > 0), entry["name"]
        assert 0 < entry.get("asymmetric_gain", 1) <= 1, entry["name"]
    is_printed, text = any(parts.values()), str(table_of(read_summary(tmp_path / "out")))
    assert ("% of what quantized layers change" in text) == is_printed
    by_site: dict[str, set[float | None]] = {}
    for linear in result.plan.linears:
        by_site.setdefault(observed_site(linear), set()).add(parts[linear.name])
    assert all(len(of_site) == 1 for of_site in by_site.values())


def moments(x: Tensor, moved: Tensor) -> dict[str, Tensor]:
    state = STATISTIC.new(site := Site("a site", x.shape[1])) | STATISTIC.new_cross(site)
    STATISTIC.update(state, x, None)
    STATISTIC.update_cross(state, x, moved, None)
    return state


@pytest.mark.parametrize(
    ("confirmed", "part"), [(1.02, 1.0), (0.9, 0.5), (0.3, 0.25), (0.2, 0.0), (-1.0, 0.0)]
)
def test_the_part_is_what_the_prediction_is_worth(confirmed: float, part: float) -> None:
    """On held-out rows the change is `confirmed` times what it was on the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 32, generator=generator)
    change = torch.randn(32, 32, generator=generator) / 50
    train = moments(x, x @ change)
    # The ridge takes 1/1.05 of the prediction, so the best part is 1.05 times as large.
    k = predictor(STATISTIC, train)
    moved = confirmed / 1.05 * (x @ change)
    halves = [slice(0, 1000), slice(1000, None)]
    found = [energies(STATISTIC, k, x[half], moved[half], None) for half in halves]
    assert confirmed_part(found) == confirmed_part(found[::-1])
    assert confirmed_part(found).part == part
    residual = moved - part * x @ k.mT
    gain = 1 - float(residual.square().sum() / moved.square().sum())
    assert confirmed_part(found).gain == pytest.approx(gain, abs=1e-5)


def test_inputs_that_do_not_move_have_no_part() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    still = predictor(STATISTIC, moments(x, torch.zeros_like(x)))
    assert confirmed_part([energies(STATISTIC, still, x, torch.zeros_like(x), None)]) == (0, 0)
    nothing = predictor(STATISTIC, moments(x[:0], x[:0]))
    assert confirmed_part([energies(STATISTIC, nothing, x, x, None)]) == (0, 0)
    assert confirmed_part([]) == (0, 0)


def test_each_expert_has_a_prediction_of_its_own() -> None:
    """The inputs of one expert are doubled, those of the other are halved; a third has no rows."""
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    experts = torch.arange(4096) % 2
    moved = torch.where(experts[:, None] == 0, x, -x / 2)
    state = STATISTIC.new(site := Site("experts.down", 32, 3)) | STATISTIC.new_cross(site)
    STATISTIC.update(state, x, experts)
    STATISTIC.update_cross(state, x, moved, experts)
    k = predictor(STATISTIC, state)
    assert torch.allclose(k[0], torch.eye(32), atol=0.15)
    assert torch.allclose(k[1], -torch.eye(32) / 2, atol=0.15)
    assert confirmed_part([energies(STATISTIC, k, x, moved, experts)]).part == 1
    assert confirmed_part([energies(STATISTIC, k, x, moved, 1 - experts)]).part == 0


def test_a_weight_keeps_most_of_itself() -> None:
    """Inputs of rank 1 leave all but one direction to chance; damping keeps codes near there."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(32, 128, generator=generator)
    x = torch.randn(8, 1, generator=generator) @ torch.randn(1, 128, generator=generator)
    state = STATISTIC.new(Site("a site", 128))
    STATISTIC.update(state, x, None)
    fmt = FORMATS["nvfp4"]
    out = {
        part: torch.empty(32, nbytes // 32, dtype=torch.uint8)
        for part, nbytes in {"codes": 32 * 64, "block_scale": 32 * 8}.items()
    }
    weight = Weight("a weight", w_OI, out, STATISTIC.finish(state))
    for damping in (0.0001, 0.01):
        _, (figures,) = GPTQJoint(damping=damping, descent=1).quantize([weight], fmt)
        assert figures.relative_error <= 0.3
        assert figures.damping is None or figures.damping > damping


def test_no_damping_makes_a_moment_of_what_is_none() -> None:
    """The search for a damping ends: such a matrix is the second moment of no inputs."""
    indefinite = torch.full((32, 32), 100.0).fill_diagonal_(1.0)
    out = {"codes": torch.empty(4, 16, dtype=torch.uint8), "block_scale": torch.empty(4, 2)}
    statistics = {"second_moment": indefinite, "second_moment.rows": torch.tensor(5)}
    weight = Weight("a weight", torch.ones(4, 32), out, statistics)
    with pytest.raises(ArithmeticError, match="not positive definite"):
        GPTQJoint().quantize([weight], FORMATS["nvfp4"])


@pytest.mark.parametrize("by_expert", [False, True])
def test_rows_of_two_streams_meet_by_token_and_expert(by_expert: bool) -> None:
    def rows(values: Sequence[float], experts: Sequence[int], tokens: Sequence[int]) -> Any:
        x_RI = torch.tensor(values)[:, None].expand(-1, 16).bfloat16()
        return RecordedRows(x_RI, torch.tensor(experts), torch.tensor(tokens))

    own = [rows([1, 2, 3], [0, 1, 0], [7, 7, 8])]
    other = [rows([6], [1], [7]), rows([10], [1], [8])]
    (moved,) = differences(own, other, by_expert=by_expert)
    # Of a token that the other stream gave to another expert, only the input is the same.
    assert moved[:, 0].tolist() == ([0, 4, 0] if by_expert else [5, 4, 7])
    assert differences([], other, by_expert=by_expert) == []
    (nothing,) = differences(own, [], by_expert=by_expert)
    assert not nothing.any()


@pytest.mark.parametrize("propagate", ["source", "quantized"])
def test_a_head_is_quantized_for_its_inputs(
    propagate: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = Recording()
    monkeypatch.setitem(ALGORITHMS, "recording", algorithm)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"weights: {{scale: recording}}\ncalibration: {{propagate: {propagate}}}\n"
        "quantize: [experts, lm_head]"
    )
    options = options_of(tmp_path)
    result = fourfold.quantize(written("qwen3_moe")[0], tmp_path / "out", recipe, **options)
    assert result.clean, result.report
    (rows,) = {
        int(seen["second_moment.rows"]) for name, seen in algorithm.seen.items() if "head" in name
    }
    assert rows == 8 * 24
