# SPDX-License-Identifier: Apache-2.0
"""Stores the output of the last finished layer on disk, so that a resumed run starts behind it.

    OUT/.fourfold/activations/layer-00007/batch-00003.safetensors

A call of the model cannot be stored, because its Python frames cannot. So a resumed run makes every
call again, but finished layers compute nothing: the last of them returns its stored output, and
those before it return tensors without data (on the meta device). The call then reaches the first
unfinished layer as it did before. This is exact if that layer is called with the same values, and
if nothing else that the call holds was computed by a finished layer. Both are checked:

- While a run saves: every tensor that the model's frames hold at a layer, or that the layer is
  called with, must be part of the previous layer's output, or must have been there, unchanged,
  since the call's first layer. Otherwise (if states pass several layers) nothing is saved.
- When a run resumes: the digest of everything that the first unfinished layer is called with,
  including objects such as caches, must equal the saved one. Otherwise the text passes all layers
  again.

If a tensor without data were used in spite of this, PyTorch would raise an error; the result could
not be wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fourfold.calibration.activations import weakly
from fourfold.calibration.parking import tensors_in

OUTPUT, INPUTS = "output", "inputs"
"""Keys of a file's metadata: the output's structure, and the digest of the next layer's inputs."""

PLAIN = (type(None), bool, int, float, str)
"""Types of values that JSON stores exactly."""


class UnstorableError(Exception):
    """A layer's output is not made of contiguous tensors and plain values."""


class SavedActivations:
    """Stores the output of the last finished layer of every call. A run has one such object."""

    def __init__(self, folder: Path, batches: Sequence[int], device: str = "cpu") -> None:
        """Describe the store; nothing is read or written yet."""
        self.folder, self.device = folder, device
        self.batches = batches
        """For each call of this rank, the number of its batch among those of all ranks."""
        self.first = 0
        """The first layer that computes; 0 if all layers compute."""
        self.matches = True
        """False if a call has reached `first` with other inputs than when it was saved."""
        self.is_saving = True
        self.start_of: dict[int, dict[int, tuple[StorageWeakRef, int]]] = {}
        """For each call, the storages that it held at its first layer, with the versions of their
        tensors, by the storages' identities."""

    def find(self, finished: Collection[int | None]) -> None:
        """Set `first` to the last layer behind finished ones whose inputs are stored in full."""
        layer = 0
        while layer in finished:
            layer += 1
            if all(self._file(layer, batch).exists() for batch in self.batches):
                self.first = layer

    def start_over(self) -> None:
        """Let all layers compute, because the stored outputs do not fit."""
        self.first = 0
        self.start_of.clear()

    @contextmanager
    def skipping(self, layers: Sequence[nn.Module], call: Callable[[], int]) -> Iterator[None]:
        """Let layers before `first` return stored outputs, or tensors without data, meanwhile.

        `call` returns the number of the call that runs now.
        """

        def stored(index: int, *_: Any, **__: Any) -> Any:
            return self._read(call(), has_data=index == self.first - 1)

        for index in range(self.first):
            layers[index].forward = partial(stored, index)
        try:
            yield
        finally:
            for index in range(self.first):
                del layers[index].forward

    def start(self, call: int, layer: int, inputs: Any, held: Any, output: Any) -> None:
        """Record the tensors that a call holds at the first of its layers that computes.

        Args:
            call, layer: The numbers of both.
            inputs: The arguments that the layer is called with.
            held: Everything that the model's frames hold, and the arguments of the call itself.
            output: The output of the layer before, if that layer computed nothing.
        """
        if self.first:
            self.matches &= layer == self.first and self._digest(call) == digest_of(inputs)
        stored = _storages(output)
        self.start_of[call] = {
            identity: (weakly(tensor.untyped_storage()), tensor._version)
            for identity, tensor in _storages((inputs, held)).items()
            if identity not in stored
        }

    def save(
        self, call: int, layer: int, inputs: Any, held: Any, last: tuple[int, Any] | None
    ) -> None:
        """Save the output of the layer that a call has just passed, at the layer after it.

        Args:
            call, layer: The numbers of the call, and of the layer that it has reached.
            inputs: The arguments that this layer is called with.
            held: `inputs`, and everything that the model's frames hold except its parameters.
            last: Index and output of the layer that the call has just passed.
        """
        if not self.is_saving:
            return
        try:
            if last is None or last[0] != layer - 1 or not self._is_known(call, held, last):
                raise UnstorableError
            self._save(call, layer, last[1], inputs)
        except (UnstorableError, SafetensorError, OSError):
            self.stop_saving()

    def _is_known(self, call: int, values: Any, last: Any) -> bool:
        """True if the call has had each tensor since its first layer, or from the last output."""
        start, output = self.start_of[call], _storages(last)
        return all(
            identity in output or (identity in start and start[identity][1] == tensor._version)
            for identity, tensor in _storages(values).items()
        )

    def finished(self, layer: int) -> None:
        """Remove what is saved for layers up to `layer`, whose statistics are stored."""
        for folder in self.folder.glob("layer-*"):
            number = int(folder.name.removeprefix("layer-"))
            if number <= layer:
                for batch in self.batches:  # every rank removes its own files
                    self._file(number, batch).unlink(missing_ok=True)

    def stop_saving(self) -> None:
        """Save nothing more, and remove what was saved."""
        self.is_saving = False
        self.finished(sys.maxsize)

    def _file(self, layer: int, batch: int) -> Path:
        return self.folder / f"layer-{layer:05d}" / f"batch-{batch:05d}.safetensors"

    def _save(self, call: int, layer: int, output: Any, inputs: Any) -> None:
        tensors: list[torch.Tensor] = []
        metadata = {OUTPUT: json.dumps(_encode(output, tensors)), INPUTS: digest_of(inputs)}
        file = self._file(layer, self.batches[call])
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".partial")
        copies = {str(number): tensor.cpu().clone() for number, tensor in enumerate(tensors)}
        save_file(copies, temporary, metadata)
        temporary.replace(file)

    def _digest(self, call: int) -> str:
        with safe_open(self._file(self.first, self.batches[call]), framework="pt") as file:
            return str(file.metadata()[INPUTS])

    def _read(self, call: int, *, has_data: bool) -> Any:
        """Return a stored output on the model's device, or tensors of its shapes without data."""
        with safe_open(self._file(self.first, self.batches[call]), framework="pt") as file:

            def tensor(name: str) -> torch.Tensor:
                stored: torch.Tensor = file.get_tensor(name)
                return stored.to(self.device).clone() if has_data else stored.to("meta")

            return _decode(json.loads(file.metadata()[OUTPUT]), tensor)


