# SPDX-License-Identifier: Apache-2.0
"""Proves layer streaming: the same bits as the whole model, one layer of it in memory.

`test_every_family.py` compares the bits of every family. Here whatever can go wrong does: a run
that ends early leaves no hook, patch, thread, file or parameter behind, and can be made again.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from families import FAMILIES, quiet, read_back
from fourfold.calibration.observers import Observers
from fourfold.calibration.parking import Parking
from fourfold.calibration.streaming import Pass, StreamedModel
from fourfold.errors import ModelError
from fourfold.models.internals import runnable
from fourfold.sources.cached import CachedTensors
from fourfold.sources.safetensors import open_source
from fourfold.storage.safetensors_header import TORCH_DTYPES

from .running import (
    Trace,
    batches_of,
    differences,
    in_force,
    run_streamed,
    run_whole,
)


def open_streamed(written: Any, name: str) -> StreamedModel:
    """A family's model; its checkpoint's file is open already, and stays so."""
    streamed = StreamedModel(open_source(written(name)[0]))
    streamed.load(None)
    streamed.free(None)
    return streamed


def whole(written: Any, name: str) -> Any:
    with quiet():
        model, _ = read_back(FAMILIES[name], written(name)[0])
    return model.eval()


# --- how many calls, and which ----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4", "switch_transformers"])
def test_any_number_of_calls(name: str, count: int, written: Any) -> None:
    model, streamed = whole(written, name), open_streamed(written, name)
    shapes = [(1 + i % 3, 9 + 5 * i % 16, (i % 4) * 2) for i in range(count)]
    batches = batches_of(model, shapes)
    trace, _ = run_whole(model, streamed.tree.layers, batches)
    found = run_streamed(streamed, batches, evicting=count > 1)
    assert differences(found.trace, trace) == []


def test_calls_that_never_reach_a_layer(written: Any) -> None:
    streamed = open_streamed(written, "qwen3_moe")
    done: list[str] = []
    assert list(streamed.run([])) == []
    assert list(streamed.run([lambda _: done.append("at once")])) == []
    assert done == ["at once"]


def test_a_call_may_pass_the_layers_again_and_again(written: Any) -> None:
    model, streamed = whole(written, "qwen3_moe"), open_streamed(written, "qwen3_moe")
    ids = batches_of(model, [(1, 7, 0), (2, 5, 0), (1, 12, 0)])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: dict[int, torch.Tensor] = {}

    def call(number: int, model: Any) -> None:
        found[number] = model.generate(**ids[number], max_new_tokens=3 + number, **options)

    steps = list(streamed.run([partial(call, number) for number in range(3)]))
    assert steps == [0, 1, 2] * 5
    for number, batch in enumerate(ids):
        wanted = model.generate(**batch, max_new_tokens=3 + number, **options)
        assert torch.equal(found[number], wanted)


def test_two_models_in_turn(written: Any) -> None:
    names = ("qwen3_moe", "qwen3_next")
    traces, runs = {}, {}
    for name in names:
        model, streamed = whole(written, name), open_streamed(written, name)
        batches = batches_of(model)
        wanted, _ = run_whole(model, streamed.tree.layers, batches)
        traces[name] = Trace(), wanted

        def call(number: int, model: Any, name: str = name, batches: Any = batches) -> None:
            traces[name][0].finish(number, model(**batches[number], use_cache=False))

        runs[name] = streamed.run([partial(call, number) for number in range(len(batches))])
    going = list(runs.values())
    while going:  # a layer of one, a layer of the other
        going = [run for run in going if next(run, None) is not None]
    for found, wanted in traces.values():
        found.hidden = wanted.hidden
        assert differences(found, wanted) == []


def test_in_another_thread(written: Any) -> None:
    model, streamed = whole(written, "qwen3_moe"), open_streamed(written, "qwen3_moe")
    batches = batches_of(model)
    wanted, _ = run_whole(model, streamed.tree.layers, batches)
    found: list[Trace] = []
    thread = threading.Thread(target=lambda: found.append(run_streamed(streamed, batches).trace))
    thread.start()
    thread.join()
    assert differences(found[0], wanted) == []


def test_a_call_from_outside_is_an_error(written: Any) -> None:
    streamed = open_streamed(written, "qwen3_moe")
    batch = batches_of(streamed.model)[0]
    steps = streamed.run([lambda model: model(**batch)])
    next(steps)
    with pytest.raises(ModelError, match="called from outside"):
        streamed.model(**batch)
    steps.close()


# --- memory -----------------------------------------------------------------------------------


def real_bytes(model: nn.Module) -> int:
    """Bytes of parameters that are in memory; shared ones count once."""
    storages = {
        parameter.untyped_storage()._cdata: parameter.untyped_storage().nbytes()
        for parameter in model.parameters()
        if not parameter.is_meta
    }
    return sum(storages.values())


def storages_in_memory() -> dict[int, torch.UntypedStorage]:
    """What every tensor of the process lies in, by identity."""
    objects = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    found = [each.untyped_storage() for each in objects if not each.is_meta]
    return {storage._cdata: storage for storage in found if storage.nbytes() >= 64}


SLOW_FAMILIES = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("deepseek_v4", "jamba", "kimi_linear", "llama4")
]


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4", *SLOW_FAMILIES])
def test_a_waiting_call_holds_nothing(name: str, written: Any) -> None:
    """At every door, but what calls share; also what only an earlier layer was given."""
    streamed, where, left = open_streamed(written, name), Parking(limit=0, smallest=64), []
    batches, found = batches_of(streamed.model), Trace()
    wanted, _ = run_whole(whole(written, name), streamed.tree.layers, batches)

    def call(number: int, model: Any) -> None:
        found.finish(number, runnable(model)(**batches[number], use_cache=False))

    def look(layer: int, _: Pass) -> None:
        parameters = {each.untyped_storage()._cdata for each in streamed.model.parameters()}
        own = before.keys() | parameters | where._own.keys() | where._shared.keys()
        for identity, storage in storages_in_memory().items():
            if identity not in own and storage.resizable():
                left.append((layer, storage.nbytes()))

    gc.collect()
    before = storages_in_memory()
    calls = [partial(call, number) for number in range(len(batches))]
    doors = list(streamed.run(calls, store=where, on_layer=look))
    assert doors == list(range(len(streamed.layers)))
    assert left == []
    assert where.peak == 0
    assert where.written > 0
    found.hidden = wanted.hidden
    assert differences(found, wanted) == []


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_tied", "deepseek_v4", "gemma4", "jamba"])
@pytest.mark.parametrize("keep", [True, False])
def test_the_shell_and_one_layer_at_most(name: str, keep: bool, written: Any) -> None:
    streamed = open_streamed(written, name)
    sizes: list[int] = []

    def look(*_: Any) -> None:
        sizes.append(real_bytes(streamed.model))

    streamed.load(None)
    shell = real_bytes(streamed.model)
    streamed.free(None)
    layers = []
    for index in range(len(streamed.layers)):
        streamed.load(index)
        layers.append(real_bytes(streamed.model))
        streamed.free(index)
    assert real_bytes(streamed.model) == 0
    assert min(layers) > 0
    for module in streamed.model.modules():
        module.register_forward_pre_hook(look)
    batches = batches_of(streamed.model)
    calls = [partial(_run, batch) for batch in batches]
    for index in streamed.run(calls, keep_embeddings=keep):
        look()
        assert sizes[-1] <= shell + layers[index]
    assert max(sizes) <= shell + max(layers)
    if keep:
        assert max(sizes) == shell + max(layers)
    else:
        is_tied = name.endswith("_tied")  # the head holds what the embedding gave up
        assert (sizes[-1] < shell + layers[index]) is not is_tied
    assert real_bytes(streamed.model) == 0
    assert streamed.held._cache == {}


def _run(batch: dict[str, torch.Tensor], model: Any) -> None:
    runnable(model)(**batch, use_cache=False)


def test_embeddings_go_when_nobody_needs_them(written: Any) -> None:
    streamed = open_streamed(written, "qwen3_moe")
    embedding = streamed.model.get_input_embeddings()
    for keep, is_gone in ((True, False), (False, True)):
        calls = [partial(_run, batch) for batch in batches_of(streamed.model)]
        gone = {embedding.weight.is_meta for _ in streamed.run(calls, keep_embeddings=keep)}
        assert gone == {is_gone}


def test_a_tied_head_goes_with_the_embeddings_when_no_call_needs_it(written: Any) -> None:
    source = open_source(written("qwen3_moe_tied")[0])
    batches = batches_of(StreamedModel(source).model)
    sizes = {}
    for head in (True, False):
        streamed = StreamedModel(source, head=head)
        assert streamed.tree.tied
        calls = [lambda model, batch=batch: _run(batch, model.model) for batch in batches]
        for _ in range(2):  # the second run finds all of it again
            steps = streamed.run(calls, keep_embeddings=False)
            sizes[head] = [real_bytes(streamed.model) for _ in steps]
        assert streamed.load_all().lm_head.weight is streamed.model.model.embed_tokens.weight
        table = streamed.model.lm_head.weight.nbytes
    assert [size + table for size in sizes[False]] == sizes[True]


def test_towers_stay_on_meta(written: Any) -> None:
    streamed = open_streamed(written, "qwen3_vl_moe")
    vision = [value for name, value in streamed.model.named_parameters() if "visual" in name]
    model = streamed.load_all()
    assert vision
    assert {name for name, value in model.named_parameters() if value.is_meta} == {
        name for name, _ in model.named_parameters() if "visual" in name
    }
    both = StreamedModel(open_source(written("qwen3_vl_moe")[0]), towers=True)
    assert not any(value.is_meta for value in both.load_all().parameters())


def test_unit_bytes_are_those_of_the_checkpoint(written: Any) -> None:
    folder, truth = written("qwen3_moe")
    streamed = StreamedModel(open_source(folder))
    sizes = [streamed.unit_bytes(unit) for unit in (None, *range(len(streamed.layers)))]
    assert min(sizes) > 0
    assert sum(sizes) == sum(tensor.nbytes for tensor in truth.raw.values())


def test_load_all_gives_the_weights_of_from_pretrained(written: Any) -> None:
    for name in ("qwen3_moe", "deepseek_v4", "kimi_linear", "gpt_oss"):
        wanted, found = whole(written, name), open_streamed(written, name).load_all()
        assert found.state_dict().keys() == wanted.state_dict().keys()
        for key, value in wanted.state_dict().items():
            other = found.state_dict()[key]
            assert other.dtype is value.dtype, key
            assert torch.equal(other, value), key


# --- tensors that are held ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (6, 4, 2)])
def test_bytes_of_a_held_tensor_are_read_once(dtype: str, shape: Any, tmp_path: Path) -> None:
    bits = torch.randint(0, 2, (*shape, TORCH_DTYPES[dtype].itemsize), dtype=torch.uint8)
    tensors = {"a": torch.ones(3), "held": bits.view(TORCH_DTYPES[dtype]).reshape(shape)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = open_source(tmp_path)
    held, nbytes = CachedTensors(source), source.tensors["held"].nbytes
    held.read("held")
    source.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_read", boom)
        for start, stop in ((0, nbytes), (nbytes // 3, nbytes - nbytes // 4), (nbytes, nbytes)):
            found = np.empty(stop - start, dtype=np.uint8)
            held.read_bytes("held", start, found)
            assert bytes(found) == bytes(bits.reshape(-1).numpy()[start:stop])
        with pytest.raises(BoomError):
            held.read_bytes("a", 0, np.empty(12, dtype=np.uint8))
    held.release()
    again = np.empty(nbytes, dtype=np.uint8)
    if nbytes:
        held.read_bytes("held", 0, again)
    assert bytes(again) == bytes(bits.reshape(-1).numpy())
    held.close()


# --- what goes wrong --------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a run may have left behind: in the model, in transformers, in the process."""
    modules = dict(model.named_modules())
    return {
        "hooks": {
            path: [*module._forward_pre_hooks, *module._forward_hooks]
            for path, module in modules.items()
        },
        "attributes": {path: sorted(module.__dict__) for path, module in modules.items()},
        "experts functions": sorted(ALL_EXPERTS_FUNCTIONS),
        "implementations": {
            path: module.config._experts_implementation
            for path, module in modules.items()
            if hasattr(module, "config")
        },
        "in memory": [name for name, value in model.named_parameters() if not value.is_meta],
        "threads": running_threads(),
        "files": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in open_files()),
        "in force": in_force(),
        "signals": signal.getsignal(signal.SIGINT),
    }


