"""Run a model that is larger than the memory: one decoder layer is in memory at a time.

Every call is an ordinary `model(**batch)`, whatever the architecture does between its layers. It
runs in a thread of its own that is switched by hand (a greenlet): a forward-pre-hook at the door
of each decoder layer parks it. The coordinator loads a layer, lets the calls through one after
the other, hands the layer to its caller, and gives the memory back:

    shell ─▶ every call to door 0 ─▶ load 0 ─▶ every call to door 1 ─▶ yield 0, free 0 ─▶ load 1 …

Nothing is replayed and nothing of a model is known here, so what a call computes is bit for bit
what it would with the whole model in memory. A call may pass the layers several times
(`generate`). Only one call runs at any moment, and all in the caller's own thread: an exception
ends the run where it is raised, and there is no thread to join. Threads of the system would each
keep a pool of workers in OpenMP and an arena in malloc; these cost a few kB each.

All calls share one thread's state of PyTorch: a call must not wait inside `torch.autocast` or a
mode that it has entered outside of the model.

The shell (embeddings, norms, head) is loaded first; what a call no longer needs can be freed.
Parameters of vision and audio towers stay on the meta device: a call that needs them fails.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import FrameType
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from safetensors import SafetensorError
from torch import nn

from fourfold.calibration.parking import Parking, held_by_model, tensors_in
from fourfold.calibration.saved_activations import SavedActivations
from fourfold.distributed.machine import cache_few_kernels, give_back_memory
from fourfold.errors import ModelError
from fourfold.models.internals import Conversion, LazyTensor, build_model, load_tensors
from fourfold.models.module_tree import ModuleTree, describe
from fourfold.models.roles import TOWER
from fourfold.sources.cached import CachedTensors
from fourfold.storage.source import Source

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What a model's code raises where its configuration makes no sense to it."""

Call = Callable[[Any], Any]
"""Something that calls the model, as often as it likes."""


