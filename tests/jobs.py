"""Jobs of `fourfold.quantize` in processes of their own, to be killed, and the bytes they leave.

A process is forked from one that has imported everything, so that it costs a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
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
def _processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_jobs"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent)):
        forkserver.ensure_running()
    return context


def start(*arguments: Any, kill_at: int = 0, **options: Any) -> Any:
    """Begin `fourfold.quantize(*arguments, **flat(**options))`.

    kill_at: the job kills itself before it changes the disk for this time; never for 0.
    """
    process = _processes().Process(target=_run, args=(arguments, options, kill_at))
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
