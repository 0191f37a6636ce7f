"""Where the activations of a waiting call are kept: on the device, in memory, or on the disk.

A call that waits at a layer's door holds its hidden states, masks and rotary embeddings in the
local variables of its frames. A frame's variables cannot be replaced, but the storages they lie in
can be emptied: a storage is copied away and shrunk to nothing in place, and before the call goes
on it is made whole again. Whatever views the frames hold of it are then as they were.

A frame may hold more than the layer is given: `forward` keeps its `inputs_embeds` to the end, and
masks for other layers. So everything goes away that is found in the variables of the model's
frames (`held_by_model`), or that the call was seen with at the door before and somebody holds. All
of it comes back each time, used or not: nobody can tell. What only objects hold (a cache of keys
and values) stays.

Up to `limit` bytes are kept in memory; what is beyond goes to a file without a name, which is
gone when the process is, however it ends.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fourfold.errors import OutputError
from fourfold.storage.open_files import read_full

SMALL = 1 << 16
"""Bytes of a storage that is not worth moving."""

CALL = nn.Module._wrapped_call_impl.__code__
"""The frame in which a module is called."""


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
    _own: dict[int, StorageWeakRef] = field(default_factory=dict)
    """By identity, here and below. While there is a weak reference, no other gets the identity."""
    _shared: dict[int, StorageWeakRef] = field(default_factory=dict)
    _parked: dict[int, dict[int, _Away]] = field(default_factory=dict)
    _seen: dict[int, list[StorageWeakRef]] = field(default_factory=dict)
    """Call → what was put away when it waited last."""
    _file: int = -1
    _free: list[tuple[int, int]] = field(default_factory=list)
    _end: int = 0

    def begin(self, kept: Iterable[torch.Tensor]) -> None:
        """`kept`: tensors that stay where they are: the model's own, and the caller's."""
        storages = (tensor.untyped_storage() for tensor in kept if not tensor.is_meta)
        self._own = {storage._cdata: _weakly(storage) for storage in storages}

    def is_own(self, tensor: torch.Tensor) -> bool:
        """True for a tensor of the model's own, or of the caller's."""
        return tensor.untyped_storage()._cdata in self._own

    def leave(self, call: int, values: Any) -> None:
        """A call waits now, and `values` is what its layer will be given, and what it holds."""
        parked: dict[int, _Away] = {}
        given = (tensor.untyped_storage() for tensor in tensors_in(values))
        for storage in chain(given, self._still_held(call)):
            identity = storage._cdata
            if identity in self._own or identity in parked or self._is_shared(identity):
                continue
            if storage.nbytes() >= SMALL and storage.resizable():
                parked[identity] = _Away(storage, storage.nbytes())
        self._parked[call] = parked
        self._seen[call] = [_weakly(away.storage) for away in parked.values()]
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
            for known in (self._own, self._shared, self._seen):
                known.clear()
            self._free, self._end, self.resident = [], 0, 0

    def _still_held(self, call: int) -> Iterator[torch.UntypedStorage]:
        """What this call was seen with at its last door, and somebody holds."""
        for reference in self._seen.get(call, ()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                yield storage

    def _is_shared(self, identity: int) -> bool:
        """Whether several calls hold this storage; it is made whole, and stays so."""
        if identity in self._shared:
            return True
        for parked in self._parked.values():
            if identity in parked:
                away = parked.pop(identity)
                self._bring_back(away)
                self._shared[identity] = _weakly(away.storage)
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
        view = _memory_of(data)
        if read_full(self._open(), view, position) < len(view):
            raise OutputError(f"{self._where()}: ended while activations were read from it")
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


def held_by_model(frame: FrameType | None, *, inputs: bool = False) -> list[torch.Tensor]:
    """What the variables of the model's frames hold, from `frame` out to its outermost call.

    Not what that was called with: it is the caller's, who may use it for another call.
    """
    held: list[Any] = []
    beside: list[Any] = []
    given: Any = ()
    while frame is not None:
        variables = _variables(frame)
        if frame.f_code is CALL:
            held, beside, given = [*held, *beside], [], list(variables.values())
        beside.append(variables)
        frame = frame.f_back
    if inputs:
        return list(tensors_in((held, given)))
    theirs = {tensor.untyped_storage()._cdata for tensor in tensors_in(given)}
    return [each for each in tensors_in(held) if each.untyped_storage()._cdata not in theirs]


def _variables(frame: FrameType) -> dict[str, Any]:
    """A function's own variables. Before Python 3.13, a frame keeps the mapping it is asked for,
    and with it whatever the variables were: it is emptied, unless the function has it, too."""
    mapping, code = frame.f_locals, frame.f_code
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return {}
    found = {name: mapping[name] for name in mapping if name not in code.co_freevars}
    if isinstance(mapping, dict) and sys.getrefcount(mapping) <= 3:  # frame, here, the count's
        mapping.clear()
    return found


def tensors_in(value: Any, inside: frozenset[int] = frozenset()) -> Iterator[torch.Tensor]:
    """Every tensor inside nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta and value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping | list | tuple | set) and id(value) not in inside:
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each, inside | {id(value)})


def _weakly(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


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