class StreamedModel:
    """A checkpoint's model on the meta device, whose parts are loaded when they are needed."""

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        towers: bool = False,
        head: bool = True,
    ) -> None:
        """`dtype`: of the parameters; by default that of most of the checkpoint's weights.

        towers: whether vision and audio towers are loaded, too; text needs none.
        head: whether calls need the output embeddings. If not, they are not loaded, or, where
            they are tied to the input embeddings, freed with those.
        """
        cache_few_kernels()
        self.held = CachedTensors(source)
        self.device, self.dtype = torch.device(device), dtype or main_dtype(source)
        self._has_head = head
        self.model = build_model(
            source.folder, dtype=self.dtype, trust_remote_code=source.trust_remote_code
        )
        _move_buffers(self.model, self.device)
        self.tree: ModuleTree = describe(self.model)
        self.layers = tuple(self.model.get_submodule(path) for path in self.tree.layers)
        skipped = () if head or self.tree.tied else self.tree.heads
        self._keys = _keys_of_units(self.tree, self.tree.conversion, source, towers, skipped)

    def unit_bytes(self, layer: int | None) -> int:
        """Bytes of a layer's tensors in the source; of the shell's for None."""
        return sum(self.held.tensors[key].nbytes for key in self._keys[layer])

    def load(self, layer: int | None) -> None:
        """Load a decoder layer, or the shell for None."""
        keys = self._keys[layer]
        lazy = {key: LazyTensor(partial(self.held.read, key)) for key in keys}
        load_tensors(self.tree.conversion, lazy, device=self.device, dtype=self.dtype)
        if layer is None:
            self.model.tie_weights()

    def free(self, layer: int | None) -> None:
        """Give back the memory of a layer, or of the shell; its buffers stay."""
        modules = [self.model] if layer is None else [self.layers[layer]]
        for module in modules:
            free_parameters(module)
        self.held.release()
        give_back_memory()

    def load_all(self) -> Any:
        """The model with everything loaded, for what fits into memory."""
        for layer in (None, *range(len(self.layers))):
            self.load(layer)
            self.held.release()
        return self.model

    def run(
        self,
        calls: Sequence[Call],
        *,
        parking: Parking | None = None,
        on_resume: Callable[[int], None] | None = None,
        on_layer: Callable[[int], None] | None = None,
        keep_shell: bool = True,
        inputs: Iterable[torch.Tensor] = (),
        saved: SavedActivations | None = None,
        on_skipped: Callable[[], object] = lambda: None,
    ) -> Generator[int]:
        """Make all `calls`; yields each layer's index when all have passed it, before it is freed.

        parking: where the activations of waiting calls are kept; in memory by default.
        on_resume: called with a call's index whenever it goes on.
        on_layer: called with a layer's index before the calls pass it.
        keep_shell: whether embeddings stay for as long as the run, or only until the first layer.
        inputs: tensors that calls are given and that somebody else may use meanwhile.
        saved: where the outputs of finished layers are stored, and taken from by a run that
            resumes; the first index that is yielded is then `saved.first`.
        on_skipped: called after the calls passed the finished layers without computing them, or
            tried to.
        """
        with ExitStack() as stack:
            running = _Running(self.model, calls, parking or Parking(), on_resume, saved)
            stack.callback(self._free_all)
            stack.callback(running.end)
            for index, layer in enumerate(self.layers):
                hook = layer.register_forward_pre_hook(
                    partial(running.park, index), with_kwargs=True, prepend=True
                )
                stack.callback(hook.remove)
                if saved is not None:
                    after = layer.register_forward_hook(partial(running.note_output, index))
                    stack.callback(after.remove)
            self.load(None)
            if saved is not None and saved.first:
                self._skip_finished(running, saved, inputs)
                on_skipped()
            if saved is None or not saved.first:
                running.begin(inputs)
            self.held.release()
            if not keep_shell:
                self._free_embeddings()
            while running.waiting:
                for index in range(len(self.layers)):
                    if running.at(index):
                        self.load(index)
                        if on_layer is not None:
                            on_layer(index)
                        running.step(index)
                        yield index
                        self.free(index)

    def _skip_finished(
        self, running: _Running, saved: SavedActivations, inputs: Iterable[torch.Tensor]
    ) -> None:
        """Start every call behind the finished layers, if that is exact; otherwise start over."""
        running.is_skipping = True
        with (
            saved.skipping(self.layers, running.present),
            suppress(ModelError, SafetensorError, OSError),
        ):
            running.begin(inputs)
        running.is_skipping = False
        if not saved.matches or running.at(saved.first) != list(running.numbers.values()):
            running.end()
            saved.start_over()

    def _free_embeddings(self) -> None:
        """Also the head that is tied to one: the memory goes when nobody holds it any more."""
        heads = () if self._has_head else self.tree.heads
        for path in (*self.tree.embeddings, *heads):
            if not any(path.startswith(f"{layer}.") for layer in self.tree.layers):
                free_parameters(self.model.get_submodule(path))

    def _free_all(self) -> None:
        free_parameters(self.model)
        self.held.release()


