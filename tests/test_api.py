# SPDX-License-Identifier: Apache-2.0
"""The Python face: names, typed results, callbacks, and the ledger that must close."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourfold
from families import Truth
from fourfold.config import CalibrationConfig, Runtime
from fourfold.events import (
    BackendChosen,
    BytesQuantized,
    BytesVerified,
    Event,
    OutputComplete,
    PlanMade,
    ShardWritten,
    WritingBegan,
)
from fourfold.run import job
from fourfold.run.verify_written import check_ledger
from fourfold.storage.output import OutputFolder
from jobs import flat

Written = Callable[[str], tuple[Path, Truth]]
EXPERTS = "w4a16_nvfp4_experts_only_mse"


def test_public_names() -> None:
    assert set(fourfold.__all__) == {
        "CalibrationConfig", "CalibrationError", "Converted", "Evaluation", "EvaluationConfig",
        "Event", "Finding", "FourfoldError", "FourfoldWarning",
        "Generation", "Merged", "ModelError", "NonFiniteError", "ObservationError", "OutputConfig",
        "OutputError", "Plan", "PlanError", "Recipe", "RecipeError", "Report", "ResourceError",
        "Result", "Runtime", "Sensitivity", "SourceError", "Statistics", "UnreadableError",
        "UsageError", "WeightLostError", "__version__", "convert", "evaluate", "generate", "load",
        "merge", "plan", "quantize", "sensitivity", "verify",
    }  # fmt: skip
    for name in fourfold.__all__:
        assert getattr(fourfold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fourfold.nonsense


def test_importing_is_quick() -> None:
    code = "import sys, fourfold; assert not {'torch', 'numba', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_results_are_typed_and_print(written: Written, tmp_path: Path) -> None:
    folder, _ = written("mixtral")
    recipe = fourfold.Recipe.load(EXPERTS)
    plan = fourfold.plan(folder, recipe=recipe)
    result = fourfold.quantize(str(folder), str(tmp_path / "out"), recipe=recipe)
    report = fourfold.verify(tmp_path / "out", source=folder)
    assert isinstance(plan, fourfold.Plan)
    assert isinstance(result, fourfold.Result)
    assert isinstance(report, fourfold.Report)
    assert result.clean
    assert str(result).startswith("36 / 36 linear weights quantized · 0 zero scales of 6,912 · ")
    assert str(result).splitlines()[0].endswith(" · verified")
    assert str(result).splitlines()[-2].endswith("of memory at the peak")
    assert "bits/weight" in str(plan)
    assert str(plan).splitlines()[1].startswith("role ")
    assert "clean: no errors" in str(report)
    assert json.loads(json.dumps(result.to_dict()))["linear_weights_quantized"] == 36
    assert [linear.name for linear in result.linears] == sorted(x.name for x in plan.linears)
    errors = {error.name: error.relative_error for error in report.relative_errors}
    for linear in result.linears:
        assert linear.relative_error == pytest.approx(errors[linear.name], rel=1e-4)


def test_events(written: Written, tmp_path: Path) -> None:
    events: list[Event] = []
    fourfold.quantize(
        written("mixtral")[0],
        tmp_path / "out",
        EXPERTS,
        on_event=events.append,
        runtime=Runtime(threads=2),
    )
    kinds = list(dict.fromkeys(type(event) for event in events))
    assert kinds == [
        PlanMade, BackendChosen, WritingBegan, BytesQuantized, ShardWritten, OutputComplete,
        BytesVerified,
    ]  # fmt: skip
    plan = events[0].plan  # type: ignore[attr-defined]
    shards = [event for event in events if isinstance(event, ShardWritten)]
    assert [event.shards_done for event in shards] == list(range(1, len(plan.shards) + 1))
    assert {event.unit for event in shards} == {"shell", "layer 0", "layer 1", "layer 2"}
    assert shards[-1].bytes_done == shards[-1].bytes_total == plan.nbytes
    for kind in (BytesQuantized, BytesVerified):
        amounts = [event for event in events if isinstance(event, kind)]
        assert amounts[0].bytes_done == 0
        assert [x.bytes_done for x in amounts] == sorted(x.bytes_done for x in amounts)
        assert amounts[-1].bytes_done == amounts[-1].bytes_total
        assert len({event.bytes_total for event in amounts}) == 1


@pytest.mark.parametrize("field", ["compared_linears", "copied_tensors"])
def test_a_ledger_that_does_not_close(field: str, written: Written, tmp_path: Path) -> None:
    result = fourfold.quantize(written("mixtral")[0], tmp_path / "out", EXPERTS)
    assert result.report is not None
    counts = result.report.counts
    short = replace(result.report, counts=replace(counts, **{field: getattr(counts, field) - 1}))
    folder = OutputFolder(tmp_path / "out")
    with pytest.raises(fourfold.FourfoldError, match=r"36 linear weights and .* planned"):
        check_ledger(result.plan, list(result.linears), short, folder)
    assert not list((tmp_path / "out").iterdir())


def test_a_weight_that_is_not_written(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results_in = job.results_in
    monkeypatch.setattr(job, "results_in", lambda records: results_in(records)[1:])
    with pytest.raises(fourfold.FourfoldError, match="36 linear weights planned, 35 written"):
        fourfold.quantize(written("mixtral")[0], tmp_path / "out", EXPERTS)
    assert not (tmp_path / "out" / "config.json").exists()


def edited(folder: Path, model: Path, change: Callable[[str, torch.Tensor], object]) -> Path:
    model.mkdir()
    (model / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        change(name, value)
    save_file(tensors, model / "model.safetensors")
    return model


def test_all_zero_and_tiny_experts(written: Written, tmp_path: Path) -> None:
    """Positive scales, codes 0 where all is 0, and a clean report."""

    def change(name: str, value: torch.Tensor) -> None:
        if ".experts.2." in name or name.endswith("experts.1.w1.weight"):
            value.zero_()
        if name.endswith("experts.0.w2.weight"):
            value.mul_(2.0**-100)

    model = edited(written("mixtral")[0], tmp_path / "model", change)
    for recipe in ("w4a16_nvfp4_experts_only", EXPERTS):
        result = fourfold.quantize(model, tmp_path / recipe, recipe)
        assert result.clean, str(result.report)
        made: dict[str, torch.Tensor] = {}
        for file in (tmp_path / recipe).glob("*.safetensors"):
            made |= load_file(file)
        for name, value in made.items():
            if name.endswith("weight_scale_2"):
                assert 0 < value.item() < float("inf")
            if ".experts.2." in name and name.endswith(".weight"):
                assert not value.any()


def test_an_outlier_that_ruins_its_neighbour_is_refused(written: Written, tmp_path: Path) -> None:
    """Gate and up share a global scale: a value of 3e38 in one leaves nothing of the other."""

    def change(name: str, value: torch.Tensor) -> None:
        if name.endswith("layers.1.block_sparse_moe.experts.0.w3.weight"):
            value[0, 0] = 3e38

    model = edited(written("mixtral")[0], tmp_path / "model", change)
    words = r"experts\.0\.w1: lost in NVFP4: .* those of .*experts\.0\.w3, .* 3e\+38"
    with pytest.raises(fourfold.WeightLostError, match=words):
        fourfold.quantize(model, tmp_path / "out", EXPERTS)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_cannot_be_synced_ends_the_run_at_once(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after all other layers were run."""
    from fourfold.calibration.streaming import StreamedModel
    from fourfold.storage.shard_file import ShardFile

    loaded: list[int | None] = []
    load = StreamedModel.load

    def counted(model: StreamedModel, layer: int | None) -> None:
        loaded.append(layer)
        load(model, layer)
        time.sleep(0.2)  # the sync of the layer before fails meanwhile

    def full(_: ShardFile) -> None:
        raise fourfold.OutputError("the disk is full")

    monkeypatch.setattr(StreamedModel, "load", counted)
    monkeypatch.setattr(ShardFile, "finish", full)
    with pytest.raises(fourfold.OutputError, match="the disk is full"):
        fourfold.quantize(
            written("qwen3_moe")[0],
            tmp_path / "out",
            "nvfp4_experts_only",
            calibration=CalibrationConfig(calib=[ids(tmp_path)], calib_seq=24),
            runtime=Runtime(threads=1),
        )
    assert loaded in ([None, 0], [None, 0, 1])
    assert not (tmp_path / "out").exists()


