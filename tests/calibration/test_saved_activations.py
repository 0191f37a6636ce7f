# SPDX-License-Identifier: Apache-2.0
"""A run that resumes behind finished layers computes, bit for bit, what it would have computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from families import Truth
from fourfold.calibration.kv_cache import recording_cache
from fourfold.calibration.saved_activations import SavedActivations, digest_of
from fourfold.calibration.streaming import StreamedModel
from fourfold.models.internals import runnable
from fourfold.sources.safetensors import open_source

from .running import NO_CACHE, RUNNABLE, batches_of, same_bits, tensors_of

Written = Callable[[str], tuple[Path, Truth]]


class Streamed:
    """Runs of a streamed model that save what layers return, and the layers that each computed."""

    def __init__(self, folder: Path, *, has_cache: bool) -> None:
        self.model = StreamedModel(open_source(folder))
        self.batches = batches_of(runnable(self.model.model))
        self.has_cache = has_cache
        self.layers: list[int] = []

    def run(self, saved: SavedActivations) -> list[Any]:
        """What the model returns for each batch."""
        outputs: dict[int, Any] = {}

        def call(number: int, batch: Mapping[str, torch.Tensor], model: Any) -> None:
            model, options = runnable(model), {"use_cache": False}
            if self.has_cache:
                cache = recording_cache(model, lambda *_: None)
                options = {"past_key_values": cache, "use_cache": True}
            output = model(**batch, **options)
            outputs[number] = [tensor.clone() for tensor in tensors_of(output)]

        calls = [partial(call, number, batch) for number, batch in enumerate(self.batches)]
        self.layers = list(self.model.run(calls, saved=saved))
        return [outputs[number] for number in range(len(self.batches))]

    def store(self, folder: Path, finished: int = 0) -> SavedActivations:
        saved = SavedActivations(folder, range(len(self.batches)))
        saved.find(set(range(finished)))
        return saved


NEVER_SAVED = {"diffusion_gemma", "inkling2", "nllb_moe", "switch_transformers"}
"""Families whose calls hold more than the last layer's output: encoders and decoders, and a model
that hands tensors on over several layers. The text passes all of their layers again."""

FAST = ["qwen3_moe", "gpt_oss", "deepseek_v4", "gemma4", "nemotron_h", "inkling2"]

CASES = [
    pytest.param(name, has_cache, marks=() if name in FAST else pytest.mark.slow)
    for name in RUNNABLE
    for has_cache in (False, True)
    if not (has_cache and name in NO_CACHE)
]


@pytest.mark.parametrize(("name", "has_cache"), CASES)
def test_the_same_bits_behind_every_layer(
    name: str, has_cache: bool, written: Written, tmp_path: Path
) -> None:
    """A cache that keeps states of finished layers is noticed: then nothing is skipped."""
    streamed = Streamed(written(name)[0], has_cache=has_cache)
    whole, layers = streamed.run(streamed.store(tmp_path)), streamed.layers
    for finished in range(1, len(layers)):
        saved = streamed.store(tmp_path, finished)
        saved.is_saving = False
        assert_same(streamed.run(saved), whole)
        assert streamed.layers == layers[saved.first :]
        if not has_cache:
            assert saved.first == (0 if name in NEVER_SAVED else finished)
        assert saved.first in (0, finished)


def assert_same(mine: list[Any], theirs: list[Any]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert len(one) == len(other)
        assert all(map(same_bits, one, other))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [flip_a_bit, cut, empty])
def test_what_does_not_fit_is_not_used(
    spoil: Callable[[Path], None], written: Written, tmp_path: Path
) -> None:
    streamed = Streamed(written("qwen3_moe")[0], has_cache=False)
    whole, layers = streamed.run(streamed.store(tmp_path)), streamed.layers
    spoil(tmp_path / "layer-00002" / "batch-00001.safetensors")
    saved = streamed.store(tmp_path, 2)
    assert saved.first == 2
    assert_same(streamed.run(saved), whole)
    assert saved.first == 0
    assert streamed.layers == layers


def test_files_of_finished_layers_are_removed(written: Written, tmp_path: Path) -> None:
    """A batch's file is needed until the next layer's statistics are stored."""
    streamed = Streamed(written("qwen3_moe")[0], has_cache=False)
    saved = streamed.store(tmp_path)
    streamed.run(saved)
    saved.finished(1)
    assert streamed.store(tmp_path, 1).first == 0
    assert streamed.store(tmp_path, 2).first == 2
    (tmp_path / "layer-00002" / "batch-00001.safetensors").unlink()
    assert streamed.store(tmp_path, 2).first == 0


def test_a_full_disk_ends_the_saving_alone(written: Written, tmp_path: Path) -> None:
    streamed = Streamed(written("qwen3_moe")[0], has_cache=False)
    whole = streamed.run(streamed.store(tmp_path / "good"))
    (tmp_path / "file").write_text("")
    saved = streamed.store(tmp_path / "file" / "folder")
    assert_same(streamed.run(saved), whole)
    assert not saved.is_saving


def test_digests_see_every_difference() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    values: list[Any] = [
        tensor, tensor.T.contiguous().T, tensor.reshape(3, 2), tensor.half(), tensor + 1,
        [tensor], (tensor,), {"x": tensor}, {"y": tensor}, None, 1, True, "1", Held(tensor),
        Held(tensor + 1), tensor.to("meta"),
    ]  # fmt: skip
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of(Held(tensor)) == digest_of(Held(tensor.clone()))


class Held:
    """An object with a state."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.me = self
