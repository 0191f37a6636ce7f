# SPDX-License-Identifier: Apache-2.0
"""Proves calibration from end to end: hard cases, the same bytes again, and no trace of a failure.

What is odd about a checkpoint (experts that nobody chooses, weights that are all zero, layers that
overflow) is written into it; everything is judged by what lies in OUT.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fourfold
from fourfold.calibration.statistics import Statistics
from fourfold.config import CalibrationConfig, Runtime
from fourfold.errors import CalibrationError, ObservationError, OutputError, PlanError, UsageError
from fourfold.events import BatchCalibrated, Event, LayerCalibrated, ShardWritten
from fourfold.storage.names import STATISTICS, SUMMARY
from jobs import flat

from .test_streaming import BoomError, open_files, running_threads

EXPERTS, EVERYTHING = "nvfp4_experts_only", "nvfp4_default_mse-fp8_kv"
SHARED = {"threads": 1, "calib_size": 8, "calib_seq": 16, "batch_size": 3}


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids that every tiny model knows."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 90, (30 + n % 7,), generator=generator) for n in range(20)]
    file = tmp_path_factory.mktemp("calib") / "ids.jsonl"
    return write_texts(file, [text.tolist() for text in texts])


def write_texts(file: Path, texts: list[list[int]]) -> Path:
    file.write_text("".join(json.dumps({"input_ids": text}) + "\n" for text in texts))
    return file


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def changed(folder: Path, to: Path, change: Change) -> Path:
    """A checkpoint with other values."""
    shutil.copytree(folder, to)
    file = to / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return to


def tensors_of(out: Path) -> dict[str, Tensor]:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    return {key: value for file in files for key, value in load_file(out / file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_scales(result: fourfold.Result) -> dict[str, float]:
    """One positive input scale at every site, in the files as in the result; by linear weight."""
    tensors, sites = tensors_of(result.out), defaultdict(set)
    for linear in result.plan.linears:
        sites[linear.input_site].add(float(tensors[f"{linear.name}.input_scale"]))
    assert all(len(scales) == 1 for scales in sites.values())
    assert all(0 < scale < math.inf for (scale,) in sites.values())
    found = {x.name: float(tensors[f"{x.name}.input_scale"]) for x in result.linears}
    assert found == {x.name: x.input_scale for x in result.linears}
    return found


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / SUMMARY).read_text())


# --- experts that nobody reached --------------------------------------------------------------


def test_experts_that_no_token_reached(written: Any, calib: Path, tmp_path: Path) -> None:
    def push_away(raw: dict[str, Tensor]) -> dict[str, Tensor]:
        for key, value in raw.items():
            if key.endswith("e_score_correction_bias"):
                value[2:] = -1e4
        return raw

    folder = changed(written("deepseek_v3")[0], tmp_path / "model", push_away)
    result = fourfold.quantize(folder, tmp_path / "out", EXPERTS, **flat(calib=[calib], **SHARED))
    assert result.clean, str(result.report)
    assert fourfold.verify(tmp_path / "out").clean
    modules = [f"model.layers.{layer}.mlp.experts" for layer in (1, 2)]
    assert result.unreached_experts == {module: [2, 3] for module in modules}
    assert "4 of 8 experts saw no token" in str(result)
    assert "model.layers.2.mlp.experts.3" in str(result)
    summary = summary_of(result.out)
    assert summary["calibration"]["unreached_experts"] == 4
    assert [(each["module"], each["tokens"]) for each in summary["experts"]] == [
        (module, [128, 128, 0, 0]) for module in modules
    ]
    scales = check_scales(result)
    for linear in result.linears:
        twin = linear.name.replace(".experts.2.", ".experts.0.").replace(
            ".experts.3.", ".experts.0."
        )
        assert scales[linear.name] == scales[twin]
        assert (linear.tokens, linear.input_amax is None) == (
            (128, False) if linear.expert in (0, 1) else (0, True)
        )


def test_a_single_token(written: Any, tmp_path: Path) -> None:
    calib = write_texts(tmp_path / "one.jsonl", [[5]])
    options = SHARED | {"calib_size": 1, "calib_seq": 2, "packing": "padded"}
    folder, _ = written("qwen3_moe")
    result = fourfold.quantize(
        folder, tmp_path / "out", EVERYTHING, **flat(calib=[calib], **options)
    )
    assert result.clean, str(result.report)
    assert result.statistics.data.tokens == 1
    assert [len(experts) for experts in result.unreached_experts.values()] == [2, 2]
    assert {x.tokens for x in result.linears if x.expert is None} == {1}
    check_scales(result)


@pytest.mark.parametrize("recipe", [EXPERTS, EVERYTHING])
def test_experts_that_are_all_zero(recipe: str, written: Any, calib: Path, tmp_path: Path) -> None:
    def silence(raw: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.zeros_like(v) if ".experts." in k else v for k, v in raw.items()}

    folder = changed(written("qwen3_moe")[0], tmp_path / "model", silence)
    result = fourfold.quantize(folder, tmp_path / "out", recipe, **flat(calib=[calib], **SHARED))
    assert result.clean, str(result.report)
    assert fourfold.verify(tmp_path / "out").clean
    scales = check_scales(result)
    down = {name: scale for name, scale in scales.items() if ".experts." in name and "down" in name}
    assert set(down.values()) == {1.0}, "it only saw zeros"
    gate = [scale for name, scale in scales.items() if ".experts." in name and "gate" in name]
    assert 1.0 not in gate


def test_experts_that_are_modules_of_their_own(written: Any, tmp_path: Path) -> None:
    """NLLB: a single expert may see nothing, its layer has seen something."""
    calib = write_texts(tmp_path / "short.jsonl", [[5, 6, 7]])
    options = SHARED | {"calib_size": 1, "calib_seq": 4, "packing": "padded"}
    folder, _ = written("nllb_moe")
    result = fourfold.quantize(folder, tmp_path / "out", EXPERTS, **flat(calib=[calib], **options))
    assert result.clean, str(result.report)
    unseen = [x for x in result.linears if x.input_amax is None]
    assert unseen
    assert len(unseen) < len(result.linears)
    check_scales(result)


# --- what cannot be calibrated ------------------------------------------------------------------


def test_an_input_site_that_nothing_reached(written: Any, calib: Path, tmp_path: Path) -> None:
    folder, _ = written("ernie4_5_vl_moe")
    site = r"layers\.1\.mlp\.vision_moe\.experts\.\w+: no calibration token reached it"
    with pytest.raises(ObservationError, match=site):
        fourfold.quantize(folder, tmp_path / "out", EXPERTS, **flat(calib=[calib], **SHARED))
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_name_the_module(
    written: Any, calib: Path, tmp_path: Path
) -> None:
    def blow_up(raw: dict[str, Tensor]) -> dict[str, Tensor]:
        raw["model.layers.1.input_layernorm.weight"].fill_(3e38)
        return raw

    folder = changed(written("qwen3_moe")[0], tmp_path / "model", blow_up)
    for recipe, module in (
        (EXPERTS, r"model\.layers\.1\.mlp\.experts\.gate_up"),
        (EVERYTHING, r"model\.layers\.1\."),
    ):
        with pytest.raises(
            ObservationError, match=rf"^{module}.*: NaN or Inf among the activations"
        ):
            fourfold.quantize(folder, tmp_path / "out", recipe, **flat(calib=[calib], **SHARED))
        assert not (tmp_path / "out").exists()


def test_a_model_that_fails_while_it_reads(written: Any, calib: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written("mixtral")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        fourfold.ModelError, match=r"^MixtralForCausalLM: fails while it reads a text: "
    ):
        fourfold.quantize(folder, tmp_path / "out", EVERYTHING, **flat(calib=[calib], **SHARED))
    assert not (tmp_path / "out").exists()


def test_all_experts_where_a_class_cannot(written: Any, calib: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "all.yaml"
    recipe.write_text(
        "activations: {format: nvfp4}\ncalibration: {all_experts: true}\nquantize: [experts]\n"
    )
    folder, _ = written("dbrx")
    with pytest.raises(PlanError, match=r"all_experts is not possible for a DbrxExpertGLU"):
        fourfold.quantize(folder, tmp_path / "out", recipe, **flat(calib=[calib], **SHARED))
    folder, _ = written("qwen3_moe")
    every = fourfold.quantize(folder, tmp_path / "every", recipe, **flat(calib=[calib], **SHARED))
    routed = fourfold.quantize(
        folder, tmp_path / "routed", EXPERTS, **flat(calib=[calib], **SHARED)
    )
    for path, experts in every.statistics.experts.items():
        other = routed.statistics.experts[path]
        assert torch.equal(experts.tokens, other.tokens)
        assert len(set(experts.gate_up_amax.tolist())) == 1, "each expert saw every token"
        assert experts.gate_up_amax.max() == other.gate_up_amax.max()
        assert bool((experts.down_amax >= other.down_amax).all())


# --- the same bytes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(written: Any, calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of an undisturbed run, to compare with."""
    folder, _ = written("qwen3_moe")
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert fourfold.quantize(folder, out, EVERYTHING, **flat(calib=[calib], **SHARED)).clean
    return out


