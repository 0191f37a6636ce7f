# SPDX-License-Identifier: Apache-2.0
"""Run a model that is larger than the memory: one decoder layer is loaded at a time.

Every call is an ordinary `model(**batch)`, whatever the architecture does between its layers. It
runs in a greenlet of its own, a thread that is switched by hand: a forward-pre-hook pauses it just
before each decoder layer. The coordinator loads a layer, lets the calls pass it one after the
other, hands the layer to its caller, and frees it:

    load the non-layer tensors ─▶ every call pauses before layer 0 ─▶ load layer 0 ─▶ every call
        passes layer 0 and pauses before layer 1 ─▶ yield 0 ─▶ free layer 0 ─▶ load layer 1 …

No operation is traced or computed twice, so a call computes bit for bit what it would with the
whole model in memory. It may pass the layers several times (`generate`). Only one call runs at any
moment, in the caller's own thread: an exception ends the run where it is raised. System threads
would each keep a pool of workers in OpenMP and an arena in malloc; a greenlet takes a few kB.

**A second stream.** With `second`, half of the calls pass each layer with other weights. First the
layer's module runs on copies of the first calls' arguments, for what observes it. The layer is
handed to the caller, who may run it again on copies of any call's arguments, with any weights. Then
the first calls pass the layer, and the others with theirs.

All calls share one thread's state of PyTorch: a call must not pause inside `torch.autocast` or a
mode that it has entered outside of the model.

The non-layer tensors (embeddings, norms, head) are loaded first; what a call no longer needs can be
freed. Parameters of vision and audio towers stay on the meta device: a call that needs them fails.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from enum import Enum
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from safetensors import SafetensorError
from torch import nn

from fourfold.calibration.activations import ActivationStore
from fourfold.calibration.parking import held_by_model, tensors_in
from fourfold.calibration.saved_activations import SavedActivations
from fourfold.calibration.stream import EnoughError
from fourfold.distributed.machine import cache_few_kernels, give_back_memory
from fourfold.errors import ModelError
from fourfold.models.internals import LazyTensor, build_model, load_tensors
from fourfold.models.module_tree import ModuleTree, describe
from fourfold.models.roles import TOWER
from fourfold.models.ties import tie
from fourfold.sources.cached import CachedTensors
from fourfold.storage.safetensors_header import COMPUTE_DTYPES, TORCH_DTYPES
from fourfold.storage.source import Source

FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""Errors that a model's code raises if its configuration makes no sense to it."""

Call = Callable[[Any], Any]
"""Something that calls the model, as often as it likes."""

LayerWeights = Sequence[tuple[nn.Module, str, nn.Parameter]]
"""The parameters of a layer: each with the module that has it, and its name there."""


class SecondStream(Protocol):
    """Half of the calls of a run, which pass each layer with other weights."""

    calls: range
    """The numbers of these calls."""

    def weights(self, layer: int) -> LayerWeights:
        """Return the layer's parameters for these calls, after the layer was yielded."""


