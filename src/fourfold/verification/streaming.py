# SPDX-License-Identifier: Apache-2.0
"""Worker threads with buffers of their own, so that memory depends on threads and not the model.

The kernels and `pread` release the GIL. Results come back in the order of the work, so the report
does not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from fourfold.distributed.machine import threads_available
from fourfold.events import BytesVerified, OnEvent, ignore
from fourfold.verification.checkpoint import Checkpoint


class HasBytes(Protocol):
    """A piece of work that reads `nbytes` bytes."""

    @property
    def nbytes(self) -> int: ...


Work = TypeVar("Work", bound=HasBytes)
Result = TypeVar("Result")

CHUNK_BYTES = 1 << 23
"""A worker reads at most this much at once, if the tensor can be cut."""


class Buffers(threading.local):
    """Reusable buffers of one thread, by purpose."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray[Any, Any]] = {}

    def take(self, purpose: str, nbytes: int) -> np.ndarray[Any, Any]:
        """Return `nbytes` of uint8, valid until the thread's next call for the same purpose."""
        held = self._held.get(purpose)
        if held is None or len(held) < nbytes:
            held = self._held[purpose] = np.empty(nbytes, dtype=np.uint8)
        return held[:nbytes]

    def read(
        self, purpose: str, checkpoint: Checkpoint, name: str, start: int, nbytes: int
    ) -> np.ndarray[Any, Any]:
        """Read `nbytes` of a tensor of the checkpoint into a buffer, from byte `start` on."""
        buffer = self.take(purpose, nbytes)
        checkpoint.read(name, start, buffer)
        return buffer


class Workers:
    """A pool of threads that reports progress in bytes."""

    def __init__(self, threads: int | None, on_event: OnEvent = ignore) -> None:
        self.threads = threads or threads_available()
        self.buffers = Buffers()
        self.done = self.total = 0
        self._on_event = on_event

    def begin(self) -> None:
        """Say that the work begins, once `total` is known."""
        self._tell()

    def _tell(self) -> None:
        self._on_event(BytesVerified(self.done, max(self.done, self.total)))

    def run(
        self, function: Callable[[Work], Result], work: Sequence[Work]
    ) -> Iterator[tuple[Work, Result]]:
        """Yield each piece of work with `function` of it, called in a worker thread, in order.

        The `nbytes` of a piece are the bytes that it reads, for the progress.
        """
        pool = ThreadPoolExecutor(self.threads)
        try:
            for piece, result in zip(work, pool.map(function, work), strict=True):
                yield piece, result
                self.done += piece.nbytes
                self._tell()
        finally:
            pool.shutdown(cancel_futures=True)