def test_the_same_again(first: Path, written: Any, calib: Path, tmp_path: Path) -> None:
    folder, _ = written("qwen3_moe")
    events: list[Event] = []
    options = flat(calib=[calib], on_event=events.append, **SHARED)
    fourfold.quantize(folder, tmp_path / "again", EVERYTHING, **options)
    assert contents(tmp_path / "again") == contents(first)
    assert STATISTICS in contents(first)
    batches = [event for event in events if isinstance(event, BatchCalibrated)]
    layers = batches[0].layers
    where = [(event.layer, event.batches_done) for event in batches]
    assert where == [(layer, batch) for layer in range(layers) for batch in range(4)]
    assert [x.tokens_done for x in batches] == sorted(x.tokens_done for x in batches)
    assert batches[0].tokens_done == 0
    assert batches[-1].tokens_done == batches[-1].tokens_total == layers * 8 * 16


def is_unlinked(descriptor: int) -> bool:
    """True for the file with activations, which has no name."""
    return os.readlink(f"/proc/self/fd/{descriptor}").endswith("(deleted)")


@pytest.mark.parametrize("threads", [1, 3])
def test_activations_on_the_disk_change_nothing(
    threads: int,
    first: Path,
    written: Any,
    calib: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pwrite, writes = os.pwrite, []

    def count(descriptor: int, *args: Any) -> int:
        writes.append(is_unlinked(descriptor))
        return pwrite(descriptor, *args)

    monkeypatch.setattr(os, "pwrite", count)
    folder, _ = written("qwen3_moe")
    options = SHARED | {"threads": threads, "activation_memory": 0}
    fourfold.quantize(folder, tmp_path / "again", EVERYTHING, **flat(calib=[calib], **options))
    assert contents(tmp_path / "again") == contents(first)
    assert any(writes)


def test_statistics_can_be_used_again(first: Path, written: Any, tmp_path: Path) -> None:
    """From the file, or as an object: nothing is run, and the bytes are the same."""
    folder, _ = written("qwen3_moe")
    given = {"file": first / STATISTICS, "object": Statistics.load(first / STATISTICS)}
    for name, calibration in given.items():
        out = tmp_path / name
        result = fourfold.quantize(
            folder, out, EVERYTHING, calibration=calibration, runtime=Runtime(threads=1)
        )
        assert result.clean, str(result.report)
        assert contents(out) == contents(first)


def test_statistics_serve_a_narrower_recipe(
    first: Path, written: Any, calib: Path, tmp_path: Path
) -> None:
    folder, _ = written("qwen3_moe")
    alone = fourfold.quantize(folder, tmp_path / "alone", EXPERTS, **flat(calib=[calib], **SHARED))
    reused = fourfold.quantize(
        folder,
        tmp_path / "reused",
        EXPERTS,
        calibration=first / STATISTICS,
        runtime=Runtime(threads=1),
    )
    assert check_scales(reused) == check_scales(alone)


def test_statistics_that_do_not_fit(first: Path, written: Any, tmp_path: Path) -> None:
    folder, _ = written("qwen3_moe")
    file, out = tmp_path / STATISTICS, tmp_path / "out"

    def refused(words: str, model: Path = folder, recipe: str = EVERYTHING) -> None:
        with pytest.raises(CalibrationError, match=words):
            fourfold.quantize(model, out, recipe, calibration=file, runtime=Runtime(threads=1))
        assert not out.exists()

    refused("no such file")
    good = (first / STATISTICS).read_bytes()
    for bad in (b"", b"garbage" * 9, good[:-1], good[:40], good + b"x"):
        file.write_bytes(bad)
        refused("not the statistics of a calibration")
    save_file({"a": torch.ones(1)}, file)
    refused("not the statistics of a calibration")
    shutil.copy(folder / "model.safetensors", file)
    refused("not the statistics of a calibration")
    shutil.copy(first / STATISTICS, file)
    refused("the statistics are of another model", written("mixtral")[0], EXPERTS)
    statistics = Statistics.load(first / STATISTICS)
    path = "model.layers.2.mlp.experts"
    sites = dict(statistics.sites)
    for site in (f"{path}.gate_up", f"{path}.down"):
        statistics.sites[site] = {name: value[:3] for name, value in sites[site].items()}
    statistics.save(file)
    refused(rf"{path}: the statistics are of 3 experts, the model has 4")
    statistics.sites = sites
    linear = "model.layers.0.self_attn.o_proj"
    del sites[linear]
    statistics.save(file)
    refused(rf"{linear}: the statistics have nothing of it")


def test_statistics_of_a_model_with_the_same_names(
    first: Path, written: Any, tmp_path: Path
) -> None:
    folder, _ = written("deepseek_v3")
    with pytest.raises(CalibrationError, match="model"):
        fourfold.quantize(folder, tmp_path / "out", EXPERTS, calibration=first / STATISTICS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_statistics_with_impossible_numbers(
    bad: float, first: Path, written: Any, tmp_path: Path
) -> None:
    statistics = Statistics.load(first / STATISTICS)
    statistics.experts["model.layers.1.mlp.experts"].down_amax[1] = bad
    statistics.save(tmp_path / STATISTICS)
    with pytest.raises(CalibrationError, match=r"experts\.down\.amax holds"):
        fourfold.quantize(
            written("qwen3_moe")[0],
            tmp_path / "out",
            EXPERTS,
            calibration=tmp_path / STATISTICS,
        )


def test_data_or_statistics(first: Path, written: Any, calib: Path, tmp_path: Path) -> None:
    folder, _ = written("qwen3_moe")
    with pytest.raises(UsageError, match="not both"):
        fourfold.quantize(
            folder,
            tmp_path / "out",
            EXPERTS,
            calibration=CalibrationConfig(calib=[calib], statistics=first / STATISTICS),
        )
    with pytest.raises(UsageError, match="quantizes no activations"):
        fourfold.quantize(
            folder, tmp_path / "out", f"w4a16_{EXPERTS}", calibration=first / STATISTICS
        )


# --- failures -----------------------------------------------------------------------------------


class Trouble:
    """Raises something in one of the products of the experts, or in a callback."""

    def __init__(self, where: str, what: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
        self.where, self.what, self.count = where, what, 0
        if where == "an experts forward":
            grouped = torch.nn.functional.grouped_mm

            def product(*args: Any, **kwargs: Any) -> Tensor:
                self.step(5)
                return grouped(*args, **kwargs)

            patch.setattr(torch.nn.functional, "grouped_mm", product)

    def step(self, number: int) -> None:
        self.count += 1
        if self.count == number:
            self.what()

    def on_event(self, event: Event) -> None:
        kinds = {"a layer that was run": LayerCalibrated, "a shard that was written": ShardWritten}
        if self.where in kinds and isinstance(event, kinds[self.where]):
            self.step(2)


def boom() -> None:
    raise BoomError


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def no_memory() -> None:
    raise MemoryError


KINDS = [(boom, BoomError), (no_memory, MemoryError), (interrupt, KeyboardInterrupt)]
CASES = [
    (where, *kind)
    for where in ("an experts forward", "a layer that was run", "a shard that was written")
    for kind in KINDS
    if kind[1] is not KeyboardInterrupt or "shard" not in where  # signals come to the main thread
]


@pytest.mark.parametrize(
    ("where", "what", "error"), CASES, ids=[f"{c[0]}-{c[2].__name__}" for c in CASES]
)
def test_a_failure_leaves_no_checkpoint_and_can_be_made_good(
    where: str,
    what: Callable[[], None],
    error: type[BaseException],
    first: Path,
    written: Any,
    calib: Path,
    tmp_path: Path,
) -> None:
    folder, out = written("qwen3_moe")[0], tmp_path / "out"
    before = running_threads(), len(open_files())
    with pytest.MonkeyPatch.context() as patch:
        trouble = Trouble(where, what, patch)
        with pytest.raises(error):
            fourfold.quantize(
                folder, out, EVERYTHING, **flat(calib=[calib], **SHARED), on_event=trouble.on_event
            )
    assert not list(out.glob("*.json"))
    assert not list(out.glob(".*.partial"))
    assert (running_threads(), len(open_files())) == before
    fourfold.quantize(folder, out, EVERYTHING, **flat(calib=[calib], **SHARED))
    assert contents(out) == contents(first)


def test_a_full_disk_while_activations_wait(
    first: Path, written: Any, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def full(descriptor: int, *args: Any) -> int:
        if is_unlinked(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, *args)

    monkeypatch.setattr(os, "pwrite", full)
    folder, out = written("qwen3_moe")[0], tmp_path / "out"
    with pytest.raises(OutputError, match="no room for the activations of waiting samples"):
        fourfold.quantize(
            folder, out, EVERYTHING, **flat(calib=[calib], activation_memory=0, **SHARED)
        )
    assert not out.exists()
    assert threading.active_count() == len(running_threads())
    monkeypatch.undo()
    fourfold.quantize(folder, out, EVERYTHING, **flat(calib=[calib], **SHARED))
    assert contents(out) == contents(first)