def ids(folder: Path, name: str = "ids.jsonl") -> Path:
    rows = torch.randint(3, 90, (20, 30), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / name).write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return folder / name


def test_the_folder_that_one_stands_in(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written("qwen3_moe")[0]
    monkeypatch.chdir(folder)
    assert fourfold.quantize(".", tmp_path / "out", "w4a16_nvfp4_experts_only").clean
    name = json.loads((tmp_path / "out" / "quant_summary.json").read_text())["model"]
    assert name == folder.name


def test_names_that_are_no_unicode(written: Written, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    model = Path(shutil.copytree(written("qwen3_moe")[0], tmp_path / name))
    result = fourfold.quantize(
        model,
        tmp_path / "out",
        "nvfp4_experts_only",
        calibration=CalibrationConfig(calib=[ids(tmp_path, f"{name}.jsonl")], calib_seq=24),
        runtime=Runtime(threads=1),
    )
    assert result.clean
    assert result.statistics is not None
    assert result.statistics.data.origin == "caf\\xe9.jsonl"
    assert json.loads((tmp_path / "out" / "quant_summary.json").read_text())["model"] == "caf\\xe9"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calib_size": 4}, "Remove `calib_size`"),
        ({"calib_seq": 4}, "Remove `calib_seq`"),
        ({"threads": 0}, "`threads=0`: give a whole number of at least 1"),
        ({"threads": -1}, "`threads=-1`"),
        ({"shards": 0}, "`shards=0`"),
        ({"device_memory": 0}, "`device_memory=0`"),
        ({"calib_size": 4, "statistics": "x"}, "`calib_size` has no effect with `statistics`"),
    ],
)
def test_what_would_be_ignored_is_refused(
    options: dict[str, int], words: str, written: Written, tmp_path: Path
) -> None:
    with pytest.raises(fourfold.UsageError, match=words):
        fourfold.quantize(written("qwen3_moe")[0], tmp_path / "out", EXPERTS, **flat(**options))
    assert not (tmp_path / "out").exists()


def test_no_room_for_waiting_activations(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fourfold.run import strategies as runs

    monkeypatch.setattr(runs, "free_bytes", lambda _: 300_000)
    arguments = (written("qwen3_moe")[0], tmp_path / "out", "nvfp4_experts_only")
    options = {"calib": [ids(tmp_path)], "calib_seq": 24, "threads": 1}
    assert fourfold.quantize(*arguments, **flat(**options)).clean
    with pytest.raises(fourfold.ResourceError, match="for waiting activations"):
        fourfold.quantize(*arguments, **flat(**options, activation_memory=0, overwrite=True))