class StreamedModel:
    """A checkpoint's model on the meta device; its layers are loaded when they are needed."""

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        towers: bool = False,
        head: bool = True,
        late_head: bool = False,
    ) -> None:
        """Build the model without its weights.

        Args:
            source: The checkpoint.
            device: The device of the loaded parameters.
            dtype: The dtype of the parameters; by default that of most of the weights.
            towers: Whether to load vision and audio towers, which text does not need.
            head: Whether calls need the output embeddings. If not, they are not loaded; if they
                are tied to the input embeddings, they are freed with those.
            late_head: Whether to load the output embeddings with the last layer instead of the
                first tensors, for calls that pass the layers once. Tied ones are there anyway.
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
        heads = () if self.tree.tied else self.tree.heads
        skipped, late = () if head else heads, heads if late_head else ()
        self._keys = _keys_of_units(self.tree, source, towers, skipped, late)

    def keys_of(self, layer: int | None) -> Sequence[str]:
        """Return the raw tensors of a layer; None: those of the non-layer tensors."""
        return self._keys[layer]

    def unit_bytes(self, layer: int | None) -> int:
        """Return the bytes of a layer's tensors in the source; None: of the non-layer tensors."""
        return sum(self.held.tensors[key].nbytes for key in self._keys[layer])

    def load(
        self, layer: int | None, source: Source | None = None, keys: Collection[str] | None = None
    ) -> None:
        """Load a decoder layer, or for None the non-layer tensors, from `source` or the model's.

        `keys`: the raw tensors to load, all of those that a parameter is made of; None for all.
        """
        keys = [key for key in self._keys[layer] if keys is None or key in keys]
        if source is None:
            for key in keys:  # in the order of the files; the conversion has another
                self.held.read(key)
        lazy = {key: LazyTensor(partial((source or self.held).read, key)) for key in keys}
        load_tensors(self.tree.conversion, lazy, device=self.device, dtype=self.dtype)
        if layer is None:
            placed = {self.tree.conversion.place(key).target for key in keys}
            tie(self.model, self.tree.ties.keys() & placed)

    def free(self, layer: int | None) -> None:
        """Free the parameters of a layer, or for None those of the whole model; buffers stay."""
        free_parameters(self.model if layer is None else self.layers[layer])
        self.held.release()
        give_back_memory()

    def load_all(self) -> Any:
        """Return the model with everything loaded, if it fits into memory."""
        for layer in (None, *range(len(self.layers))):
            self.load(layer)
            self.held.release()
        return self.model

    def run(
        self,
        calls: Sequence[Call],
        *,
        store: ActivationStore | None = None,
        on_resume: Callable[[int], object] = lambda _: None,
        on_layer: Callable[[int, Pass], object] = lambda *_: None,
        keep_embeddings: bool = True,
        second: SecondStream | None = None,
        saved: SavedActivations | None = None,
        on_skipped: Callable[[], object] = lambda: None,
    ) -> Generator[int]:
        """Make all calls; yield each layer's index when it has run and before it is freed.

        Args:
            calls: What to run; each is called with the model. Two calls must not share a tensor,
                which may be moved away while one of them waits.
            store: Where the activations of paused calls are kept; by default in memory.
            on_resume: Called with a call's index whenever the call, or its layer, runs.
            on_layer: Called with a layer's index before it runs, and why it does.
            keep_embeddings: Whether embeddings stay loaded after the first layer.
            second: Calls that pass each layer with other weights than the first ones do. The module
                runs on copies of the first ones' arguments, the layer is yielded, and then all
                calls pass it.
            saved: Where the outputs of finished layers are stored, and read from by a run that
                resumes; the first index that is yielded is then `saved.first`.
            on_skipped: Called after the calls passed the finished layers without computing them,
                or tried to.
        """
        with ExitStack() as stack:
            store = store or ActivationStore()
            running = _Running(self, calls, store, on_resume, saved, second is not None)
            self._running = running
            stack.callback(self.free, None)
            stack.callback(running.end)
            running.attach(stack)
            self.load(None)
            if saved is not None and saved.first:
                self._skip_finished(running, saved)
                on_skipped()
            if saved is None or not saved.first:
                running.begin()
            self.held.release()
            if not keep_embeddings:
                self._free_embeddings()
            while running.waiting:
                for layer in range(len(self.layers)):
                    if running.before(layer):
                        if second is None:
                            yield from self._run_layer(running, layer, on_layer)
                        else:
                            yield from self._run_both(running, layer, on_layer, second)

    def _run_layer(
        self, running: _Running, layer: int, on_layer: Callable[[int, Pass], object]
    ) -> Generator[int]:
        self.load(layer)
        on_layer(layer, Pass.FIRST)
        running.pass_layer(layer, running.before(layer))
        yield layer
        self.free(layer)

    def _run_both(
        self,
        running: _Running,
        layer: int,
        on_layer: Callable[[int, Pass], object],
        second: SecondStream,
    ) -> Generator[int]:
        self.load(layer)
        first = [number for number in running.before(layer) if number not in second.calls]
        on_layer(layer, Pass.FIRST)
        running.run_module(layer, first)
        yield layer
        on_layer(layer, Pass.REPLAY)
        running.pass_layer(layer, first)
        on_layer(layer, Pass.SECOND)
        self.use(second.weights(layer))
        running.pass_layer(layer, [x for x in running.before(layer) if x in second.calls])
        self.free(layer)

    def weights(self, layer: int) -> LayerWeights:
        """Return the parameters that a layer has now."""
        return [
            (owner, name, parameter)
            for owner in self.layers[layer].modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]

    def use(self, weights: LayerWeights) -> None:
        """Give a layer parameters that `weights` returned before."""
        for owner, name, parameter in weights:
            owner._parameters[name] = parameter

    def run_again(self, layer: int, call: int) -> None:
        """Run a layer's module on copies of the arguments of a call that waits before it."""
        self._running.run_module(layer, [call])

    def _skip_finished(self, running: _Running, saved: SavedActivations) -> None:
        """Start every call behind the finished layers, if that is exact; otherwise start over."""
        running.is_skipping = True
        is_skipping = saved.skipping(self.layers, running.current)
        with is_skipping, suppress(ModelError, SafetensorError, OSError):
            running.begin()
        running.is_skipping = False
        if not saved.matches or running.before(saved.first) != list(running.numbers.values()):
            running.end()
            saved.start_over()

    def _free_embeddings(self) -> None:
        """Free the embeddings, and an unused head that is tied to one."""
        heads = () if self._has_head else self.tree.heads
        for path in (*self.tree.embeddings, *heads):
            if not any(path.startswith(f"{layer}.") for layer in self.tree.layers):
                free_parameters(self.model.get_submodule(path))


