# SPDX-License-Identifier: Apache-2.0
"""One checkpoint of each family for all tests: written once, read by many."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

# Triton's kernels are interpreted, from its import on: transformers imports it, if it is there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from families import FAMILIES, Truth, write_checkpoint

# A suite that a shell starts in the background would ignore Ctrl-C, which tests raise.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests run
torch.set_num_threads(1)  # tiny models gain nothing, and lose much where cores are shared


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make stdout a terminal of so many characters, without colors."""

    def pretend(width: int) -> None:
        for name, value in {"COLUMNS": width, "LINES": 50, "TERM": "dumb"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    return pretend


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes in memory, for root alone."""
    mounted: list[Path] = []

    def mount(nbytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
        if os.getuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A command that a test runs in this process takes the signals for itself."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


Written = Callable[[str], tuple[Path, Truth]]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Family's name -> its folder and what it holds. Tests must not write into the folder."""

    @cache
    def write(name: str) -> tuple[Path, Truth]:
        folder = tmp_path_factory.mktemp(name)
        return folder, write_checkpoint(FAMILIES[name], folder)

    return write
