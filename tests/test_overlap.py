# SPDX-License-Identifier: Apache-2.0
"""Reading, computing and writing go on side by side, and no more is in memory than they need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourfold
from families import Truth
from fourfold.config import OutputConfig, Runtime
from fourfold.execution import Arena
from fourfold.formats import nvfp4
from fourfold.planning import DEFAULT_LIMITS
from fourfold.sources.safetensors import SafetensorsFolder
from fourfold.storage.shard_file import ShardFile
from jobs import W4A16, assert_same

Written = Callable[[str], tuple[Path, Truth]]


class Gauge:
    """How many are inside at a time, and how many there were at most."""

    def __init__(self) -> None:
        self.inside = self.most = self.entered = 0
        self.lock = threading.Condition()

    def around(self, call: Callable[..., Any], wait: Callable[[], None] | None = None) -> Any:
        def gauged(*arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.inside += 1
                self.entered += 1
                self.most = max(self.most, self.inside)
                self.lock.notify_all()
            try:
                if wait is not None:
                    wait()
                return call(*arguments, **options)
            finally:
                with self.lock:
                    self.inside -= 1

        return gauged

    def reach(self, number: int) -> None:
        """Wait until so many have entered, in all."""
        with self.lock:
            assert self.lock.wait_for(lambda: self.entered >= number, timeout=20)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_slow_disk_does_not_stop_who_computes(
    threads: int, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read takes until others were read, computed and written beside it."""
    computing, writing = Gauge(), Gauge()
    first = [True]

    def wait() -> None:
        if first.pop() if first else False:
            computing.reach(6)
            writing.reach(6)

    reading = Gauge()
    monkeypatch.setattr(SafetensorsFolder, "slab", reading.around(SafetensorsFolder.slab, wait))
    monkeypatch.setattr(nvfp4, "quantize_into", computing.around(nvfp4.quantize_into))
    monkeypatch.setattr(ShardFile, "write", writing.around(ShardFile.write))
    fourfold.quantize(
        written("mixtral")[0], tmp_path / "out", W4A16, runtime=Runtime(threads=threads)
    )
    monkeypatch.undo()
    assert computing.most <= threads
    assert reading.most <= threads + DEFAULT_LIMITS.waiting
    fourfold.quantize(written("mixtral")[0], tmp_path / "plain", W4A16, runtime=Runtime(threads=1))
    assert_same(tmp_path / "out", tmp_path / "plain")


def test_who_reads_does_not_run_ahead(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has one job in memory, and there are a few more than may compute."""
    arenas: list[Arena] = []
    make = Arena.__init__

    def counted(self: Arena) -> None:
        arenas.append(self)
        make(self)

    monkeypatch.setattr(Arena, "__init__", counted)
    fourfold.quantize(written("mixtral")[0], tmp_path / "out", W4A16, runtime=Runtime(threads=2))
    assert len(arenas) == 2 + DEFAULT_LIMITS.waiting


def test_a_disk_that_syncs_slowly_holds_the_workers_up(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are not opened without end while those before them wait for the disk."""
    unsynced = [0, 0]
    lock = threading.Lock()
    begin, finish = ShardFile.__init__, ShardFile.finish
    opened = threading.Semaphore(0)

    def begun(self: ShardFile, *arguments: Any) -> None:
        with lock:
            unsynced[0] += 1
            unsynced[1] = max(unsynced)
        begin(self, *arguments)
        opened.release()

    def slow(self: ShardFile) -> str:
        while opened.acquire(timeout=0.05):  # whoever would run ahead has the time to
            pass
        digest = finish(self)
        with lock:
            unsynced[0] -= 1
        return digest

    monkeypatch.setattr(ShardFile, "__init__", begun)
    monkeypatch.setattr(ShardFile, "finish", slow)
    model = written("qwen3_moe")[0]
    result = fourfold.quantize(
        model, tmp_path / "out", W4A16, runtime=Runtime(threads=1), output=OutputConfig(shards=40)
    )
    limits = DEFAULT_LIMITS
    most = limits.lookahead + 1 + limits.waiting + limits.unsynced
    assert unsynced[1] <= most + 1
    assert len(result.plan.shards) > 2 * most
