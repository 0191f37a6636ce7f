# SPDX-License-Identifier: Apache-2.0
"""Stores for the activations of paused calls: the interface, which is the store in memory.

A call that pauses before a decoder layer keeps its hidden states, masks and rotary embeddings
alive. `ActivationStore` leaves them where they are. `parking.Parking` moves them off the device
and, beyond a limit, to a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class ActivationStore:
    """Keeps what paused calls hold. Calls are numbered; one of them runs at a time."""

    def __init__(self) -> None:
        self._own: dict[int, StorageWeakRef] = {}
        """By the storage's address. As long as a weak reference exists, no other storage gets the
        same address."""

    def begin(self, own: Iterable[torch.Tensor]) -> None:
        """Start a run. `own`: the model's tensors, which stay where they are."""
        storages = (tensor.untyped_storage() for tensor in own if not tensor.is_meta)
        self._own = {storage._cdata: weakly(storage) for storage in storages}

    def is_own(self, tensor: torch.Tensor) -> bool:
        """True for a tensor of the model's own."""
        return tensor.untyped_storage()._cdata in self._own

    def park(self, call: int, inputs: Any, frame: FrameType | None = None) -> None:
        """Store what a call holds, which pauses now.

        Args:
            call: The number of the call.
            inputs: The arguments of the layer before which it pauses.
            frame: The innermost frame of the call; None if it has not run since it paused last.
        """

    def fetch(self, call: int) -> None:
        """Restore everything that a call holds: it is about to run."""

    def close(self) -> None:
        """End the run. Tensors that are still referenced are restored."""


def weakly(storage: torch.UntypedStorage) -> StorageWeakRef:
    """Return a weak reference to a storage."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]
