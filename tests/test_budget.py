# SPDX-License-Identifier: Apache-2.0
"""Recipes with a budget, from the recipe to the checkpoint: what is chosen, that it is what is
written, and that neither ranks nor a kill change a byte of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourfold
from fourfold.calibration.data import Batch, CalibrationData
from fourfold.config import CalibrationConfig, EvaluationConfig
from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import RecipeError, ResourceError, UsageError
from fourfold.events import BudgetSpent, Event, WindowEvaluated
from fourfold.recipes import Recipe
from fourfold.run.budget import split_texts
from fourfold.storage.quant_summary import BudgetEntry, read_summary
from jobs import assert_same, files_of, flat, start
from nvfp4_folders import tensors_of
from test_cli import in_process
from test_ranks import on_ranks

RULES = """
weights: {format: nvfp4, scale: mse}
activations: {format: nvfp4}
quantize: [experts, attention]
"""
SEQUENTIAL = """
weights: {format: nvfp4, scale: gptq_joint}
activations: {format: nvfp4}
calibration: {propagate: quantized, asymmetric: 0.5}
quantize: [experts, attention]
"""
ATTENTION = (
    "weights: {format: nvfp4, scale: mse}\nactivations: {format: nvfp4}\nquantize: [attention]\n"
)
"""Quick to measure: eight components, and small ones."""
SAMPLES = {"calib_size": 4, "calib_seq": 64, "batch_size": 2}
CALIBRATION = CalibrationConfig(**SAMPLES)
LONGER = CalibrationConfig(calib_size=4, calib_seq=256, batch_size=2)
"""Enough text for figures that mean something."""


def write_recipe(folder: Path, budget: str, rules: str = RULES) -> Path:
    file = folder / "mine.yaml"
    file.write_text(f"{rules}budget: {budget}\n")
    return file


class Events(list[Event]):
    """An `on_event` that keeps what comes."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


def budget_of(out: Path) -> BudgetEntry:
    entry = read_summary(out).budget
    assert entry is not None
    return entry


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[fourfold.Result, Events]:
    folder, events = tmp_path_factory.mktemp("budget"), Events()
    recipe = write_recipe(folder, "{bits_per_weight: 4.66, tokens: 512}")
    result = fourfold.quantize(
        model_dir(), folder / "out", recipe, calibration=LONGER, on_event=events
    )
    return result, events


def test_what_is_chosen_is_what_is_written(run: tuple[fourfold.Result, Events]) -> None:
    result, _ = run
    assert result.clean, str(result.report)
    budget = budget_of(result.out)
    options = {component.name: component.option for component in budget.components}
    assert len(options) == 12
    assert set(options.values()) == {"recipe", "fp8"}
    layers = json.loads((result.out / "config.json").read_text())["quantization_config"]
    assert layers["quant_algo"] == "MIXED_PRECISION"
    algorithms = {"recipe": "NVFP4", "fp8": "FP8"}
    for component in budget.components:
        stem = component.name.partition("{")[0]
        mine = [x for name, x in layers["quantized_layers"].items() if name.startswith(stem)]
        assert mine
        if "self_attn.{" not in component.name:  # that begins as o_proj does
            assert {x["quant_algo"] for x in mine} == {algorithms[component.option]}
    numel = sum(component.weights for component in budget.components)
    stored = tensors_of(result.out)
    quantized = [name for name in stored if name.rpartition(".")[0] in layers["quantized_layers"]]
    nbytes = sum(stored[name].nbytes for name in quantized)
    assert budget.curve[-1].bits == pytest.approx(8 * nbytes / numel)
    assert 4.6 < budget.curve[-1].bits <= 4.66


