# SPDX-License-Identifier: Apache-2.0
"""Files that stay open between reads, but not all of them: a checkpoint may have a thousand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MOST_OPEN = 128
"""Far below the usual limit of 1,024 per process, and more than threads read at a time."""


@dataclass(slots=True)
class _Open:
    descriptor: int
    readers: int = 0


class OpenFiles:
    """File descriptors, opened when they are first used. Safe for many threads."""

    def __init__(self, open_file: Callable[[Path], int]) -> None:
        """Use `open_file` to open a file for reading; it returns a descriptor."""
        self._open_file = open_file
        self._open: dict[Path, _Open] = {}  # the last used one is last
        self._lock = threading.Lock()

    @contextmanager
    def descriptor(self, file: Path) -> Iterator[int]:
        """Yield the descriptor of `file`; it stays open within the context."""
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

    def forget(self, file: Path) -> None:
        """Close `file`, which nobody reads at this moment, if it is open."""
        with self._lock:
            if (held := self._open.pop(file, None)) is not None:
                os.close(held.descriptor)

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
    """Fill `view` from `position` of a file; return the bytes read, fewer only at its end."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            break
        done += count
    return done


def write_full(descriptor: int, view: memoryview, position: int) -> None:
    """Write all of `view` into a file from `position`."""
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)
