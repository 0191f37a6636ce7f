# SPDX-License-Identifier: Apache-2.0
"""Several processes that do one job: `torchrun --nproc-per-node N -m fourfold …`.

Small values travel as JSON through the store of torch.distributed, which every launcher sets up;
tensors are reduced over a gloo group (see `reduction`), which works alike with and without GPUs.

An error of one rank is an error of all within seconds, with that rank's message. The rank that
fails writes it to the store, where a thread of every other rank looks twice a second. A rank that
is killed writes nothing. torchrun then ends the other ranks of its machine; for those of other
machines, and for other launchers, that thread also counts in the store, and a rank whose count
stands still is dead.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fourfold.distributed.launcher import Launch, launch
from fourfold.distributed.reduction import TensorGroup
from fourfold.errors import FourfoldError
from fourfold.statistics import Reduction

MEETING = timedelta(minutes=2)
"""The time that the first rank waits for the others at the start."""


@dataclass(frozen=True)
class RankTimeouts:
    """Seconds after which ranks act."""

    pulse: float = 0.5
    """Between two signs of life."""
    silence: float = 30.0
    """Without a sign of life, after which a rank counts as dead. An import can block a process. A
    rank that failed also waits this long for others that live and are in the middle of a shard."""
    farewell: float = 5.0
    """Without a sign of life, after which a rank that failed does not wait for another."""


class Ranks:
    """This process among those that do one job. Of this class itself, it does the job alone."""

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1) -> None:
        """Describe the ranks.

        Args:
            rank: The number of this rank.
            size: The number of ranks.
            local_size: How many of them share this machine.
        """
        self.rank, self.size, self.local_size = rank, size, local_size

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, by rank. Values are what JSON can hold."""
        return [value]

    def reduce(self, tensors: Mapping[str, Tensor], op: Reduction) -> dict[str, Tensor]:
        """Combine the tensors of all ranks element by element, in the order of ranks.

        Args:
            tensors: CPU tensors by name. A tensor that some ranks lack counts as zeros there.
            op: "sum" or "max".

        Returns:
            The combined tensors, the same bytes on all ranks.
        """
        return dict(tensors)

    def check(self) -> None:
        """Raise `RankFailedError` if another rank has failed."""

    def stop_writing(self) -> None:
        """After a failure, say that this rank writes no more, and wait until no rank does."""


class RankFailedError(FourfoldError):
    """Another rank failed. Message, exit code and the rest are those of its error."""

    def __init__(
        self, text: str, exit_code: int = 1, kind: str = "", resumable: bool = True
    ) -> None:
        super().__init__(text)
        self.exit_code, self.kind, self.resumable = exit_code, kind, resumable


