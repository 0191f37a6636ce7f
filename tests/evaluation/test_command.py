# SPDX-License-Identifier: Apache-2.0
"""Proves that `fourfold eval` shows the figures of `fourfold.evaluate` in every form, and ends in
one or two lines where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import fourfold
from fourfold.cli.tables import evaluation_table
from fourfold.documents import DOCUMENTS
from fourfold.embedded import model_dir
from fourfold.evaluation.evaluated import Evaluation, ModelFigures
from test_cli import in_process, options_of

from .checkpoints import HELDOUT, LENGTH, WINDOWS, options_for, write_outputs

Pair = tuple[Path, Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_outputs(tmp_path_factory.mktemp("outputs"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        return in_process(monkeypatch, capsys, "eval", *arguments)

    return call


SIZES = ("--text", HELDOUT, "--length", LENGTH, "--windows", WINDOWS)


def test_options() -> None:
    options = """
        source outs --text -t --length --windows --tokens --top --simulate-activations --cache
        --no-cache --record --device --activation-memory --hf-config --dtype --trust-remote-code
        --quiet -q --log-file --json
    """
    assert options_of("eval") == set(options.split())


def test_figures_as_text_and_as_json(outputs: Pair, run: Run, tmp_path: Path) -> None:
    wanted = fourfold.evaluate(model_dir(), outputs, options_for(tmp_path / "cache"))
    arguments = (model_dir(), *outputs, *SIZES, "--cache", tmp_path / "cache")
    code, text, err = run(*arguments)
    assert (code, err) == (0, "")
    assert text.splitlines()[:-1] == str(wanted).splitlines()[:-1]
    assert f"read from {wanted.cache}" in text.splitlines()[-1]
    code, text, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    values = json.loads(text)
    assert DOCUMENTS["evaluation"](**values).model_dump(mode="json") == values
    assert values["models"] == json.loads(json.dumps(wanted.to_dict()["models"]))
    assert values["from_cache"]


def test_tokens_and_no_cache(outputs: Pair, run: Run, tmp_path: Path) -> None:
    arguments = ("-t", HELDOUT, "--length", LENGTH, "--tokens", 2 * LENGTH + 1, "--json")
    code, text, _ = run(model_dir(), outputs[1], *arguments, "--no-cache", "--weights-only")
    values = json.loads(text)
    assert (code, values["windows"], values["cache"]) == (0, 2, None)
    assert not values["models"][0]["simulated"]
    assert not (tmp_path / "home").exists()
    code, text, _ = run(model_dir(), outputs[1], *arguments)
    assert Path(json.loads(text)["cache"]).parent == tmp_path / "home/fourfold/evaluation"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--text", "nowhere.txt"], 2, "nowhere.txt: no such file. Give a text, JSONL or Parquet"),
        (["--text", "SHORT"], 2, "Give a longer text, or a smaller --length."),
        ([*SIZES[:4], "--windows", "9999"], 2, "Give a longer text, or --windows 882."),
        (["--text", "SHORT", "--length", "4096"], 2, "Give --length 2048 or less."),
        ([*SIZES, "--tokens", "96"], 2, "give --windows or --tokens, not both."),
        ([*SIZES, "--cache", "x", "--no-cache"], 2, "give --cache or --no-cache, not both."),
        ([*SIZES, "--simulate-activations"], 2, "only its weights are quantized (W4A16)"),
        ([*SIZES, "--device", "tpu"], 2, "device 'tpu': give cpu, cuda, cuda:N or auto."),
        ([*SIZES, "--top", "1"], 2, "--top 1: give a whole number of at least 5."),
        ([], 2, "Missing option '--text'"),
    ],
)
def test_errors(
    arguments: list[object], code: int, message: str, outputs: Pair, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("import os")
    words = [tmp_path / "short.txt" if x == "SHORT" else x for x in arguments]
    found, text, err = run(model_dir(), outputs[0], *words)
    assert (found, text) == (code, "")
    assert message in err
    assert len(err.splitlines()) <= 4
    assert not (tmp_path / "home").exists()


def test_a_source_that_is_not_there(outputs: Pair, run: Run, tmp_path: Path) -> None:
    code, text, err = run(tmp_path / "nowhere", outputs[0], *SIZES)
    assert (code, text) == (1, "")
    assert err.startswith(f"error: {tmp_path}/nowhere: no such folder")


# --- how results look ---------------------------------------------------------------------

ONE = ModelFigures(
    model="first\x1b[0m", simulated=True, kv_cache="fp8", kl=0.02, kl_interval=(0.01, 0.03),
    kl_median=0.001, kl_p90=0.1, kl_p99=0.4, top1=0.95, top5=0.9, perplexity=9.5, ratio=None,
    ratio_interval=None,
)  # fmt: skip
TWO = ModelFigures(
    model="second", simulated=False, kv_cache=None, kl=0.01, kl_interval=None, kl_median=0.001,
    kl_p90=0.1, kl_p99=0.4, top1=0.95, top5=0.9, perplexity=9.25, ratio=0.5,
    ratio_interval=(0.4, 0.6),
)  # fmt: skip


def evaluation(*models: ModelFigures) -> Evaluation:
    return Evaluation(
        source="model", text="text.txt", text_digest="00", windows=4, length=512, compared=4096,
        vocabulary=151_936, rest=0.0123, perplexity=9.0, models=models, cache="file",
        cache_bytes=2_100_000_000, from_cache=False, seconds=1.0,
    )  # fmt: skip


def test_the_text() -> None:
    assert str(evaluation(ONE, TWO)).splitlines() == [
        "model: perplexity 9.0000 on 4 windows of 512 tokens from text.txt",
        "                                     first\\x1b[0m          second",
        "activations                 rounded, FP8 KV cache           exact",
        "KL                                      2.000e-02       1.000e-02",
        "  95 %                       1.00e-02 to 3.00e-02",
        "  median                                 1.00e-03        1.00e-03",
        "  90th percentile                        1.00e-01        1.00e-01",
        "  99th percentile                        4.00e-01        4.00e-01",
        "top-1 agreement                            95.00%          95.00%",
        "top-5 agreement                            90.00%          90.00%",
        "perplexity (source 9.0000)                 9.5000          9.2500",
        "KL / first                                                  0.500",
        "  95 %                                             0.400 to 0.600",
        "KL in nats a token, with 95 % intervals over windows; the source's 4,096 likeliest of "
        "151,936 tokens one by one, the rest (1.23% of the probability) as one: a lower bound",
        "the source's predictions were kept in file (2.1 GB)",
    ]
    assert "KL / first" not in str(evaluation(ONE))


def test_the_table_on_a_terminal(terminal: Callable[[int], None]) -> None:
    for width in (60, 100):
        terminal(width)
        console = Console(width=width)
        with console.capture() as captured:
            console.print(evaluation_table(evaluation(ONE, TWO)))
        text = captured.get()
        assert max(map(len, text.splitlines())) <= width
        assert "2.000e-02" in text
        assert "\x1b[0m" not in text
        assert "99th percentile" in text
