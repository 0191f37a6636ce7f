"""Files that stay open between reads, but never too many: a checkpoint may have a thousand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOST_OPEN = 128
"""Far below the usual limit of 1,024 for a process, above what threads read from at a time."""


@dataclass(slots=True)
class _Open:
    descriptor: int
    readers: int = 0


class OpenFiles:
    """Descriptors by file, opened when they are first asked for. Safe for many threads."""

    def __init__(self, open_file: Callable[[Path], int]) -> None:
        """`open_file`: opens a file for reading and returns its descriptor."""
        self._open_file = open_file
        self._open: dict[Path, _Open] = {}  # the one that was asked for last stands last
        self._lock = threading.Lock()

    @contextmanager
    def descriptor(self, file: Path) -> Iterator[int]:
        """The descriptor of `file`, for as long as the context lasts."""
        with self._lock:
            held = self._open.pop(file, None) or _Open(self._open_file(file))
            self._open[file] = held
            held.readers += 1
            self._close_idle()
        try:
            yield held.descriptor
        finally:
            with self._lock:
                held.readers -= 1

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            for held in self._open.values():
                os.close(held.descriptor)
            self._open.clear()

    def _close_idle(self) -> None:
        beyond = len(self._open) - MOST_OPEN
        if beyond > 0:
            idle = [file for file, held in self._open.items() if not held.readers]
            for file in idle[:beyond]:
                os.close(self._open.pop(file).descriptor)


def read_full(descriptor: int, view: memoryview, position: int) -> int:
    """Fill `view` with the bytes of a file from `position`.

    Returns:
        The number of bytes read; fewer than `len(view)` only if the file ends before.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            break
        done += count
    return done
