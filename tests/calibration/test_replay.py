# SPDX-License-Identifier: Apache-2.0
"""Propagation of quantized inputs: later layers read what the quantized layers compute.

The judge is the whole dequantized model, run by transformers. What a layer is given while it is
observed, and what it gives after it was replaced, must be the same there, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourfold
from families import quiet
from fourfold.calibration.activations import ActivationStore
from fourfold.calibration.data import Batch, CalibrationData
from fourfold.calibration.kv_cache import recording_cache
from fourfold.calibration.layerwise import Calibration
from fourfold.calibration.parking import Parking
from fourfold.calibration.streaming import Pass, StreamedModel
from fourfold.models.internals import runnable
from fourfold.planning import make_plan
from fourfold.recipes import Recipe
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


@pytest.mark.parametrize(("make_store", "has_cache"), WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_replay_is_the_dequantized_model(
    name: str,
    make_store: Callable[[], ActivationStore],
    has_cache: bool,
    written: Any,
    quantized: Any,
) -> None:
    if has_cache and name in NO_CACHE:
        pytest.skip(NO_CACHE[name])
    source, decoded = open_source(written(name)[0]), open_decoded(quantized(name))
    with quiet():
        reference = StreamedModel(decoded).load_all()
    streamed = StreamedModel(source)
    layers, batches = streamed.tree.layers, batches_of(runnable(streamed.model))
    wanted = Trace(reference, layers)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            call(wanted, number, batch, has_cache, reference)
    found = Trace(streamed.model, layers)
    passes: list[tuple[int, Pass]] = []
    steps = streamed.run(
        [partial(call, found, n, batch, has_cache) for n, batch in enumerate(batches)],
        store=make_store(),
        on_resume=lambda number: setattr(found, "batch", number),
        on_layer=lambda layer, why: passes.append((layer, why)),
        replacement=lambda _: decoded,
    )
    assert list(steps) == list(range(len(layers)))
    assert passes == [(n, why) for n in range(len(layers)) for why in (Pass.FIRST, Pass.REPLAY)]
    assert found.outputs.keys() == wanted.outputs.keys()
    for key, output in wanted.outputs.items():
        assert torch.equal(found.outputs[key], output), key
    for key, tensors in wanted.inputs.items():
        assert len(found.inputs[key]) == len(tensors)
        assert all(map(torch.equal, found.inputs[key], tensors)), key
    source.close()
    decoded.close()


def test_statistics_are_of_the_source_s_layer(written: Any, quantized: Any, tmp_path: Path) -> None:
    """A layer reads what its quantized predecessors compute; what is observed in it is its own."""
    folder, out = written("qwen3_moe")[0], quantized("qwen3_moe")
    source, decoded = open_source(folder), open_decoded(out)
    plan = make_plan(source, Recipe.load("nvfp4_default_mse-fp8_kv"))
    ids = [batch["input_ids"] for batch in batches_of(runnable(StreamedModel(source).model))]
    batches = tuple(Batch(each, torch.ones_like(each)) for each in ids)
    data = CalibrationData(batches, "", 6, 24, 1, "random", False)
    plain, propagated = (
        Calibration(plan, source, data, quantized=quantized_layer)
        for quantized_layer in (None, lambda _: decoded)
    )
    replaced = Calibration(plan, decoded, data)
    for calibration in (plain, propagated, replaced):
        assert list(calibration.units()) == [0, 1, 2, None]

    statistics = propagated.statistics
    assert statistics.sites.keys() == plain.statistics.sites.keys()
    for site, state in statistics.sites.items():
        if ".layers.0." in site:  # nothing before it is quantized
            assert all(torch.equal(state[x], plain.statistics.sites[site][x]) for x in state)
        if "tokens" in state and "gate_up" in site:
            assert state["tokens"].sum() == plain.statistics.sites[site]["tokens"].sum()
    amaxes = [
        {path: x.amax for path, x in run.statistics.linears.items() if "layers.0" not in path}
        for run in (plain, propagated, replaced)
    ]  # of attention alone, which is not quantized
    assert amaxes[1] == amaxes[2] != amaxes[0]
    experts = [
        calibration.statistics.experts["model.layers.1.mlp.experts"].down_amax
        for calibration in (propagated, replaced)
    ]
    assert not torch.equal(*experts), "the layer was observed with its own weights"