class _Running:
    """The calls of one run: each waits at a door, or has ended."""

    def __init__(
        self,
        model: Any,
        calls: Sequence[Call],
        parking: Parking,
        on_resume: Callable[[int], None] | None,
        saved: SavedActivations | None,
    ) -> None:
        self.model, self.calls, self.parking, self.on_resume = model, calls, parking, on_resume
        self.saved = saved
        self.is_skipping = False
        """True while the calls pass finished layers, which compute nothing."""
        self.coordinator = getcurrent()
        self.threads: list[greenlet] = []
        self.numbers: dict[greenlet, int] = {}
        self.waiting: dict[int, int] = {}
        """Call → the layer whose door it waits at."""
        self._outputs: dict[int, tuple[int, Any]] = {}
        """Call → index and output of the layer that it passed last."""

    def begin(self, inputs: Iterable[torch.Tensor]) -> None:
        """Start every call, up to its first door."""
        self.threads = [greenlet(partial(call, self.model)) for call in self.calls]
        self.numbers = {thread: number for number, thread in enumerate(self.threads)}
        self.waiting.clear()
        self.parking.begin((*self.model.parameters(), *self.model.buffers(), *inputs))
        for number in range(len(self.threads)):
            self._switch(number)

    def at(self, layer: int) -> list[int]:
        """The calls that wait at a layer's door."""
        return [number for number, door in self.waiting.items() if door == layer]

    def step(self, layer: int) -> None:
        """Let every call through that waits at this door, one at a time."""
        for number in self.at(layer):
            del self.waiting[number]
            self.parking.fetch(number)
            self._switch(number)

    def _switch(self, number: int) -> None:
        if self.on_resume is not None:
            self.on_resume(number)
        self.coordinator = getcurrent()
        self.threads[number].parent = self.coordinator
        try:
            with torch.no_grad():  # here, not in the call: it is of the thread that calls share
                self.threads[number].switch()
            if self.threads[number].dead:
                self._outputs.pop(number, None)
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:
            cause = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{type(self.model).__name__}: fails while it reads a text: "
                f"{type(error).__name__}: {cause}. Does config.json belong to this checkpoint?"
            ) from error

    def park(self, layer: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        """The hook at a layer's door."""
        number = self.numbers.get(getcurrent())
        if number is None:
            raise ModelError(
                "the model was called from outside while its layers are streamed. Wait for the end."
            )
        if self.is_skipping and self.saved is not None and layer < self.saved.first:
            return
        self.waiting[number] = layer
        if self.saved is not None:
            self._save(number, layer, (args, kwargs), sys._getframe(1))
        self.parking.leave(number, (args, kwargs, held_by_model(sys._getframe(1))))
        del args, kwargs
        self.coordinator.switch()

    def present(self) -> int:
        """The number of the call that runs now."""
        return self.numbers[getcurrent()]

    def note_output(self, layer: int, _: nn.Module, __: Any, output: Any) -> None:
        """The hook behind a layer."""
        number = self.numbers.get(getcurrent())
        if number is not None:
            self._outputs[number] = layer, output

    def _save(self, number: int, layer: int, given: Any, frame: FrameType) -> None:
        """Save the output of the layer before, or note what the call holds at its first one."""
        last = self._outputs.pop(number, None)
        if self.saved is not None and self.saved.has_started(number):
            held = [
                x for x in tensors_in((given, held_by_model(frame))) if not self.parking.is_own(x)
            ]
            self.saved.save(number, layer, given, held, last)
        elif self.saved is not None:
            self.saved.start(number, layer, given, held_by_model(frame, inputs=True), last)

    def end(self) -> None:
        """End every call that still waits, wherever it is."""
        with ExitStack() as stack:  # whatever a call does at its end, the others are ended, too
            stack.callback(self.parking.close)
            stack.callback(self._outputs.clear)
            for thread in self.threads:
                stack.callback(_end, thread)


def _end(thread: greenlet) -> None:
    if thread and not thread.dead:
        thread.parent = getcurrent()
        thread.throw()


def free_parameters(module: nn.Module) -> None:
    """Put the parameters of a module back on the meta device, and with them their memory."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                owner._parameters[name] = nn.Parameter(empty, requires_grad=False)


def main_dtype(source: Source) -> torch.dtype:
    """The dtype that most of a checkpoint's elements have, among those that are computed with."""
    sizes: dict[str, int] = defaultdict(int)
    for info in source.tensors.values():
        if info.dtype in TORCH_DTYPES:
            sizes[info.dtype] += info.numel
    if not sizes:
        raise ModelError(f"{source.folder}: no tensor of {', '.join(TORCH_DTYPES)}: nothing to run")
    return TORCH_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _keys_of_units(
    tree: ModuleTree, conversion: Conversion, source: Source, towers: bool, skipped: Iterable[str]
) -> Mapping[int | None, Sequence[str]]:
    """Raw keys by the decoder layer that they are loaded with; None for the shell."""
    units: dict[int | None, list[str]] = defaultdict(list)
    for key in source.tensors:
        target = conversion.place(key).target
        if target is None or target.rpartition(".")[0] in skipped:
            continue
        if towers or not TOWER.search(target):
            units[_layer_of(target, tree.layers)].append(key)
    return units


def _layer_of(target: str, layers: Iterable[str]) -> int | None:
    for index, layer in enumerate(layers):
        if target.startswith(f"{layer}."):
            return index
    return None