def changes(before: Any, after: Any, what: str = "") -> list[str]:
    """What differs between two states, in words."""
    if isinstance(before, dict):
        return [
            text
            for part in sorted(before.keys() | after.keys())
            for text in changes(before.get(part), after.get(part), f"{what} {part}")
        ]
    if isinstance(before, list) and isinstance(after, list):
        gone, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
        return [f"{what}: without {x}" for x in gone] + [f"{what}: with {x}" for x in new]
    return [] if before == after else [f"{what}: {before}, now {after}"]


def running_threads() -> list[str]:
    """Threads, when those of transformers' loader, for which nobody waits, have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(10)
    return [thread.name for thread in threading.enumerate()]


def open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the one that listed them
            continue
        found.append(fd)
    return found


class BoomError(Exception):
    """What a call may raise and nobody expects."""


def boom(*_: Any) -> None:
    raise BoomError


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)  # for the main thread, whichever raises it


def no_memory(*_: Any) -> None:
    raise MemoryError


class Trouble:
    """Raises something at some point of a run, once."""

    def __init__(self, streamed: StreamedModel, where: str, what: Callable[..., None]) -> None:
        self.streamed, self.where, self.what = streamed, where, what
        self.count = 0

    def _at(self, number: int, *_: Any) -> None:
        self.count += 1
        if self.count == number:
            self.what()

    @contextmanager
    def brewing(self) -> Iterator[None]:
        """Within, a hook waits at the module that `where` names."""
        modules = {
            "second call, experts of layer 1": ("model.layers.1.mlp.experts", 2),
            "third call, before the first layer": ("model.embed_tokens", 3),
            "first call, behind the last layer": ("model.norm", 1),
        }
        if self.where == "while layer 1 is read":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.streamed.held, "read", partial(self._read, "layers.1."))
                yield
            return
        if self.where not in modules:
            yield
            return
        path, number = modules[self.where]
        module = self.streamed.model.get_submodule(path)
        hook = module.register_forward_pre_hook(partial(self._at, number))
        try:
            yield
        finally:
            hook.remove()

    def _read(self, part: str, key: str) -> torch.Tensor:
        if part in key:
            self._at(3)
        return CachedTensors.read(self.streamed.held, key)

    def resume(self, number: int) -> None:
        if self.where == "on_resume":
            self._at(5)

    def enter(self, layer: int, _: Pass) -> None:
        if self.where == "on_layer" and layer == 1:
            self.what()

    def consume_all(self, run: Iterator[int]) -> None:
        for layer in run:
            if self.where == "the consumer" and layer == 1:
                self.what()


PLACES = [
    "second call, experts of layer 1",
    "third call, before the first layer",
    "first call, behind the last layer",
    "on_resume",
    "on_layer",
    "while layer 1 is read",
    "the consumer",
]

KINDS = {
    "error": (boom, BoomError),
    "interrupt": (interrupt, KeyboardInterrupt),
    "memory": (no_memory, MemoryError),
}


def troubles() -> Iterator[Any]:
    """An error at every place; the other kinds where a layer is read or runs, else slow."""
    for where in PLACES:
        for kind, (what, error) in KINDS.items():
            is_quick = kind == "error" or where in (PLACES[0], "while layer 1 is read")
            marks = () if is_quick else pytest.mark.slow
            yield pytest.param(where, what, error, marks=marks, id=f"{kind}, {where}")


@pytest.mark.parametrize(("where", "what", "error"), list(troubles()))
def test_an_error_ends_the_run_and_leaves_nothing(
    where: str, what: Any, error: type[BaseException], written: Any
) -> None:
    streamed = open_streamed(written, "qwen3_moe")
    batches = batches_of(streamed.model)
    trouble = Trouble(streamed, where, what)
    observers = Observers(streamed.model, streamed.tree.experts, streamed.tree.linears)
    before = state_of(streamed.model)
    ended: list[int] = []

    def call(number: int, model: Any) -> None:
        try:
            model(**batches[number], use_cache=False)
        finally:
            ended.append(number)

    run = streamed.run(
        [partial(call, number) for number in range(3)],
        store=Parking(limit=100, smallest=16),
        on_resume=trouble.resume,
        on_layer=trouble.enter,
    )
    with trouble.brewing(), observers.attached(), pytest.raises(error):
        trouble.consume_all(run)
    run.close()
    gc.collect()
    started = 2 if where == "third call, before the first layer" else 3
    assert sorted(set(ended)) == list(range(max(started, len(set(ended)))))
    assert changes(before, state_of(streamed.model)) == []

    wanted, _ = run_whole(whole(written, "qwen3_moe"), streamed.tree.layers, batches)
    assert differences(run_streamed(streamed, batches).trace, wanted) == []


@pytest.mark.parametrize("how", ["close", "forget", "throw"])
def test_a_run_may_be_left_early(how: str, written: Any) -> None:
    streamed = open_streamed(written, "qwen3_next")
    batches = batches_of(streamed.model)
    before = state_of(streamed.model)
    ended: list[int] = []

    def call(number: int, model: Any) -> None:
        try:
            model(**batches[number], use_cache=False)
        finally:
            ended.append(number)

    calls = [partial(call, number) for number in range(3)]
    steps = streamed.run(calls, store=Parking(limit=0))
    assert next(steps) == 0
    assert ended == []
    assert len(open_files()) == len(before["files"]) + 1
    if how == "close":
        steps.close()
    elif how == "throw":
        with pytest.raises(BoomError):
            steps.throw(BoomError)
    else:
        del steps
        gc.collect()
    assert sorted(ended) == [0, 1, 2]
    assert changes(before, state_of(streamed.model)) == []


def test_a_run_that_never_begins_does_nothing(written: Any) -> None:
    streamed = open_streamed(written, "qwen3_moe")
    before = state_of(streamed.model)
    steps = streamed.run([boom])
    assert changes(before, state_of(streamed.model)) == []
    steps.close()
    assert changes(before, state_of(streamed.model)) == []


def test_what_calls_raise_at_their_end_stops_no_other(written: Any) -> None:
    streamed = open_streamed(written, "qwen3_moe")
    batches = batches_of(streamed.model)
    before = state_of(streamed.model)
    ended: list[int] = []

    def call(number: int, model: Any) -> None:
        try:
            model(**batches[number], use_cache=False)
        finally:
            ended.append(number)
            boom()

    steps = streamed.run([partial(call, number) for number in range(3)])
    next(steps)
    with pytest.raises(BoomError):
        steps.close()
    assert sorted(ended) == [0, 1, 2]
    assert changes(before, state_of(streamed.model)) == []


# --- tensors that the caller holds --------------------------------------------------------------


def test_the_callers_tensors_are_whole_after_an_early_end(written: Any) -> None:
    streamed = open_streamed(written, "qwen3_next")  # its layers are given the mask itself
    batches = batches_of(streamed.model)
    copies = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    steps = streamed.run([partial(_run, batch) for batch in batches], store=Parking(limit=0))
    next(steps)
    masks = [batch["attention_mask"].untyped_storage().nbytes() for batch in batches]
    assert 0 in masks, "no mask was moved: this test shows nothing"
    steps.close()
    for batch, copy in zip(batches, copies, strict=True):
        for name, value in batch.items():
            assert value.untyped_storage().nbytes() == copy[name].nbytes
            assert torch.equal(value, copy[name])
