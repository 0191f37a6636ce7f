# SPDX-License-Identifier: Apache-2.0
"""Folds in a whole run: what they gain, that everything else is the source's up to the fold, and
that verifying, resuming, ranks, merging and converting know of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fourfold
from families import Truth
from fourfold import Recipe
from fourfold.calibration.data import load_calibration
from fourfold.calibration.folding import Folding
from fourfold.config import CalibrationConfig
from fourfold.events import Event, LayerFolded, Resumed
from fourfold.models.folds import Kind, find_folds
from fourfold.models.inventory_builder import take_inventory
from fourfold.planning import make_plan
from fourfold.sources.folded import read_factors
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import FOLDS as FILE
from fourfold.storage.quant_summary import FoldsEntry, read_summary
from jobs import assert_same, files_of, flat, ids_file, start, start_command
from nvfp4_folders import tensors_of

from .models import FOLDS, SEQUENTIAL, W4A4, W4A16, recipe_file, write_outliers

Written = Callable[[str], tuple[Path, Truth]]
Options = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(tmp_path_factory.mktemp("outliers"))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    ids = ids_file(tmp_path_factory.mktemp("calib"))
    return {"calib": [ids], "calib_size": 20, "calib_seq": 30, "batch_size": 3, "threads": 1}


@pytest.fixture(scope="module")
def folded(model: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folded")
    recipe = recipe_file(folder, W4A4 + FOLDS)
    result = fourfold.quantize(model, folder / "out", recipe, **flat(**options))
    assert result.clean, str(result.report)
    return folder / "out"


def choices_of(out: Path) -> FoldsEntry:
    folds = read_summary(out).folds
    assert folds is not None
    return folds


def output_error(model: Path, out: Path) -> float:
    """The relative squared error of the logits, with the inputs of layers rounded."""
    ids = torch.randint(3, 90, (8, 24), generator=torch.Generator().manual_seed(5))
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    quantized = fourfold.load(out, dtype=torch.float32, simulate_activations=True)
    with torch.no_grad():
        expected, result = source(ids).logits, quantized(ids).logits
    return float((result - expected).square().sum() / expected.square().sum())


def test_outliers(model: Path, folded: Path, options: Options, tmp_path: Path) -> None:
    fourfold.quantize(model, tmp_path / "out", recipe_file(tmp_path, W4A4), **flat(**options))
    assert output_error(model, folded) < 0.15 * output_error(model, tmp_path / "out")
    norms = [choice for choice in choices_of(folded).choices if choice.kind == "norm"]
    assert len(norms) == 6
    assert all(choice.kept and choice.exact for choice in norms)
    assert all(choice.loss_after < 0.15 * choice.loss_before for choice in norms)


def test_kept_tensors_are_the_sources_up_to_the_fold(model: Path, folded: Path) -> None:
    source, factors = open_source(model), read_factors(folded)
    assert factors is not None
    folds = find_folds(take_inventory(source), source.config).folds
    ours = tensors_of(folded)
    scaled = set()
    for name, exponents in factors.exponents.items():
        if folds[name].kind is Kind.NORM:
            key, powers = f"{name}.weight", 2.0 ** exponents.float()
            assert torch.equal(ours[key].float() * powers, source.read(key).float())
            scaled.add(key)
            for region in folds[name].readers:
                if region.key in ours and ours[region.key].dtype == torch.bfloat16:
                    router = source.read(region.key).float() * powers
                    assert torch.equal(ours[region.key].float(), router)
                    scaled.add(region.key)
    assert {key.rpartition(".mlp.gate.")[1] for key in scaled} == {"", ".mlp.gate."}
    kept = {key for key in ours.keys() & source.tensors.keys() if ours[key].dtype != torch.uint8}
    assert all(torch.equal(ours[key], source.read(key)) for key in kept - scaled)
    assert len(kept - scaled) > 5


def test_summary_names_the_file(folded: Path) -> None:
    factors, folds = read_factors(folded), choices_of(folded)
    assert factors is not None
    assert factors.digest == folds.digest
    assert FILE in read_summary(folded).files
    kept = sum(choice.folds for choice in folds.choices if choice.kept)
    assert kept == len(factors.exponents)
    assert "folded" in (folded / "README.md").read_text()


def test_verify_needs_the_file(model: Path, folded: Path, tmp_path: Path) -> None:
    assert fourfold.verify(folded, source=model).clean
    out = tmp_path / "out"
    shutil.copytree(folded, out)
    data = (out / FILE).read_bytes()
    for change, words in (
        (data[:-1] + bytes([data[-1] ^ 1]), "is not the file that quant_summary.json means"),
        (data[: len(data) // 2], "not the factors of a quantization"),
        (None, "is missing, and nothing can be compared"),
    ):
        (out / FILE).unlink()
        if change is not None:
            (out / FILE).write_bytes(change)
        with pytest.raises(fourfold.UnreadableError, match=f"{FILE}: {words}"):
            fourfold.verify(out, source=model)
        assert fourfold.verify(out).clean  # by itself
    (out / "quant_summary.json").unlink()
    assert not fourfold.verify(out, source=model).clean


def test_verify_finds_what_is_not_folded(model: Path, folded: Path, tmp_path: Path) -> None:
    """A norm as the source has it, where its readers are scaled."""
    out = tmp_path / "out"
    shutil.copytree(folded, out)
    key = "model.layers.1.input_layernorm.weight"
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    data = (out / weights[key]).read_bytes()
    ours, theirs = (
        x.view(torch.uint8).numpy().tobytes()
        for x in (load_file(out / weights[key])[key], open_source(model).read(key))
    )
    assert data.count(ours) == 1
    (out / weights[key]).write_bytes(data.replace(ours, theirs))
    report = fourfold.verify(out, source=model)
    assert [finding.tensor for finding in report.errors] == [key]


def test_errors_against_a_reference_are_those_of_the_folded_one(model: Path, folded: Path) -> None:
    report = fourfold.verify(folded, source=model, reference=model)
    assert report.clean
    errors = {error.name: error.relative_error for error in report.reference_errors}
    assert errors == {error.name: error.relative_error for error in report.relative_errors}
    assert len(errors) > 30


def test_layer_that_would_compute_something_else_is_left_alone(
    model: Path, options: Options, tmp_path: Path
) -> None:
    """Folds that miss a reader, as rules would that are wrong for a model."""
    recipe = Recipe.load(recipe_file(tmp_path, W4A4 + FOLDS))
    source = open_source(model)
    plan = make_plan(source, recipe)
    router = "model.layers.1.mlp.gate.weight"
    folds = {
        name: replace(fold, readers=tuple(x for x in fold.readers if x.key != router))
        for name, fold in plan.folds.items()
    }
    config = CalibrationConfig(calib=options["calib"], calib_size=20, calib_seq=30, batch_size=3)
    data = load_calibration(model, config, vocab_size=plan.inventory.vocab_size)
    factors = Folding(replace(plan, folds=folds), source, data.batches).choose()
    exact = {choice["layer"]: choice["exact"] for choice in factors.choices}
    assert exact == {0: True, 1: False, 2: True}
    assert not any(choice["kept"] for choice in factors.choices if choice["layer"] == 1)
    assert {name.split(".")[2] for name in factors.exponents} == {"0", "2"}


def test_weights_alone(model: Path, options: Options, tmp_path: Path) -> None:
    """A recipe that needs no calibration but for its folds."""
    out = tmp_path / "out"
    result = fourfold.quantize(model, out, recipe_file(tmp_path, W4A16 + FOLDS), **flat(**options))
    assert result.clean
    assert choices_of(out).kept
    calibration = read_summary(out).calibration
    assert calibration is not None
    assert calibration.samples == 20


@pytest.mark.slow
def test_sequential(model: Path, options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = recipe_file(tmp_path, SEQUENTIAL + FOLDS)
    assert fourfold.quantize(model, out, recipe, **flat(**options)).clean
    fourfold.quantize(
        model, tmp_path / "plain", recipe_file(tmp_path, SEQUENTIAL), **flat(**options)
    )
    assert output_error(model, out) < 0.15 * output_error(model, tmp_path / "plain")


def test_killed_run_resumes_with_the_same_bytes(
    model: Path, folded: Path, options: Options, tmp_path: Path
) -> None:
    recipe, out = recipe_file(tmp_path, W4A4 + FOLDS), tmp_path / "out"
    process = start(model, out, recipe, kill_at=100, **options)
    process.join()
    assert process.exitcode
    before = files_of(out)
    with pytest.raises(fourfold.OutputError, match="unfinished run of something else"):
        fourfold.quantize(model, out, recipe, **flat(**options | {"calib_size": 15}))
    assert files_of(out) == before
    kinds: list[type[Event]] = []

    def note(event: Event) -> None:
        kinds.append(type(event))

    fourfold.quantize(model, out, recipe, on_event=note, **flat(**options))
    assert Resumed in kinds
    assert LayerFolded not in kinds  # the factors are those of the run before
    assert_same(out, folded)


def test_ranks(model: Path, folded: Path, options: Options, tmp_path: Path) -> None:
    from test_ranks import on_ranks

    recipe = recipe_file(tmp_path, W4A4 + FOLDS)
    line = ["--calib", *options["calib"], "--calib-size", 20, "--calib-seq", 30]
    line += ["--batch-size", 3, "--threads", 1, "-r", recipe]
    for code, _, err in on_ranks(["quantize", model, tmp_path / "out", *line]):
        assert code == 0, err
    factors = read_factors(tmp_path / "out")
    expected = read_factors(folded)
    assert factors is not None
    assert expected is not None
    assert all(torch.equal(k, expected.exponents[name]) for name, k in factors.exponents.items())
    assert fourfold.verify(tmp_path / "out", source=model).clean
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(folded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merged_and_converted(model: Path, folded: Path, tmp_path: Path) -> None:
    fourfold.merge([folded], tmp_path / "merged", shards=2)
    fourfold.convert(folded, tmp_path / "converted", layout="compressed-tensors")
    for name in ("merged", "converted"):
        assert fourfold.verify(tmp_path / name, source=model).clean, name


def test_weight_that_is_not_finite_is_named(model: Path, options: Options, tmp_path: Path) -> None:
    """The search meets it before anything is written."""
    source, out = shutil.copytree(model, tmp_path / "source"), tmp_path / "out"
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.weight"][1, 2] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(fourfold.NonFiniteError, match=rf"^{re.escape(name)}: nan at \[1, 2\]"):
        fourfold.quantize(source, out, recipe_file(tmp_path, W4A4 + FOLDS), **flat(**options))
    assert not out.exists()


def test_family_without_folds_is_left_alone(
    written: Written, options: Options, tmp_path: Path
) -> None:
    model = written("gpt_oss")[0]
    recipe = "weights: {format: nvfp4, scale: mse}\nquantize: [experts]\n"
    plan = fourfold.plan(written("nemotron_h")[0], recipe_file(tmp_path, recipe + FOLDS))
    assert any(re.search("folds: .* 0 ups; left alone: .*without a gate", n) for n in plan.notes)
    plan = fourfold.plan(model, recipe_file(tmp_path, recipe + FOLDS))
    assert any("limits their outputs" in note for note in plan.notes)
    assert {fold.kind for fold in plan.folds.values()} <= {Kind.NORM}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calib_size": 1}, "`folds`: at least 4 calibration samples .* there are 1"),
        ({"calibration": "statistics"}, "texts, of which the statistics of an earlier run"),
        ({"model": "live"}, "not possible with a model in memory"),
    ],
)
def test_what_folds_cannot_do(
    changes: dict[str, Any], words: str, model: Path, folded: Path, options: Options, tmp_path: Path
) -> None:
    given: Any = model
    if "model" in changes:
        given = AutoModelForCausalLM.from_pretrained(model)
    changed = flat(**options | {k: v for k, v in changes.items() if k == "calib_size"})
    if "calibration" in changes:
        changed["calibration"] = folded / "calibration.safetensors"
    with pytest.raises(fourfold.UsageError, match=words):
        fourfold.quantize(given, tmp_path / "out", recipe_file(tmp_path, W4A4 + FOLDS), **changed)
    assert not (tmp_path / "out").exists()


def test_command_line(model: Path, options: Options, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, W4A16 + "folds: {smoooth: auto}\n")
    process = start_command("quantize", model, tmp_path / "out", "-r", recipe)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "unknown key 'folds.smoooth'; did you mean smooth?" in err
    assert len(err.strip().splitlines()) <= 2
    recipe = recipe_file(tmp_path, W4A16 + FOLDS)
    arguments = ["--calib", *options["calib"], "--calib-size", 1]
    process = start_command("quantize", model, tmp_path / "out", "-r", recipe, *arguments)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "Give more --calib-size." in err
    assert not (tmp_path / "out").exists()
