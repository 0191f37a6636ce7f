# SPDX-License-Identifier: Apache-2.0
"""Jobs and commands in processes of their own, to be killed, and the bytes they leave.

A process is forked from one that has imported everything, so that it costs a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from fourfold.config import CalibrationConfig, OutputConfig, Runtime
from fourfold.events import Event

MODEL = "qwen3_moe"
W4A16, W4A4 = "w4a16_nvfp4_experts_only_mse", "nvfp4_default_mse-fp8_kv"

DURABLE = ("replace", "fsync", "unlink", "pwrite", "write", "ftruncate", "mkdir")
"""What a job does to a disk: the system's calls between which it can be killed."""


CONFIGS = {"calibration": CalibrationConfig, "runtime": Runtime, "output": OutputConfig}


def flat(**options: Any) -> dict[str, Any]:
    """Keyword arguments of `fourfold.quantize`, with its config objects spelled as their fields."""
    for name, config in CONFIGS.items():
        own = {field.name for field in fields(config)} & options.keys()
        if own:
            options[name] = config(**{key: options.pop(key) for key in own})
    return options


@cache
def processes() -> Any:
    """The context of multiprocessing whose processes are forked from the warm one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_jobs"])
    given = os.environ.get("PYTHONPATH")  # which may name the fourfold that is tested
    path = os.pathsep.join([str(Path(__file__).parent), *([given] if given else [])])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return context


def start(*arguments: Any, kill_at: int = 0, **options: Any) -> Any:
    """Begin `fourfold.quantize(*arguments, **flat(**options))`.

    kill_at: the job kills itself before it changes the disk for this time; never for 0.
    """
    process = processes().Process(target=_run, args=(arguments, options, kill_at))
    process.start()
    return process


def _run(arguments: Any, options: Mapping[str, Any], kill_at: int) -> None:
    import torch

    import fourfold

    torch.set_num_threads(1)
    if kill_at:
        _kill_at(kill_at)
    fourfold.quantize(*arguments, **flat(**options))
    os._exit(0)


def _kill_at(number: int) -> None:
    done = [0]

    def counting(call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in DURABLE:
        setattr(os, name, counting(getattr(os, name)))


COMMAND = """
from fourfold.cli.app import main
main()
"""


class Script:
    """Python code that runs as `python -c CODE …` would; to be used as `subprocess.Popen` is."""

    def __init__(
        self, code: str, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> None:
        self._outputs = Path(tempfile.mkdtemp(prefix="script-"))
        words = ["-c", *map(str, arguments)]
        self._process = processes().Process(
            target=_run_script,
            args=(code, words, dict(environment or {}), self._outputs),
            daemon=True,
        )
        self._process.start()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.exitcode is None:
            self._process.kill()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end, and return what was printed on stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        out, err = ((self._outputs / name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self._outputs)
        return out, err


def start_command(
    *arguments: object, before: str = "", environment: Mapping[str, str] | None = None
) -> Script:
    """Begin `fourfold ARGUMENTS`, after Python code that the process runs first."""
    return Script(before + COMMAND, *arguments, environment=environment)


def settle_threads() -> None:
    """Let this thread make PyTorch's threads anew, which a fork has lost.

    Two threads that need them first, at the same time, end in "Invalid thread pool!".
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _run_script(code: str, words: list[str], environment: Mapping[str, str], outputs: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(outputs / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may be another
    sys.argv = words
    settle_threads()
    try:
        exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
    except KeyboardInterrupt:  # the interpreter ends so, too
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def only(kind: type[Event], call: Callable[[Any], object]) -> Callable[[Event], None]:
    """An `on_event` that passes on the events of one kind."""

    def on_event(event: Event) -> None:
        if isinstance(event, kind):
            call(event)

    return on_event


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by name, also what is hidden."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same(one: Path, other: Path) -> None:
    """Two folders hold the same files, byte for byte."""
    mine, theirs = files_of(one), files_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


def ids_file(folder: Path) -> Path:
    """Calibration data that needs no tokenizer."""
    import torch

    rows = torch.randint(3, 90, (20, 30), generator=torch.Generator().manual_seed(0)).tolist()
    file = folder / "ids.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file
