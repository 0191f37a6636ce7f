# SPDX-License-Identifier: Apache-2.0
"""Two streams: half of the calls pass each layer as the source has it, half the quantized one.

The judges are the whole models, run by transformers: of the source, and dequantized. What layers
are given and give in each stream must be the same there, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourfold
from families import quiet
from fourfold.calibration.activations import ActivationStore
from fourfold.calibration.kv_cache import recording_cache
from fourfold.calibration.parking import Parking
from fourfold.calibration.streaming import LayerWeights, Pass, StreamedModel
from fourfold.models.internals import runnable
from fourfold.sources.decoded import open_decoded
from fourfold.sources.safetensors import open_source

from .running import NO_CACHE, batches_of, tensors_of

FAMILIES = {
    "qwen3_moe": "experts on disk one by one",
    "gpt_oss": "fused experts with biases",
    "qwen3_next": "linear attention in some layers",
    "deepseek_v3": "MLA, and a dense layer first",
    "llama4": "experts that only run eagerly",
    "gemma4": "layers that share keys and values",
}

RECIPE = """
weights: {format: nvfp4, scale: max}
activations: none
quantize: [experts]
"""


@pytest.fixture(scope="module")
def quantized(written: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("replay")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)

    def quantize(name: str) -> Path:
        out = folder / name
        if not out.exists():
            assert fourfold.quantize(written(name)[0], out, recipe).clean
        return out

    return quantize


class Trace:
    """What layers are given and give, by batch and layer."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...]) -> None:
        self.batch = 0
        self.inputs: dict[tuple[int, str], list[Tensor]] = {}
        self.outputs: dict[tuple[int, str], Tensor] = {}
        for path in layers:
            layer = model.get_submodule(path)
            layer.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
            layer.register_forward_hook(partial(self._leave, path))

    def _enter(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        given = [tensor.clone() for tensor in tensors_of([args, kwargs])]
        self.inputs.setdefault((self.batch, path), given)  # of the first time that it runs

    def _leave(self, path: str, _: nn.Module, __: Any, output: Any) -> None:
        self.outputs[self.batch, path] = next(tensors_of(output)).clone()


def call(trace: Trace, number: int, batch: dict[str, Tensor], has_cache: bool, model: Any) -> None:
    trace.batch = number
    part, kwargs = runnable(model), {"use_cache": False}
    if has_cache:
        cache = recording_cache(part, lambda *_: None)
        kwargs = {"past_key_values": cache, "use_cache": True}
    part(**batch, **kwargs)


WAYS = [
    pytest.param(ActivationStore, False, id="memory, bare"),
    pytest.param(partial(Parking, limit=0), True, id="file, with a cache"),
    pytest.param(ActivationStore, True, id="memory, with a cache", marks=pytest.mark.slow),
    pytest.param(partial(Parking, limit=0), False, id="file, bare", marks=pytest.mark.slow),
]


@dataclass
class Second:
    """Half of the calls: they pass each layer with the weights of another checkpoint."""

    streamed: StreamedModel
    decoded: Any
    calls: range

    def weights(self, layer: int) -> LayerWeights:
        self.streamed.load(layer, self.decoded)
        return self.streamed.weights(layer)


@pytest.mark.parametrize(("make_store", "has_cache"), WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_stream_is_a_whole_model(
    name: str,
    make_store: Callable[[], ActivationStore],
    has_cache: bool,
    written: Any,
    quantized: Any,
) -> None:
    if has_cache and name in NO_CACHE:
        pytest.skip(NO_CACHE[name])
    source, decoded = open_source(written(name)[0]), open_decoded(quantized(name))
    streamed = StreamedModel(source)
    layers, batches = streamed.tree.layers, batches_of(runnable(streamed.model))
    count = len(batches)
    copies = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
    wanted = []
    for checkpoint in (source, decoded):
        with quiet():
            reference = StreamedModel(checkpoint).load_all()
        trace = Trace(reference, layers)
        with torch.no_grad():
            for number, batch in enumerate(batches):
                call(trace, number, batch, has_cache, reference)
        wanted.append(trace)
    found = Trace(streamed.model, layers)
    passes: list[tuple[int, Pass]] = []
    steps = streamed.run(
        [partial(call, found, n, batch, has_cache) for n, batch in enumerate([*batches, *copies])],
        store=make_store(),
        on_resume=lambda number: setattr(found, "batch", number),
        on_layer=lambda layer, why: passes.append((layer, why)),
        second=Second(streamed, decoded, range(count, 2 * count)),
    )
    assert list(steps) == list(range(len(layers)))
    assert passes == [(n, why) for n in range(len(layers)) for why in Pass]
    for first, trace in zip((0, count), wanted, strict=True):
        for (number, path), output in trace.outputs.items():
            key = first + number, path
            assert torch.equal(found.outputs[key], output), key
            tensors = trace.inputs[number, path]
            assert len(found.inputs[key]) == len(tensors)
            assert all(map(torch.equal, found.inputs[key], tensors)), key
    source.close()
    decoded.close()
