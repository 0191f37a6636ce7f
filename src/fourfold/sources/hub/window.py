# SPDX-License-Identifier: Apache-2.0
"""Which shards lie on this machine at a time: those that are read now, and those that come next.

    expected   shard 1 · shard 40 · shard 1 · shard 2 · shard 2 · shard 3 …      (the plan's order)
               └─ done ────────┘   └─ in use ──────┘   └─ fetched ahead

A shard is fetched when it is next in order and there is room, or at once if somebody waits for it.
It is dropped when nothing will read it any more. If somebody waits and there is no room, the shard
that is needed last makes room, and is fetched again when its time comes. So a few shards are enough
for any order; an order that follows the files fetches each of them once, or nearly.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fourfold.errors import SourceError

FETCHERS = 4
"""Shards that are fetched at a time, at most."""

STREAM = 2
"""Shards, of those that lie here, that must be needed soon: one to read, and the next."""

NEVER = 1 << 62
"""The position of what nothing is expected to read."""


class Window:
    """Fetches shards in the order in which they are needed. Safe for many threads."""

    def __init__(self, fetch: Callable[[str], Path], drop: Callable[[str, Path], None]) -> None:
        """Nothing is fetched yet.

        Args:
            fetch: Returns a shard's path once it is there. Called in threads of this object.
            drop: Deletes a shard that nobody reads.
        """
        self._fetch, self._drop = fetch, drop
        self.most: int | None = None
        """The most shards that may lie here at a time, besides `kept`; None for all."""
        self.kept: set[str] = set()
        """Shards that are never dropped."""
        self._paths: dict[str, Path] = {}
        self._fetching: set[str] = set()
        self._errors: dict[str, BaseException] = {}
        self._users: Counter[str] = Counter()
        self._uses: dict[str, list[int]] = {}
        """By shard, a heap of the positions at which it will be read."""
        self._past: set[int] = set()
        """Positions that are still in a heap though they are done."""
        self._positions: dict[str, deque[tuple[int, str]]] = {}
        """By tensor, the positions at which it will be read, with its shard."""
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        """What those who read a shard wait for."""
        self._room = threading.Condition(self._lock)
        """What those who fetch wait for: room, or a shard to fetch."""
        self._is_closed = self._is_expecting = False

    def expect(self, reads: Iterable[tuple[str, str]]) -> None:
        """Say which tensors will be read, in order, each with its shard, and fetch ahead."""
        uses: dict[str, list[int]] = defaultdict(list)
        positions: dict[str, deque[tuple[int, str]]] = defaultdict(deque)
        for position, (key, shard) in enumerate(reads):
            uses[shard].append(position)
            positions[key].append((position, shard))
        with self._lock:
            self._uses, self._positions = dict(uses), dict(positions)
            self._is_expecting = True
            self._past.clear()
            for shard in self._paths.keys() - uses.keys() - self.kept:
                if self.most is not None and not self._users[shard]:
                    self._remove(shard)
            self._start()
            self._room.notify()

    def done_with(self, keys: Iterable[str]) -> None:
        """Say of each tensor that it was read for one of the times it was expected."""
        with self._lock:
            for key in keys:
                if pending := self._positions.get(key):
                    position, shard = pending.popleft()
                    self._past.add(position)
                    self._drop_if_done(shard)

    @contextmanager
    def reading(self, shard: str) -> Iterator[Path]:
        """Yield the path of a shard once it is there; it stays within the context.

        Raises:
            SourceError: It cannot be fetched, or the run has ended.
        """
        with self._lock:
            if not self._users[shard]:
                self._errors.pop(shard, None)  # of a transfer that nobody waited for
            self._users[shard] += 1
            try:
                path = self._wait_for(shard)
            except BaseException:
                self._release(shard)
                raise
        try:
            yield path
        finally:
            with self._lock:
                self._release(shard)

    @property
    def is_expecting(self) -> bool:
        """True once `expect` was called."""
        return self._is_expecting

    def path_of(self, shard: str) -> Path | None:
        """Return the path of a shard if it is here now."""
        return self._paths.get(shard)

    def clear(self) -> None:
        """Drop every shard that is not kept."""
        with self._lock:
            for shard in self._paths.keys() - self.kept:
                self._remove(shard)

    def close(self) -> None:
        """Let everybody who waits fail, and fetch nothing more."""
        with self._lock:
            self._is_closed = True
            self._arrived.notify_all()
            self._room.notify_all()

    def join(self, seconds: float) -> None:
        """Wait until no thread of this object runs, but not longer than `seconds`.

        A thread that hangs in a request ends with the process, or when the request does.
        """
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _wait_for(self, shard: str) -> Path:
        self._start()
        if shard not in self._paths:
            self._room.notify()
        while (path := self._paths.get(shard)) is None:
            if (error := self._errors.get(shard)) is not None:
                raise error
            if self._is_closed:
                raise SourceError(f"{shard}: is no longer fetched, as the run has ended")
            self._arrived.wait()
        return path

    def _release(self, shard: str) -> None:
        self._users[shard] -= 1
        if not self._users[shard]:
            del self._users[shard]
            self._drop_if_done(shard)
            self._room.notify()

    def _start(self) -> None:
        """Start the threads that fetch, if they do not run yet."""
        while len(self._threads) < FETCHERS and not self._is_closed:
            thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._is_closed and (shard := self._choose()) is None:
                    self._room.wait()
                if self._is_closed or shard is None:
                    return
                self._fetching.add(shard)
                self._room.notify()  # there may be room for another one
            path = error = None
            try:
                path = self._fetch(shard)
            except BaseException as failure:  # it is raised where the shard is read
                error = failure
            with self._lock:
                self._fetching.discard(shard)
                if path is not None:
                    self._paths[shard] = path
                    self._drop_if_done(shard)
                elif error is not None:
                    self._errors[shard] = error
                self._arrived.notify_all()
                self._room.notify()

    # What follows is called with the lock held.

    def _choose(self) -> str | None:
        """Return the shard to fetch now, for which there is room; None if there is none."""
        known = self._paths.keys() | self._fetching | self._errors.keys()
        waited_for = [shard for shard in self._users if shard not in known]
        ahead = [shard for shard in self._uses if shard not in known and self._next(shard) < NEVER]
        for shards, is_urgent in ((waited_for, True), (ahead, False)):
            if shards:
                shard = min(shards, key=self._next)
                return shard if self._has_room(shard, is_urgent=is_urgent) else None
        return None

    def _has_room(self, shard: str, *, is_urgent: bool) -> bool:
        """True if a shard may be fetched. Another one may be dropped for it."""
        present = [other for other in self._paths if other not in self.kept]
        taken = [*present, *(self._fetching - self.kept)]
        if self.most is None or shard in self.kept or len(taken) < self.most:
            return True
        idle = [other for other in present if not self._users[other]]
        if not idle:
            return False
        last, wanted = max(idle, key=self._next), self._next(shard)
        soon = sum(self._next(other) < wanted for other in taken)
        if not is_urgent and (self._next(last) < wanted or soon >= STREAM):
            return False
        self._remove(last)
        return True

    def _next(self, shard: str) -> int:
        """The position at which a shard is read next."""
        heap = self._uses.get(shard, [])
        while heap and heap[0] in self._past:
            self._past.discard(heapq.heappop(heap))
        return heap[0] if heap else NEVER

    def _drop_if_done(self, shard: str) -> None:
        """Drop a shard if nothing will read it that was expected to.

        One that is read unexpectedly stays until another one needs its room.
        """
        if shard not in self._uses or self._next(shard) < NEVER or self._users[shard]:
            return
        if shard in self._paths and shard not in self.kept and self.most is not None:
            del self._uses[shard]
            self._remove(shard)
            self._room.notify()

    def _remove(self, shard: str) -> None:
        self._drop(shard, self._paths.pop(shard))