def _storages(values: Any) -> dict[int, torch.Tensor]:
    return {tensor.untyped_storage()._cdata: tensor for tensor in tensors_in(values)}


def _encode(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Describe a value in JSON, and append its tensors to `tensors`."""
    if type(value) is torch.Tensor and value.is_contiguous():
        tensors.append(value)
        return {"tensor": str(len(tensors) - 1)}
    if type(value) in PLAIN:
        return {"plain": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    raise UnstorableError


def _decode(value: Mapping[str, Any], tensor: Any) -> Any:
    """Return the value that `_encode` described; `tensor` returns a tensor by its name."""
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensor(content)
        case "plain":
            return content
        case "tuple":
            return tuple(_decode(item, tensor) for item in content)
        case _:
            return [_decode(item, tensor) for item in content]


def digest_of(value: Any) -> str:
    """Return a digest of a value, including all tensors in it and the attributes of objects.

    Of functions, classes and modules, only the names count; of tensors on the meta device, only
    shapes. An object without attributes counts by its `repr`. If that contains an address, the
    digest differs in every process.
    """
    digest = xxhash.xxh3_128()
    for piece in _pieces(value, set()):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield f"{type(value)} {value.dtype} {tuple(value.shape)} {value.stride()}".encode()
        if value.is_meta:
            yield b"without data"
        else:
            yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    elif isinstance(value, tuple | list):
        yield f"{type(value)} {len(value)}".encode()
        for item in value:
            yield from _pieces(item, seen)
    elif isinstance(value, dict):
        yield f"{type(value)} {len(value)}".encode()
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item, seen)
    elif isinstance(value, nn.Module | FunctionType | BuiltinFunctionType | MethodType | type):
        yield f"{type(value)} {getattr(value, '__qualname__', '')}".encode()
    elif hasattr(value, "__dict__"):
        yield str(type(value)).encode()
        if id(value) not in seen:
            seen.add(id(value))
            yield from _pieces(vars(value), seen)
    else:
        yield f"{type(value)} {value!r}".encode()
