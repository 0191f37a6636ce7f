# SPDX-License-Identifier: Apache-2.0
"""What commands say, and where: terminals of any width, pipes, logs, and Ctrl-C at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from families import Truth
from test_cli import Written, in_process


@pytest.fixture(scope="module")
def quantized(written: Written, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what `quantize` made of it."""
    import fourfold

    model, out = written("qwen3_moe")[0], tmp_path_factory.mktemp("quantized") / "out"
    fourfold.quantize(model, out)
    return model, out


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys):
    return lambda *arguments: in_process(monkeypatch, capsys, *arguments)


SHOWING = {
    "plan": ["plan", "MODEL", "--no-time"],
    "verify": ["verify", "OUT", "--source", "MODEL"],
    "inspect": ["inspect", "OUT"],
    "recipes": ["recipes"],
    "guide": ["recipes", "--guide"],
    "summary": ["summary", "OUT"],
}


def arguments_of(command: str, quantized: tuple[Path, Path]) -> list[str]:
    paths = {"MODEL": str(quantized[0]), "OUT": str(quantized[1])}
    return [paths.get(argument, argument) for argument in SHOWING[command]]


@pytest.mark.parametrize("command", SHOWING)
def test_sixty_columns_suffice(
    command: str, run, quantized: tuple[Path, Path], terminal: Callable[[int], None]
) -> None:
    """Lines are cut between words; a name alone may be longer, and stays in one piece."""
    terminal(60)
    code, text, err = run(*arguments_of(command, quantized))
    assert code == 0, err
    too_long = [line for line in text.splitlines() if len(line) > 60 and " " in line.strip()]
    assert too_long == []


@pytest.mark.parametrize("command", SHOWING)
def test_nothing_is_cut_outside_a_terminal(
    command: str,
    run,
    quantized: tuple[Path, Path],
    terminal: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever COLUMNS says, which readline sets for child processes."""
    arguments = arguments_of(command, quantized) + ["--no-time"] * (command == "plan")
    monkeypatch.setenv("COLUMNS", "60")
    code, piped, _ = run(*arguments)
    terminal(1000)
    _, wide, _ = run(*arguments)
    assert code == 0
    assert piped == wide


def test_a_terminal_is_told_at_once(
    run, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before PyTorch is imported and the checkpoint is looked for."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    _, _, err = run("quantize", tmp_path / "nowhere", tmp_path / "out")
    first, *_ = err.splitlines()
    assert "quantizing " in first
    assert first.startswith("fourfold ")
    assert "recipe w4a16_nvfp4_experts_only_mse" in first
    _, _, err = run("quantize", tmp_path / "nowhere", tmp_path / "out", "--quiet")
    assert "fourfold " not in err


def test_quiet_shows_the_result_alone(run, written: Written, tmp_path: Path) -> None:
    model: tuple[Path, Truth] = written("qwen3_moe")
    code, text, err = run("quantize", model[0], tmp_path / "out", "--quiet")
    assert code == 0
    assert err == ""
    assert "role " not in text
    assert "linear weights quantized" in text
    assert run("verify", tmp_path / "out", "-q")[1].splitlines()[-1].startswith("clean")


def test_a_log_file_has_everything_with_its_time(run, written: Written, tmp_path: Path) -> None:
    model, log = written("qwen3_moe")[0], tmp_path / "run.log"
    code, _, _ = run("quantize", model, tmp_path / "out", "--quiet", "--log-file", log)
    assert code == 0
    code, _, err = run("quantize", model, tmp_path / "out", "--json", "--log-file", log)
    assert code == 1
    lines = log.read_text().splitlines()
    text = "\n".join(line.partition(" ")[2].partition(" ")[2] for line in lines)
    assert all(line.startswith("20") and line[10] == " " for line in lines)
    assert text.count(f"quantizing {model} into {tmp_path / 'out'}") == 2
    assert "role " in text  # the plan
    assert "24 / 24 linear weights quantized" in text
    assert text.splitlines()[-1] == err.splitlines()[-1]  # the error of the second run
    code, _, err = run("verify", tmp_path / "out", "--log-file", tmp_path / "no" / "where")
    assert code == 2
    assert "No such file or directory. Give another file." in err


IMPORTING = """
import builtins, os, signal, sys
original, sent, target = builtins.__import__, [], sys.argv.pop()
def importing(name, *arguments):
    if name == target and not sent:
        sent.append(name)
        os.kill(os.getpid(), signal.SIGINT)
    return original(name, *arguments)
builtins.__import__ = importing
from fourfold.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["fourfold.cli.app", "typer", "torch"])
def test_ctrl_c_during_imports(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, "plan", str(tmp_path), module],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "error: stopped by SIGINT; nothing was written.\n"