class Pass(Enum):
    """Why a layer runs."""

    FIRST = "first"
    REPLAY = "replay"
    """Once more, because it has run by itself before."""
    SECOND = "second"
    """For the second stream, with its own weights."""


class _Running:
    """The calls of one run: each is paused before a layer, or has ended."""

    def __init__(
        self,
        streamed: StreamedModel,
        calls: Sequence[Call],
        store: ActivationStore,
        on_resume: Callable[[int], object],
        saved: SavedActivations | None,
        keeps_inputs: bool,
    ) -> None:
        self.model, self.layers, self.calls = streamed.model, streamed.layers, calls
        self.store, self.on_resume, self.saved = store, on_resume, saved
        self.is_skipping = False
        """True while the calls pass finished layers, which compute nothing."""
        self.coordinator = getcurrent()
        self.threads: list[greenlet] = []
        self.numbers: dict[greenlet, int] = {}
        self.waiting: dict[int, int] = {}
        """By call, the layer before which it is paused."""
        self.keeps_inputs = keeps_inputs
        self.inputs: dict[int, tuple[Any, Any]] = {}
        """By call, the arguments of the layer before which it is paused."""
        self.runs_module = False
        """True while a layer's module runs by itself, and not as part of a call."""
        self.outputs: dict[int, tuple[int, Any]] = {}
        """By call, index and output of the layer that it passed last."""

    def attach(self, stack: ExitStack) -> None:
        """Set the hooks of all layers, until the stack is closed."""
        for index, layer in enumerate(self.layers):
            before = partial(self.pause, index)
            stack.enter_context(
                layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            )
            if self.saved is not None:
                after = partial(self.note_output, index)
                stack.enter_context(layer.register_forward_hook(after))

    def begin(self) -> None:
        """Start every call; each runs to its first pause."""
        self.threads = [greenlet(partial(call, self.model)) for call in self.calls]
        self.numbers = {thread: number for number, thread in enumerate(self.threads)}
        self.waiting.clear()
        self.store.begin((*self.model.parameters(), *self.model.buffers()))
        for number in range(len(self.threads)):
            self._switch(number)

    def before(self, layer: int) -> list[int]:
        """The calls that are paused before a layer."""
        return [number for number, paused in self.waiting.items() if paused == layer]

    def pass_layer(self, layer: int, calls: Iterable[int]) -> None:
        """Let calls that are paused before a layer continue to their next pause, one by one."""
        for number in calls:
            del self.waiting[number]
            self.store.fetch(number)
            self.inputs.pop(number, None)
            self._switch(number)

    def run_module(self, layer: int, calls: Iterable[int]) -> None:
        """Run a layer's module on copies of the arguments of calls that pause before it. It may end
        early, by `EnoughError`."""
        for number in calls:
            self.store.fetch(number)
            self.on_resume(number)
            args, kwargs = copied(self.inputs[number])
            self.runs_module = True
            try:
                with self._explaining(), torch.no_grad(), suppress(EnoughError):
                    self.layers[layer](*args, **kwargs)
            finally:
                self.runs_module = False
            del args, kwargs
            self.store.park(number, self.inputs[number])

    def _switch(self, number: int) -> None:
        self.on_resume(number)
        self.coordinator = getcurrent()
        self.threads[number].parent = self.coordinator
        # no_grad here, not in the call: it belongs to the thread, which all calls share.
        with self._explaining(), torch.no_grad():
            self.threads[number].switch()
        if self.threads[number].dead:
            self.outputs.pop(number, None)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn an error of the model's own code into a `ModelError` that names the model."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:
            cause = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{type(self.model).__name__}: fails while it reads a text: "
                f"{type(error).__name__}: {cause}. Does config.json belong to this checkpoint?"
            ) from error

    def pause(self, layer: int, _: nn.Module, args: Any, kwargs: Any) -> None:
        """The hook before a layer: pause the call that is about to run it."""
        if self.runs_module:
            return
        number = self.numbers.get(getcurrent())
        if number is None:
            raise ModelError(
                "the model was called from outside while its layers are streamed. "
                "Wait until the run has ended."
            )
        if self.is_skipping and self.saved is not None and layer < self.saved.first:
            return
        self.waiting[number] = layer
        if self.saved is not None:
            self._save(self.saved, number, layer, (args, kwargs), sys._getframe(1))
        if self.keeps_inputs:
            self.inputs[number] = args, kwargs
        self.store.park(number, (args, kwargs), sys._getframe(1))
        del args, kwargs
        self.coordinator.switch()

    def current(self) -> int:
        """The number of the call that runs now."""
        return self.numbers[getcurrent()]

    def note_output(self, layer: int, _: nn.Module, __: Any, output: Any) -> None:
        """The hook behind a layer."""
        number = self.numbers.get(getcurrent())
        if number is not None:
            self.outputs[number] = layer, output

    def _save(
        self, saved: SavedActivations, number: int, layer: int, inputs: Any, frame: FrameType
    ) -> None:
        """Save the output of the layer before, or note what the call holds at its first one."""
        last = self.outputs.pop(number, None)
        if number in saved.start_of:
            tensors = tensors_in((inputs, held_by_model(frame)))
            held = [tensor for tensor in tensors if not self.store.is_own(tensor)]
            saved.save(number, layer, inputs, held, last)
        else:
            saved.start(number, layer, inputs, held_by_model(frame, inputs=True), last)

    def end(self) -> None:
        """End every call that is still paused."""
        self.inputs.clear()
        self.outputs.clear()
        with ExitStack() as stack:  # all are ended, whatever one of them raises at its end
            stack.callback(self.store.close)
            for thread in self.threads:
                stack.callback(_end, thread)


