"""Where the activations of a waiting call are kept: on the device, in memory, or on the disk.

A call that waits at a layer's door holds its hidden states, masks and rotary embeddings in the
local variables of frames that nobody can reach. Their storages can be reached, through the
layer's arguments: a storage is copied away and shrunk to nothing in place, and before the call
goes on it is made whole again. Whatever views the frames hold of it are then as they were.

Up to `limit` bytes are kept in memory; what is beyond goes to a file without a name, which is
gone when the process is, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import OutputError

SMALL = 1 << 16
"""Bytes of a storage that is not worth moving."""


@dataclass
class _Away:
    """A storage that is not where its tensors think it is."""

    storage: torch.UntypedStorage
    nbytes: int
    in_memory: torch.Tensor | None = None
    """Its bytes, of a storage on another device."""
    in_file: int | None = None
    """Where in the file its bytes begin."""


@dataclass
class Parking:
    """Keeps what waiting calls hold. `limit`: bytes in memory; no limit for None."""

    limit: int | None = None
    folder: Path | None = None
    """Where the file is made; the system's folder for temporary files by default."""

    resident: int = 0
    """Bytes of waiting calls in memory."""
    peak: int = 0
    written: int = 0
    """Bytes written to the file, in all."""
    _own: set[int] = field(default_factory=set)
    _shared: set[int] = field(default_factory=set)
    _parked: dict[int, dict[int, _Away]] = field(default_factory=dict)
    _file: int = -1
    _free: list[tuple[int, int]] = field(default_factory=list)
    _end: int = 0

    def begin(self, kept: Iterable[torch.Tensor]) -> None:
        """`kept`: tensors that stay where they are: the model's own, and the caller's."""
        self._own = {tensor.untyped_storage()._cdata for tensor in kept if not tensor.is_meta}

    def leave(self, call: int, values: Any) -> None:
        """A call waits now, and `values` is what its layer will be given."""
        parked: dict[int, _Away] = {}
        for tensor in tensors_in(values):
            storage = tensor.untyped_storage()
            identity = storage._cdata
            if identity in self._own or identity in parked or self._is_shared(identity):
                continue
            if storage.nbytes() >= SMALL and storage.resizable():
                parked[identity] = _Away(storage, storage.nbytes())
        self._parked[call] = parked
        for away in parked.values():
            self._put_away(away)

    def fetch(self, call: int) -> None:
        """Make everything whole that this call holds: it goes on."""
        for away in self._parked.pop(call, {}).values():
            self._bring_back(away)

    def close(self) -> None:
        """Forget everything, and give the file back. Nobody's tensors stay empty."""
        try:
            for parked in self._parked.values():
                for away in parked.values():
                    if _is_held_elsewhere(away.storage):
                        self._bring_back(away)
        finally:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            self._parked.clear()
            self._shared.clear()
            self._free, self._end, self.resident = [], 0, 0

    def _is_shared(self, identity: int) -> bool:
        """Whether several calls hold this storage; it is made whole, and stays so."""
        if identity in self._shared:
            return True
        for parked in self._parked.values():
            if identity in parked:
                self._bring_back(parked.pop(identity))
                self._shared.add(identity)
                return True
        return False

    def _put_away(self, away: _Away) -> None:
        is_full = self.limit is not None and self.resident + away.nbytes > self.limit
        on_device = away.storage.device.type != "cpu"
        if is_full:
            data = _as_bytes(away.storage)
            away.in_file = self._write(data.cpu() if on_device else data)
        else:
            self.resident += away.nbytes
            self.peak = max(self.peak, self.resident)
            if not on_device:
                return
            away.in_memory = _as_bytes(away.storage).cpu()
        away.storage.resize_(0)

    def _bring_back(self, away: _Away) -> None:
        if away.in_file is None:
            self.resident -= away.nbytes
        if away.in_memory is None and away.in_file is None:
            return
        away.storage.resize_(away.nbytes)
        target = _as_bytes(away.storage)
        if away.in_memory is not None:
            target.copy_(away.in_memory)
            away.in_memory = None
        elif away.in_file is not None:
            self._read(away.in_file, target)
            self._free.append((away.in_file, away.nbytes))
            away.in_file = None

    def _write(self, data: torch.Tensor) -> int:
        position = self._place_for(data.numel())
        view, done = _memory_of(data), 0
        try:
            while done < len(view):
                done += os.pwrite(self._open(), view[done:], position + done)
        except OSError as error:
            raise OutputError(
                f"{self._where()}: no room for the activations of waiting samples: "
                f"{error.strerror}. Free some room, or use fewer or shorter samples."
            ) from error
        self.written += len(view)
        return position

    def _read(self, position: int, target: torch.Tensor) -> None:
        data = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        view, done = _memory_of(data), 0
        while done < len(view):
            count = os.preadv(self._open(), [view[done:]], position + done)
            if count == 0:
                raise OutputError(f"{self._where()}: ended while activations were read from it")
            done += count
        if data is not target:
            target.copy_(data)

    def _place_for(self, nbytes: int) -> int:
        for index, (position, size) in enumerate(self._free):
            if size == nbytes:
                del self._free[index]
                return position
        position, self._end = self._end, self._end + nbytes
        return position

    def _open(self) -> int:
        if self._file < 0:
            self._file, name = tempfile.mkstemp(
                prefix=".fourfold-activations.", suffix=".partial", dir=self.folder
            )
            os.unlink(name)
        return self._file

    def _where(self) -> Path:
        return self.folder or Path(tempfile.gettempdir())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from tensors_in(each)


def _is_held_elsewhere(storage: torch.UntypedStorage) -> bool:
    """Whether anything but this object holds a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata)) > 1


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A uint8 tensor that shares the storage."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload, no-any-return]


def _memory_of(data: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor in memory. `numpy()` would forbid that its storage is resized."""
    array = (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())
    return memoryview(array).cast("B")
