# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end a run from Python as cleanly as one from the command line."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

import fourfold
from conftest import Written
from fourfold import Runtime
from fourfold.events import Event, Resumed, WritingBegan
from fourfold.run.signals import SignalGuard, StoppedError
from jobs import W4A16, Script, assert_same

SIGNALLED = """
import os, signal, sys
import fourfold
from fourfold.events import ShardWritten

model, out, number, handler = sys.argv[1:]
sent = []

def on_event(event):
    if isinstance(event, ShardWritten) and not sent:
        sent.append(event)
        os.kill(os.getpid(), int(number))

if handler == "own":
    signal.signal(signal.SIGTERM, lambda *_: print("heard"))
before = signal.getsignal(signal.SIGTERM)
try:
    fourfold.quantize(model, out, runtime=fourfold.Runtime(threads=1), on_event=on_event)
finally:
    assert signal.getsignal(signal.SIGTERM) == before
    print("ended in order")
"""


def signalled(model: Path, out: Path, number: int, handler: str = "python's") -> tuple[int, str]:
    """Quantize, with a signal after the first shard; the exit code, and what was printed."""
    with Script(SIGNALLED, model, out, int(number), handler) as process:
        printed = "".join(process.communicate())
    return int(process.returncode), printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_the_same_call_resumes_from(
    number: signal.Signals, written: Written, tmp_path: Path
) -> None:
    model, out = written("qwen3_moe")[0], tmp_path / "out"
    code, printed = signalled(model, out, number)
    assert code == -number  # as without fourfold
    assert ("KeyboardInterrupt" in printed) == (number == signal.SIGINT)
    assert ("ended in order" in printed) == (number == signal.SIGINT)
    assert list(out.glob("*.safetensors"))
    assert not list(out.glob("*.json"))
    assert not list(out.glob(".*.partial"))
    events: list[Event] = []
    options = {"runtime": Runtime(threads=1)}
    fourfold.quantize(model, out, W4A16, on_event=events.append, **options)
    assert any(isinstance(event, Resumed) for event in events)
    fourfold.quantize(model, tmp_path / "whole", W4A16, **options)
    assert_same(out, tmp_path / "whole")


def test_a_handler_of_the_callers_own_stays(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed = signalled(written("qwen3_moe")[0], out, signal.SIGTERM, "own")
    assert code == 0
    assert "heard" in printed
    assert "ended in order" in printed
    assert (out / "config.json").exists()


class SignalledWhenCollected:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_a_destructor_still_ends_the_run(tmp_path: Path) -> None:
    """Python drops what is raised there."""
    ends: list[tuple[int, str]] = []
    guard = SignalGuard(lambda number, outcome: ends.append((number, outcome)))

    def run() -> None:
        with guard:
            guard(WritingBegan(tmp_path))
            SignalledWhenCollected()
            for _ in range(1000):
                time.sleep(0.01)

    with pytest.raises(StoppedError):
        run()
    assert ends == [(signal.SIGTERM, "nothing was written.")]
