# SPDX-License-Identifier: Apache-2.0
"""The command line with recipes that need calibration: what it says, and every error."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from families import Truth
from fourfold.storage.run_state import RunState
from jobs import start_command
from test_cli import check_error, in_process

Written = Callable[[str], tuple[Path, Truth]]
Run = Callable[..., tuple[int, str, str]]
RECIPE = "nvfp4_experts_only_mse-fp8_cast_kv"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys) -> Run:
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calib") / "ids.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 90, (20, 40), generator=generator).tolist()
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def test_the_whole_job(run: Run, written: Written, ids: Path, tmp_path: Path) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    sizes = ["--calib-size", 8, "--calib-seq", 32, "--batch-size", 4]
    code, text, err = run("quantize", model, out, "-r", RECIPE, "--calib", ids, *sizes)
    assert code == 0, err
    assert "calibrating on 8 samples of 32 tokens from ids.jsonl" in text
    assert "calibrated on 8 samples of 32 tokens from ids.jsonl · 0 of 8 experts" in text
    assert "24 input scales" in text
    assert run("verify", out, "--source", model)[0] == 0
    again = tmp_path / "again"
    code, text, err = run(
        "quantize", model, again, "-r", RECIPE, "--calibration", out / "calibration.safetensors"
    )
    assert code == 0, err
    assert "calibrating on" not in text
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in again.iterdir()
    )
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_the_embedded_text_serves_and_a_line_says_so(run: Run, tmp_path: Path) -> None:
    from fourfold.embedded import model_dir

    sizes = ["--calib-size", 2, "--calib-seq", 64]
    code, text, err = run("quantize", model_dir(), tmp_path / "out", "-r", RECIPE, *sizes)
    assert code == 0, err
    assert "from the embedded mixed text (--calib gives it your own)" in text


def test_json_is_one_document(run: Run, written: Written, ids: Path, tmp_path: Path) -> None:
    code, text, err = run(
        "quantize", written("qwen3_moe")[0], tmp_path / "out", "-r", RECIPE, "--calib", ids,
        "--calib-seq", 32, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(text)["calibration"]["samples"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calib", "missing.jsonl"], ["missing.jsonl"]),
        (["--calib-size", "0"], ["--calib-size 0", "at least 1"]),
        (["--calib-seq", "1"], ["--calib-seq 1", "at least 2"]),
        (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["--packing", "loose"], ["loose", "packed"]),
        (["--calib-seq", "100000"], ["100000"]),
        (["--device", "tpu"], ["'tpu'", "cpu, cuda, cuda:N or auto"]),
        (["--device", "cuda:99"], ["'cuda:99'", "this machine has"]),
        (["--calibration", "missing.safetensors"], ["missing.safetensors", "no such file"]),
    ],
)
def test_errors_come_before_anything_is_written(
    arguments: list[str], words: list[str], run: Run, written: Written, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    outcome = run("quantize", written("qwen3_moe")[0], out, "-r", RECIPE, *arguments)
    check_error(outcome, 2, *words)
    assert not out.exists()


def test_what_a_w4a16_recipe_cannot_use(run: Run, written: Written, tmp_path: Path) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    statistics = tmp_path / "calibration.safetensors"
    statistics.touch()
    check_error(
        run("quantize", model, out, "--calibration", statistics), 2, "quantizes no activations"
    )
    check_error(run("quantize", model, out, "--calib", statistics), 2, "quantizes no activations")
    check_error(
        run("quantize", model, out, "-r", RECIPE, "--calibration", statistics, "--calib", "x"),
        2, "not both",
    )  # fmt: skip


SLOW_EXPERTS = (
    "import time\n"
    "from fourfold.calibration.observers import Observers\n"
    "see = Observers.__call__\n"
    "def slow(*a, **k):\n"
    "    time.sleep(0.05)\n"
    "    return see(*a, **k)\n"
    "Observers.__call__ = slow\n"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_while_it_observes(
    number: int, code: int, written: Written, ids: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["-r", RECIPE, "--calib", ids, "--calib-seq", 32, "--batch-size", 1]
    model = written("qwen3_moe")[0]
    with start_command("quantize", model, out, *arguments, before=SLOW_EXPERTS) as process:
        while not RunState(out).has_finished_shards:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith("error: stopped by SIG")
    assert "Traceback" not in err
    assert "keeps 1 of 4 shards" in err  # layer 0 has no experts
    assert not list(out.glob("*.json"))