def _end(thread: greenlet) -> None:
    if thread and not thread.dead:
        thread.parent = getcurrent()
        thread.throw()


def copied(value: Any) -> Any:
    """Copy a layer's arguments, so that running the layer does not change them.

    Tensors and caches of keys and values are copied, also inside tuples, lists and dictionaries;
    everything else stays the same object.
    """
    from transformers.cache_utils import Cache

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Cache):
        return deepcopy(value)
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


def free_parameters(module: nn.Module) -> None:
    """Put the parameters of a module back on the meta device, which frees their memory."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                owner._parameters[name] = nn.Parameter(empty, requires_grad=False)


def main_dtype(source: Source) -> torch.dtype:
    """Return the dtype of most of a checkpoint's elements, of those that PyTorch computes with."""
    sizes: dict[str, int] = defaultdict(int)
    for info in source.tensors.values():
        if info.dtype in COMPUTE_DTYPES:
            sizes[info.dtype] += info.numel
    if not sizes:
        raise ModelError(
            f"{source.folder}: no tensor of {', '.join(COMPUTE_DTYPES)}: nothing to run"
        )
    return TORCH_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _keys_of_units(
    tree: ModuleTree,
    source: Source,
    towers: bool,
    skipped: Collection[str],
    late: Collection[str],
) -> Mapping[int | None, Sequence[str]]:
    """Raw keys by the decoder layer that they are loaded with; None for the non-layer tensors.

    Modules that are `skipped` are left out; those that are `late` come with the last layer.
    """
    units: dict[int | None, list[str]] = defaultdict(list)
    for key in source.tensors:
        target = tree.conversion.place(key).target
        module = "" if target is None else target.rpartition(".")[0]
        if target is None or module in skipped:
            continue
        if module in late and tree.layers:
            units[len(tree.layers) - 1].append(key)
        elif towers or not TOWER.search(target):
            units[_layer_of(target, tree.layers)].append(key)
    return units


def _layer_of(target: str, layers: Iterable[str]) -> int | None:
    indices = (index for index, layer in enumerate(layers) if target.startswith(f"{layer}."))
    return next(indices, None)
