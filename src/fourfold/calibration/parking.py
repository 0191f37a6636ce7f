# SPDX-License-Identifier: Apache-2.0
"""An activation store for more activations than fit: it moves them to memory or to a file.

A paused call holds its activations in the local variables of its frames. A frame's variables
cannot be replaced, but the storages of their tensors can be emptied: a storage is copied away and
resized to nothing in place, and before the call continues it is resized and filled again. All views
of it are then as they were.

A frame may hold more than the layer's arguments: `forward` keeps its `inputs_embeds` to the end,
and masks for other layers. So the store moves everything that it finds in the variables of the
model's frames (`held_by_model`), and everything that the call had at its last pause and that is
still alive. All of it is restored each time, used or not. What only objects hold (a cache of keys
and values) stays where it is.

Up to `limit` bytes stay in memory. The rest goes to an unlinked file, which the system removes
when the process ends, however it ends.

This relies on internals of CPython (variables of frames) and PyTorch (weak references to storages,
use counts); `tests/calibration/test_parking.py` fails first if one of them changes.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fourfold.calibration.activations import ActivationStore, weakly
from fourfold.errors import OutputError
from fourfold.storage.open_files import read_full, write_full

SMALL = 1 << 16
"""Storages of fewer bytes are not worth moving, unless the limit is small, too."""

CALL = nn.Module._wrapped_call_impl.__code__
"""The code of the frame in which PyTorch calls a module."""


@dataclass
class _Away:
    """A storage whose bytes are elsewhere."""

    storage: torch.UntypedStorage
    nbytes: int
    place: torch.Tensor | int | None = None
    """Its bytes, or their position in the file; None if they are where they were."""


@dataclass
class Parking(ActivationStore):
    """Moves the activations of paused calls to memory, or beyond a limit to a file."""

    limit: int | None = None
    """Bytes that may stay in memory; None for no limit."""
    folder: Path | None = None
    """The folder of the file; by default the system's folder for temporary files."""
    smallest: int | None = None
    """Storages of fewer bytes stay where they are; by default `SMALL`, or less where the limit
    itself is small."""

    resident: int = 0
    """Bytes of paused calls in memory."""
    peak: int = 0
    """The largest value of `resident`."""
    written: int = 0
    """Bytes written to the file so far."""
    _own: dict[int, StorageWeakRef] = field(default_factory=dict)
    _shared: dict[int, StorageWeakRef] = field(default_factory=dict)
    _parked: dict[int, dict[int, _Away]] = field(default_factory=dict)
    _seen: dict[int, list[StorageWeakRef]] = field(default_factory=dict)
    """By call, the storages that were moved when it paused last."""
    _file: int = -1
    _free: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """By size, the positions in the file that can be used again."""
    _end: int = 0

    def __post_init__(self) -> None:
        if self.smallest is None:
            self.smallest = SMALL if self.limit is None else min(SMALL, max(16, self.limit >> 10))

    def park(self, call: int, inputs: Any, frame: FrameType | None = None) -> None:
        assert self.smallest is not None
        parked: dict[int, _Away] = {}
        values = (inputs, held_by_model(frame))
        in_values = (tensor.untyped_storage() for tensor in tensors_in(values))
        for storage in chain(in_values, self._still_held(call)):
            address = storage._cdata
            if address in self._own or address in parked or self._is_shared(address):
                continue
            if storage.nbytes() >= self.smallest and storage.resizable():
                parked[address] = _Away(storage, storage.nbytes())
        self._parked[call] = parked
        self._seen[call] = [weakly(away.storage) for away in parked.values()]
        for away in parked.values():
            self._put_away(away)

    def fetch(self, call: int) -> None:
        for away in self._parked.pop(call, {}).values():
            self._bring_back(away)

    def close(self) -> None:
        try:
            for parked in self._parked.values():
                for away in parked.values():
                    if _is_held_elsewhere(away.storage):
                        self._bring_back(away)
        finally:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            for known in (self._parked, self._own, self._shared, self._seen, self._free):
                known.clear()
            self._end = self.resident = 0

    def _still_held(self, call: int) -> Iterator[torch.UntypedStorage]:
        """The storages that were moved when this call paused last, and that are still alive."""
        for reference in self._seen.get(call, ()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                yield storage

    def _is_shared(self, address: int) -> bool:
        """True if several calls hold a storage. It is restored, and stays."""
        if address in self._shared:
            return True
        for parked in self._parked.values():
            if address in parked:
                away = parked.pop(address)
                self._bring_back(away)
                self._shared[address] = weakly(away.storage)
                return True
        return False

    def _put_away(self, away: _Away) -> None:
        if self.limit is not None and self.resident + away.nbytes > self.limit:
            away.place = self._write(_as_bytes(away.storage).cpu())
        else:
            self.resident += away.nbytes
            self.peak = max(self.peak, self.resident)
            if away.storage.device.type == "cpu":
                return
            away.place = _as_bytes(away.storage).cpu()
        away.storage.resize_(0)

    def _bring_back(self, away: _Away) -> None:
        if not isinstance(away.place, int):
            self.resident -= away.nbytes
        if away.place is None:
            return
        away.storage.resize_(away.nbytes)
        if isinstance(away.place, int):
            self._read(away.place, _as_bytes(away.storage))
            self._free[away.nbytes].append(away.place)
        else:
            _as_bytes(away.storage).copy_(away.place)
        away.place = None

    def _write(self, data: torch.Tensor) -> int:
        position = self._place_for(data.numel())
        view = _memory_of(data)
        try:
            write_full(self._open(), view, position)
        except OSError as error:
            raise OutputError(
                f"{self._where()}: no room for the activations of waiting samples: "
                f"{error.strerror}. Free some space, or use fewer or shorter samples."
            ) from error
        self.written += len(view)
        return position

    def _read(self, position: int, target: torch.Tensor) -> None:
        data = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        view = _memory_of(data)
        if read_full(self._open(), view, position) < len(view):
            raise OutputError(
                f"{self._where()}: the file with activations ended early. "
                "Does the disk have errors?"
            )
        if data is not target:
            target.copy_(data)

    def _place_for(self, nbytes: int) -> int:
        if self._free[nbytes]:
            return self._free[nbytes].pop()
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
    """Return the tensors in the variables of the model's frames, from `frame` outwards.

    The arguments of the outermost call are left out unless `inputs`: its caller may use them for
    another call.
    """
    held: list[Any] = []
    beside: list[Any] = []
    arguments: Any = ()
    while frame is not None:
        variables = _variables(frame)
        if frame.f_code is CALL:
            held, beside, arguments = [*held, *beside], [], list(variables.values())
        beside.append(variables)
        frame = frame.f_back
    if inputs:
        return list(tensors_in((held, arguments)))
    of_caller = {tensor.untyped_storage()._cdata for tensor in tensors_in(arguments)}
    return [
        tensor for tensor in tensors_in(held) if tensor.untyped_storage()._cdata not in of_caller
    ]


def _variables(frame: FrameType) -> dict[str, Any]:
    """A function's own variables.

    Before Python 3.13 a frame keeps the mapping that `f_locals` returns, and with it the values.
    The mapping is emptied, unless the function itself holds it, too.
    """
    mapping, code = frame.f_locals, frame.f_code
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return {}
    variables = {name: mapping[name] for name in mapping if name not in code.co_freevars}
    # Three references: the frame's, the local variable's and getrefcount's own.
    if isinstance(mapping, dict) and sys.getrefcount(mapping) <= 3:
        mapping.clear()
    return variables


def tensors_in(value: Any, inside: frozenset[int] = frozenset()) -> Iterator[torch.Tensor]:
    """Yield every tensor inside nested tuples, lists, sets and mappings."""
    if isinstance(value, torch.Tensor):
        if not value.is_meta and value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping | list | tuple | set) and id(value) not in inside:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item, inside | {id(value)})


def _is_held_elsewhere(storage: torch.UntypedStorage) -> bool:
    """True if anything but this object holds a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata)) > 1


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A uint8 tensor that shares the storage."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload, no-any-return]


def _memory_of(data: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor. A `numpy()` view would forbid that its storage is resized."""
    array = (ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())
    return memoryview(array).cast("B")