def test_a_disk_that_is_too_small_ends_it_before_it_measures(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    events, out = Events(), small_disk(1 << 16) / "out"
    recipe = write_recipe(tmp_path, "{bits_per_weight: 4.7}")
    with pytest.raises(ResourceError, match=r"are needed, .* are free on that disk\. Free some"):
        fourfold.quantize(model_dir(), out, recipe, calibration=CALIBRATION, on_event=events)
    assert not events.of(WindowEvaluated)
    assert not out.exists()


def test_the_curve(run: tuple[fourfold.Result, Events]) -> None:
    result, events = run
    curve = budget_of(result.out).curve
    assert [len(step.moved) for step in curve] == [0, *[1] * (len(curve) - 1)]
    assert [step.bits for step in curve] == sorted(step.bits for step in curve)
    assert [step.kl for step in curve] == sorted((step.kl for step in curve), reverse=True)
    assert curve[-1].other_kl < curve[0].other_kl
    [spent] = events.of(BudgetSpent)
    assert (spent.moved, spent.components) == (len(curve) - 1, 12)
    assert (spent.bits, spent.kl) == (curve[-1].bits, curve[-1].kl)


def test_the_effective_recipe_needs_no_measurement(
    run: tuple[fourfold.Result, Events], tmp_path: Path
) -> None:
    """It is in the summary, with rules by name, and quantizes to the same weights."""
    result, events = run[0], Events()
    summary = read_summary(result.out)
    recipe = Recipe.model_validate(summary.recipe)
    assert recipe.budget is None
    assert summary.budget is not None
    assert Recipe.model_validate(summary.budget.recipe).budget is not None
    again = fourfold.quantize(
        model_dir(), tmp_path / "again", recipe, calibration=LONGER, on_event=events
    )
    assert again.clean
    assert not events.of(WindowEvaluated)
    mine, theirs = files_of(result.out), files_of(again.out)
    shards = [name for name in mine if name.endswith(".safetensors")]
    assert [name for name in shards if mine[name] != theirs[name]] == []


def test_the_first_figures_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    """The curve begins at the KL that `evaluate` finds for the rules alone, on the same text."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"input_ids": list(heldout_text().encode()[:256])}))
    rules = "weights: {format: nvfp4, scale: mse}\nquantize: [experts, attention]\n"
    recipe = write_recipe(tmp_path, "{bits_per_weight: 4.55}", rules)
    calibration = CalibrationConfig(text, calib_size=2, calib_seq=128)
    result = fourfold.quantize(model_dir(), tmp_path / "out", recipe, calibration=calibration)
    (tmp_path / "rules.yaml").write_text(rules)
    plain = fourfold.quantize(model_dir(), tmp_path / "plain", tmp_path / "rules.yaml")
    config = EvaluationConfig(text, length=128, windows=2, cache=False)
    wanted = fourfold.evaluate(model_dir(), plain.out, config).models[0].kl
    first = budget_of(result.out).curve[0]
    assert (first.kl + first.other_kl) / 2 == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_kl_that_is_to_be_reached(run: tuple[fourfold.Result, Events], tmp_path: Path) -> None:
    """With as few moves as possible."""
    curve = budget_of(run[0].out).curve
    wanted = (curve[1].kl + curve[2].kl) / 2
    recipe = write_recipe(tmp_path, f"{{max_kl: {wanted}, tokens: 512, candidates: [fp8]}}")
    fourfold.quantize(model_dir(), tmp_path / "out", recipe, calibration=LONGER)
    reached = budget_of(tmp_path / "out").curve
    assert reached[-1].kl <= wanted < reached[-2].kl


@pytest.mark.slow
def test_inputs_in_16_bits_cost_no_bytes(tmp_path: Path) -> None:
    budget = "{bits_per_weight: 4.52, candidates: [w4a16], tokens: 512}"
    recipe = write_recipe(tmp_path, budget, ATTENTION)
    result = fourfold.quantize(model_dir(), tmp_path / "out", recipe, calibration=LONGER)
    assert result.clean, str(result.report)
    curve = budget_of(tmp_path / "out").curve
    assert len(curve) > 2
    assert curve[-1].bits <= curve[0].bits
    for component in budget_of(result.out).components:
        stem = component.name.partition("{")[0]
        inputs = {x.activations for name, x in result.plan.schemes.items() if name.startswith(stem)}
        assert (None if component.option == "w4a16" else "nvfp4") in inputs


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_16_bits_and_sequential_quantization(layout: str, tmp_path: Path) -> None:
    rules = SEQUENTIAL.replace("experts, ", "") + f"layout: {layout}\n"
    budget = "{bits_per_weight: 9, candidates: [bf16, mxfp8], tokens: 512}"
    recipe = write_recipe(tmp_path, budget, rules)
    result = fourfold.quantize(model_dir(), tmp_path / "out", recipe, calibration=LONGER)
    assert result.clean, str(result.report)
    assert {component.option for component in budget_of(result.out).components} >= {
        "recipe",
        "bf16",
    }
    ids = torch.arange(40, 90).unsqueeze(0)
    model = fourfold.load(result.out, dtype=torch.float32, simulate_activations=True)
    source = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    with torch.no_grad():
        logits, wanted = model(ids).logits, source(ids).logits
    assert float((logits - wanted).norm() / wanted.norm()) < 0.3


def test_a_budget_that_nothing_fits_into(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "{bits_per_weight: 4.51, tokens: 128}")
    result = fourfold.quantize(model_dir(), tmp_path / "out", recipe, calibration=CALIBRATION)
    assert result.clean
    assert len(budget_of(result.out).curve) == 1
    assert Recipe.model_validate(read_summary(result.out).recipe) == Recipe.load(recipe).model_copy(
        update={"budget": None}
    )


def test_a_plan_says_that_it_is_of_the_rules_alone(tmp_path: Path) -> None:
    plan = fourfold.plan(model_dir(), write_recipe(tmp_path, "{bits_per_weight: 4.7}"))
    assert any("the recipe has a budget" in note for note in plan.notes)
    assert {scheme.weights for scheme in plan.schemes.values()} == {"nvfp4"}


# --- the same bytes -----------------------------------------------------------------------


KILLED = {"calib_size": 4, "calib_seq": 128, "batch_size": 2, "shards": 2, "threads": 1}
SMALL = "{bits_per_weight: 5.2, tokens: 256}"


@pytest.mark.slow
@pytest.mark.parametrize("rules", [RULES, SEQUENTIAL])
def test_ranks_and_kills_leave_the_same_bytes(rules: str, tmp_path: Path) -> None:
    recipe, whole = write_recipe(tmp_path, SMALL, rules), tmp_path / "whole"
    fourfold.quantize(model_dir(), whole, recipe, **flat(**KILLED))
    assert len(budget_of(whole).curve) > 2
    for kill_at in (600, 0):
        process = start(model_dir(), tmp_path / "killed", recipe, kill_at=kill_at, **KILLED)
        process.join(240)
        assert process.exitcode == (-9 if kill_at else 0)
    assert_same(tmp_path / "killed", whole)
    line = [f"--{name.replace('_', '-')}={value}" for name, value in KILLED.items()]
    command = ["quantize", model_dir(), tmp_path / "ranks", "-r", recipe, *line]
    for code, _, err in on_ranks(command):
        assert code == 0, err
    assert_same(tmp_path / "ranks", whole)


@pytest.mark.slow
def test_a_run_that_resumes_does_not_measure_again(tmp_path: Path) -> None:
    """Another budget does not resume it."""
    rules = ATTENTION.replace("activations", "# activations")
    recipe, out = write_recipe(tmp_path, SMALL, rules), tmp_path / "out"
    process = start(model_dir(), out, recipe, kill_at=300, **KILLED)
    process.join(240)
    assert process.exitcode == -9
    assert list((out / ".fourfold/shards").glob("*.json"))
    other = write_recipe(tmp_path, "{bits_per_weight: 5.3, tokens: 256}", rules)
    with pytest.raises(fourfold.OutputError, match=r"budget.bits_per_weight: 5.2 → 5.3"):
        fourfold.quantize(model_dir(), out, other, **flat(**KILLED))
    recipe, events = write_recipe(tmp_path, SMALL, rules), Events()
    result = fourfold.quantize(model_dir(), out, recipe, on_event=events, **flat(**KILLED))
    assert result.clean
    assert not events.of(WindowEvaluated)
    assert len(events.of(BudgetSpent)) == 1


# --- the text -----------------------------------------------------------------------------


def data_of(*samples: list[int]) -> CalibrationData:
    longest = max(map(len, samples))
    ids = torch.tensor([[*sample, *[0] * (longest - len(sample))] for sample in samples])
    mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in samples])
    total = sum(map(len, samples))
    return CalibrationData((Batch(ids, mask),), "", len(samples), longest, total, "text", False)


def lists(texts: Any) -> list[list[list[int]]]:
    return [[window.tolist() for window in windows] for windows in texts]


def test_two_texts() -> None:
    """The choice and the report read different samples, without padding."""
    samples = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11], [12, 13]]
    data = data_of(*samples)
    assert lists(split_texts(data, 100)) == [samples[0::2], samples[1::2]]
    assert lists(split_texts(data, 5)) == [[[1, 2, 3], [6, 7]], [[4, 5], [9, 10, 11]]]
    assert lists(split_texts(data, 4)) == [[[1, 2, 3]], [[4, 5], [9, 10]]]
    assert lists(split_texts(data_of([1, 2, 3, 4]), 100)) == [[[1, 2]], [[3, 4]]]
    with pytest.raises(UsageError, match=r"text: 3 tokens are too few to choose by"):
        split_texts(data_of([1, 2, 3]), 100)


# --- what is refused ----------------------------------------------------------------------


def test_budgets_that_make_no_sense(tmp_path: Path) -> None:
    for budget, message in (
        ("{}", "budget: give bits_per_weight or max_kl, one of them"),
        ("{bits_per_weight: 4.8, max_kl: 0.1}", "give bits_per_weight or max_kl, one of them"),
        ("{bits_per_weight: 3}", "budget.bits_per_weight: Input should be greater than 4"),
        ("{bits_per_weight: 4.8, candidates: [fp9]}", "'fp9' is no candidate; known: w4a16, fp8"),
        ("{bits_per_weight: 4.8, candidates: [fp8, fp8]}", "'fp8' is given twice"),
        ("{bits_per_weight: 4.8, candidates: []}", "give at least one of"),
        ("{bits_per_weihgt: 4.8}", "did you mean bits_per_weight"),
        ("4.8", "budget"),
    ):
        with pytest.raises(RecipeError) as error:
            Recipe.load(write_recipe(tmp_path, budget))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{bits_per_weight: 4.2, tokens: 128}", "4.2 is less than its own rules take, 4.505"),
        ("{max_kl: 1.0e-9, candidates: [w4a16], tokens: 32}", "is not reached; the least that"),
    ],
)
def test_what_cannot_be_kept(
    budget: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command: Callable[..., Any] = partial(in_process, monkeypatch, capsys, "quantize")
    line = ["-r", write_recipe(tmp_path, budget, ATTENTION), "--calib-size", 4, "--calib-seq", 64]
    code, text, err = command(model_dir(), tmp_path / "out", *line)
    assert (code, text) == (2, "")
    assert message in err
    assert len(err.splitlines()) <= 4
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_and_statistics(
    run: tuple[fourfold.Result, Events], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, "{bits_per_weight: 4.7}")
    model = AutoModelForCausalLM.from_pretrained(model_dir())
    with pytest.raises(UsageError, match="not possible with a model in memory"):
        fourfold.quantize(model, tmp_path / "out", recipe)
    with pytest.raises(UsageError, match="Give `calib` instead"):
        fourfold.quantize(
            model_dir(),
            tmp_path / "out",
            recipe,
            calibration=run[0].out / "calibration.safetensors",
        )
    assert not (tmp_path / "out").exists()
