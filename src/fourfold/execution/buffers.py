# SPDX-License-Identifier: Apache-2.0
"""Memory for one job at a time, used again for the next: pages are faulted in only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

ALIGNMENT = 256
"""Bytes. GPUs read aligned memory fastest; CPUs need less."""


def on_host(nbytes: int) -> torch.Tensor:
    """Allocate ordinary memory; NumPy asks the system for large pages, PyTorch does not."""
    return torch.from_numpy(np.empty(nbytes, dtype=np.uint8))


class Arena:
    """A buffer that is handed out piece by piece, and taken back all at once."""

    def __init__(self, allocate: Callable[[int], torch.Tensor] = on_host) -> None:
        """Create an arena without a buffer; `allocate` returns a uint8 tensor of so many bytes."""
        self._allocate = allocate
        self._buffer: torch.Tensor | None = None
        self._used = self._wanted = 0

    def reset(self) -> None:
        """Take everything back, and grow the buffer to what the last job wanted."""
        if self._wanted > self.nbytes:
            self.resize(self._wanted)
        self._used = self._wanted = 0

    def resize(self, nbytes: int) -> None:
        """Take everything back, and have a buffer of exactly `nbytes` bytes."""
        if self.nbytes != nbytes:
            self.free()  # before the new one is allocated: there may be no room for both
            self._buffer = self._allocate(nbytes)
        self._used = self._wanted = 0

    def free(self) -> None:
        """Give the buffer back."""
        self._buffer = None
        self._used = self._wanted = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` bytes, not cleared; newly allocated if the buffer has no room."""
        begin = self._used
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._wanted = max(self._wanted, self._used)
        if self._buffer is None or begin + nbytes > len(self._buffer):
            return self._allocate(nbytes)
        return self._buffer[begin : begin + nbytes]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Take back afterwards what is taken within this context."""
        used = self._used
        try:
            yield
        finally:
            self._used = used

    @property
    def nbytes(self) -> int:
        """The size of the buffer."""
        return 0 if self._buffer is None else len(self._buffer)
