"""Several processes that do one job: `torchrun --nproc-per-node N -m fourfold …`.

Small values travel as JSON through the store of torch.distributed, which every launcher sets up;
tensors are reduced over a gloo group (see `reduction`), which works alike with and without GPUs.
A rank that waits for the others looks for their failure meanwhile, and a thread
watches that they live: an error of one is an error of all within seconds.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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

PULSE = 0.5
"""Seconds between two signs of life."""

SILENCE = 30.0
"""Seconds without one after which a rank is taken for dead. An import can hold a process up."""

MEETING = timedelta(minutes=2)
"""How long the first rank waits for the others at the start."""

FAREWELL = 5.0
"""Seconds that a rank that failed waits for one that gives no sign of life to hear of it. For one
that is alive it waits `SILENCE`: it may be in the middle of a large shard, on a busy machine."""


class Ranks(Protocol):
    """This process among those that do one job."""

    rank: int
    size: int
    local_size: int
    """How many of them share this machine."""

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, by rank. `value` is what JSON can hold."""

    def reduce(self, tensors: Mapping[str, Tensor], op: Reduction) -> dict[str, Tensor]:
        """Combine the tensors of all ranks element by element, in the order of ranks.

        Args:
            tensors: CPU tensors by name. A tensor that some ranks lack counts as zeros there.
            op: "sum" or "max".

        Returns:
            The combined tensors, the same bytes on all ranks.
        """

    def check(self) -> None:
        """Raise `RankFailedError` where another rank has failed."""

    def settle(self) -> None:
        """After a failure: this rank writes no more. Waits until no other does, for seconds."""


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

    def settle(self) -> None:
        pass


class RankFailedError(FourfoldError):
    """Another rank failed; the message is its own."""

    kind = ""
    """The class of the error that it failed with."""
    resumable = True
    """That of the error that it failed with."""


class Together:
    """One of several ranks, which meet at a store of torch.distributed."""

    def __init__(self, store: Any, rank: int, size: int, local_size: int = 1) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self._store = store
        self._round = 0
        self._tensor_group: TensorGroup | None = None
        self._failure: RankFailedError | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def gather(self, value: Any) -> list[Any]:
        self._round += 1
        self._store.set(f"{self._round}/{self.rank}", json.dumps(value))
        found = []
        for rank in range(self.size):
            self._wait_for(f"{self._round}/{rank}")
            found.append(json.loads(self._store.get(f"{self._round}/{rank}")))
        if self._round > 1:  # everybody is here, so everybody has read what came before
            self._store.delete_key(f"{self._round - 1}/{self.rank}")
        return found

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

    def settle(self) -> None:
        with suppress(dist.DistError, RuntimeError):
            self._tell_of(sys.exc_info()[1])
            self._store.set(f"settled/{self.rank}", "")
            self._wait_some("settled", SILENCE)

    def _wait_some(self, word: str, most: float) -> None:
        """Until every rank has said `word`, for `most` seconds; not for one that seems dead."""
        begun = time.monotonic()
        heard = dict.fromkeys(range(self.size), (b"", begun))
        while (now := time.monotonic()) - begun < most:
            missing = [rank for rank in heard if not self._store.check([f"{word}/{rank}"])]
            for rank in missing:
                if (pulse := self._pulse_of(rank)) != heard[rank][0]:
                    heard[rank] = pulse, now
            if not any(now - heard[rank][1] < FAREWELL for rank in missing):
                return
            time.sleep(0.02)

    def _wait_for(self, key: str) -> None:
        pause = 0.001
        while not self._store.check([key]):
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _watch(self) -> None:
        """The thread: give signs of life, look for those of others and for their failure."""
        watched = range(1, self.size) if self.rank == 0 else range(1)
        last = {rank: (b"", time.monotonic()) for rank in watched}
        try:
            for number in count():
                self._store.set(f"pulse/{self.rank}", str(number))
                if self._failure is None and self._store.check(["failed"]):
                    self._hear(json.loads(self._store.get("failed")))
                    last.clear()  # one failure is enough; and they leave now
                for rank, (pulse, since) in last.items():
                    now = self._pulse_of(rank)
                    if now != pulse:
                        last[rank] = now, time.monotonic()
                    elif time.monotonic() - since > SILENCE:
                        self._tell(rank, f"has not answered for {SILENCE:.0f} s: was it killed?")
                if self._ended.wait(PULSE):
                    return
        except (dist.DistError, RuntimeError) as error:
            if not self._ended.is_set() and self._failure is None:
                text = f"the other ranks cannot be reached ({str(error).splitlines()[0][:200]})"
                self._failure = RankFailedError(f"{text}. Were they stopped?")

    def _pulse_of(self, rank: int) -> bytes:
        key = f"pulse/{rank}"
        return bytes(self._store.get(key)) if self._store.check([key]) else b""

    def _hear(self, failed: dict[str, Any]) -> None:
        self._failure = RankFailedError(f"rank {failed['rank']}: {failed['text']}")
        self._failure.exit_code = failed["exit_code"]
        self._failure.kind = failed["kind"]
        self._failure.resumable = failed["resumable"]

    def _tell(
        self, rank: int, text: str, exit_code: int = 1, kind: str = "", resumable: bool = True
    ) -> None:
        failed = {
            "rank": rank,
            "text": text,
            "exit_code": exit_code,
            "kind": kind,
            "resumable": resumable,
        }
        self._store.compare_set("failed", "", json.dumps(failed))

    def _tell_of(self, error: BaseException | None) -> None:
        """Tell the others that this rank fails, unless that is why it does."""
        if error is None or isinstance(error, RankFailedError):
            return
        text = str(error) if isinstance(error, FourfoldError) else repr(error)
        if not isinstance(error, Exception):
            text = "was stopped"
        exit_code, resumable = getattr(error, "exit_code", 1), getattr(error, "resumable", True)
        self._tell(self.rank, text, exit_code, type(error).__name__, resumable)

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Within, an error here becomes one of all ranks; nobody leaves before the others."""
        self._watcher.start()
        try:
            yield
            self.gather("done")
        except BaseException as error:
            with suppress(dist.DistError, RuntimeError):  # the store may be gone, too
                self._tell_of(error)
                self._store.set(f"left/{self.rank}", "")
                self._wait_some("left", SILENCE)
                if not isinstance(error, RankFailedError):
                    time.sleep(PULSE)  # a launcher stops the others once this process has ended
            raise
        else:
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0:  # which may be the one that has the store
                self._wait_some("left", 5 * SILENCE)
        finally:
            self._ended.set()
            self._watcher.join(FAREWELL)


def _layout(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


_jobs: list[Any] = []
"""The store that jobs of this process have met at, once for each: another store begins anew."""


@contextmanager
def joining(found: Launch | None = None) -> Iterator[Ranks]:
    """The ranks that this process was started among; alone without a launcher."""
    found = found or launch()
    if found.size == 1:
        yield Alone()
        return
    store = _store()
    _jobs[:] = [*(each for each in _jobs if each is store), store]
    # A launcher's store outlives its workers, and a job those before it.
    name = f"fourfold/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{len(_jobs) - 1}"
    together = Together(PrefixStore(name, store), found.rank, found.size, found.local_size)
    with together.taking_part():
        yield together


def of_process_group() -> Launch:
    """The ranks of torch.distributed's default process group; alone without one."""
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
            f"{address}: the ranks do not meet there: {str(error).splitlines()[0][:200]}. "
            "Start all of them with torchrun."
        ) from error
    return store