class RankGroup(Ranks):
    """One of several ranks, which meet at a store of torch.distributed."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        local_size: int = 1,
        timeouts: RankTimeouts | None = None,
    ) -> None:
        """Describe the ranks, which share `store`; `joined` connects this one with the others."""
        super().__init__(rank, size, local_size)
        self.timeouts = timeouts or RankTimeouts()
        self._store = store
        self._round = 0
        self._tensor_group: TensorGroup | None = None
        self._failure: RankFailedError | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def gather(self, value: Any) -> list[Any]:
        self._round += 1
        self._store.set(f"{self._round}/{self.rank}", json.dumps(value))
        values = []
        for rank in range(self.size):
            self._wait_for(f"{self._round}/{rank}")
            values.append(json.loads(self._store.get(f"{self._round}/{rank}")))
        if self._round > 1:  # all ranks are in this round, so all have read the one before
            self._store.delete_key(f"{self._round - 1}/{self.rank}")
        return values

    def reduce(self, tensors: Mapping[str, Tensor], op: Reduction) -> dict[str, Tensor]:
        layouts: dict[str, list[Any]] = {}
        mine = {name: [str(x.dtype)[6:], list(x.shape)] for name, x in tensors.items()}
        for theirs in self.gather(mine):  # dtypes without "torch."
            layouts |= theirs
        if not layouts:
            return {}
        zeros = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape) in layouts.items()
            if name not in tensors
        }
        if self._tensor_group is None:
            self._tensor_group = TensorGroup(self._store, self.rank, self.size, self.check)
        return self._tensor_group.reduce(zeros | dict(tensors), op)

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def stop_writing(self) -> None:
        with suppress(dist.DistError, RuntimeError):  # the store may be gone, too
            self._report_error(sys.exc_info()[1])
            self._wait_for_all("stopped")

    def _wait_for(self, key: str) -> None:
        pause = 0.001
        while not self._store.check([key]):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _wait_for_all(self, word: str) -> None:
        """Say `word`, and wait until every rank has, unless it seems dead."""
        self._store.set(f"{word}/{self.rank}", "")
        pulses, begun = _Pulses(self._store, range(self.size)), time.monotonic()
        while time.monotonic() - begun < self.timeouts.silence:
            missing = {x for x in range(self.size) if not self._store.check([f"{word}/{x}"])}
            if missing <= pulses.silent(self.timeouts.farewell):
                return
            time.sleep(0.02)

    def _watch(self) -> None:
        """Give signs of life, and look for those of others and for their failure."""
        pulses = _Pulses(self._store, range(1, self.size) if self.rank == 0 else [0])
        try:
            for number in count():
                self._store.set(f"pulse/{self.rank}", str(number))
                if self._failure is None and self._store.check(["failed"]):
                    self._failure = RankFailedError(*json.loads(self._store.get("failed")))
                if self._failure is None:  # otherwise the others may have left
                    for rank in pulses.silent(self.timeouts.silence):
                        text = f"no sign of life for {self.timeouts.silence:.0f} s"
                        self._report(f"{text}: was it killed?", rank=rank)
                if self._ended.wait(self.timeouts.pulse):
                    return
        except (dist.DistError, RuntimeError) as error:
            if not self._ended.is_set() and self._failure is None:
                text = f"the other ranks cannot be reached ({str(error).splitlines()[0][:200]})"
                self._failure = RankFailedError(f"{text}. Were they stopped?")

    def _report_error(self, error: BaseException | None) -> None:
        """Report an error of this rank, unless it is that of another."""
        if error is None or isinstance(error, RankFailedError):
            return
        kind = type(error).__name__
        if isinstance(error, FourfoldError):
            self._report(str(error), error.exit_code, kind, error.resumable)
        else:
            self._report(repr(error) if isinstance(error, Exception) else "was stopped", 1, kind)

    def _report(self, text: str, *details: Any, rank: int | None = None) -> None:
        """Let all ranks know of a failure, as a `RankFailedError`; the first one counts."""
        text = f"rank {self.rank if rank is None else rank}: {text}"
        self._store.compare_set("failed", "", json.dumps([text, *details]))

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Within, an error here becomes one of all ranks; no rank leaves before the others."""
        self._watcher.start()
        try:
            yield
            self.gather("done")
        except BaseException as error:
            with suppress(dist.DistError, RuntimeError):  # the store may be gone, too
                self._report_error(error)
                self._wait_for_all("left")
                if not isinstance(error, RankFailedError):
                    # A launcher stops the other ranks as soon as this process has ended.
                    time.sleep(self.timeouts.pulse)
            raise
        else:
            if self.rank == 0:  # it may hold the store
                self._wait_for_all("left")
            else:
                self._store.set(f"left/{self.rank}", "")
        finally:
            self._ended.set()
            self._watcher.join(self.timeouts.farewell)


class _Pulses:
    """The signs of life of some ranks, as this rank sees them."""

    def __init__(self, store: Any, ranks: Iterable[int]) -> None:
        self._store = store
        self._last = dict.fromkeys(ranks, (b"", time.monotonic()))

    def silent(self, seconds: float) -> set[int]:
        """Return the ranks whose last sign of life came longer than `seconds` ago."""
        now = time.monotonic()
        for rank, (last, _) in self._last.items():
            key = f"pulse/{rank}"
            pulse = bytes(self._store.get(key)) if self._store.check([key]) else b""
            if pulse != last:
                self._last[rank] = pulse, now
        return {rank for rank, (_, since) in self._last.items() if now - since >= seconds}


_jobs: list[Any] = []
"""The store that jobs of this process have met at, once for each job. A new store empties it."""


@contextmanager
def joining(place: Launch | None = None) -> Iterator[Ranks]:
    """Join the ranks that this process was started among; without a launcher it is alone.

    Args:
        place: This process among them; by default as the launcher says.
    """
    place = place or launch()
    if place.size == 1:
        yield Ranks()
        return
    store = _store()
    _jobs[:] = [*(other for other in _jobs if other is store), store]
    # A launcher's store lives longer than its processes, and sees several jobs.
    name = f"fourfold/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{len(_jobs) - 1}"
    group = RankGroup(PrefixStore(name, store), place.rank, place.size, place.local_size)
    with group.joined():
        yield group


def of_process_group() -> Launch:
    """Return this process's place in torch.distributed's default group; alone without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Launch()
    launched = launch()
    return Launch(dist.get_rank(), dist.get_world_size(), launched.local_rank, launched.local_size)


def _store() -> Any:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    return _launchers_store()


@cache
def _launchers_store() -> Any:
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=MEETING)))
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise FourfoldError(
            f"{address}: the ranks did not meet there: {str(error).splitlines()[0][:200]}. "
            "Start all of them with torchrun."
        ) from error
    return store
