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
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, Protocol

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


class Ranks(Protocol):
    """This process among those that do one job."""

    rank: int
    size: int
    local_size: int
    """The number of ranks on this machine."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, by rank. Values are what JSON can hold."""

    def reduce(self, tensors: Mapping[str, Tensor], op: Reduction) -> dict[str, Tensor]:
        """Combine the tensors of all ranks element by element, in the order of ranks.

        Args:
            tensors: CPU tensors by name. A tensor that some ranks lack counts as zeros there.
            op: "sum" or "max".

        Returns:
            The combined tensors, the same bytes on all ranks.
        """

    def check(self) -> None:
        """Raise `RankFailedError` if another rank has failed."""

    def stop_writing(self) -> None:
        """After a failure, say that this rank writes no more, and wait until no rank does."""


@dataclass
class Alone:
    """One process does everything."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def reduce(self, tensors: Mapping[str, Tensor], op: Reduction) -> dict[str, Tensor]:
        return dict(tensors)

    def check(self) -> None:
        pass

    def stop_writing(self) -> None:
        pass


@dataclass(frozen=True)
class Failure:
    """The error of a rank, as the others learn of it."""

    rank: int
    text: str
    exit_code: int = 1
    kind: str = ""
    """The error's class."""
    resumable: bool = True

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe an error of this rank."""
        if isinstance(error, FourfoldError):
            text = str(error)
        else:
            text = repr(error) if isinstance(error, Exception) else "was stopped"
        exit_code, resumable = getattr(error, "exit_code", 1), getattr(error, "resumable", True)
        return cls(rank, text, exit_code, type(error).__name__, resumable)


class RankFailedError(FourfoldError):
    """Another rank failed. Message, exit code and the rest are those of its error."""

    def __init__(self, text: str, failure: Failure | None = None) -> None:
        super().__init__(text)
        self.kind = "" if failure is None else failure.kind
        self.exit_code = 1 if failure is None else failure.exit_code
        self.resumable = failure is None or failure.resumable


class RankGroup:
    """One of several ranks, which meet at a store of torch.distributed."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        local_size: int = 1,
        timeouts: RankTimeouts | None = None,
    ) -> None:
        """Describe the ranks; `joined` connects this one with the others.

        Args:
            store: A store that all ranks share.
            rank: The number of this rank.
            size: The number of ranks.
            local_size: How many of them share this machine.
            timeouts: When ranks count as dead.
        """
        self.rank, self.size, self.local_size = rank, size, local_size
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
        for theirs in self.gather({name: _layout(tensor) for name, tensor in tensors.items()}):
            layouts |= theirs
        if not layouts:
            return {}
        complete = {
            name: tensors[name] if name in tensors else torch.zeros(shape, dtype=_dtype(dtype))
            for name, (dtype, shape) in layouts.items()
        }
        if self._tensor_group is None:
            self._tensor_group = TensorGroup(self._store, self.rank, self.size, self.check)
        return self._tensor_group.reduce(complete, op)

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
                    failure = Failure(**json.loads(self._store.get("failed")))
                    text = f"rank {failure.rank}: {failure.text}"
                    self._failure = RankFailedError(text, failure)
                if self._failure is None:  # otherwise the others may have left
                    for rank in pulses.silent(self.timeouts.silence):
                        seconds = f"{self.timeouts.silence:.0f} s"
                        self._report(
                            Failure(rank, f"no sign of life for {seconds}: was it killed?")
                        )
                if self._ended.wait(self.timeouts.pulse):
                    return
        except (dist.DistError, RuntimeError) as error:
            if not self._ended.is_set() and self._failure is None:
                text = f"the other ranks cannot be reached ({str(error).splitlines()[0][:200]})"
                self._failure = RankFailedError(f"{text}. Were they stopped?")

    def _report_error(self, error: BaseException | None) -> None:
        """Report an error of this rank, unless it is that of another."""
        if error is not None and not isinstance(error, RankFailedError):
            self._report(Failure.of(self.rank, error))

    def _report(self, failure: Failure) -> None:
        """Let all ranks know of a failure; the first one counts."""
        self._store.compare_set("failed", "", json.dumps(asdict(failure)))

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


def _layout(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


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
        yield Alone()
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
