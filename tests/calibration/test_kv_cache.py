# SPDX-License-Identifier: Apache-2.0
"""Proves the recording cache: it records what attention gives it, and holds nothing.

That it changes no bit of any family is proved in `test_observers.py`, whose runs have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, build_model, mostly_slow
from fourfold.calibration.kv_cache import recording_cache
from fourfold.models.internals import runnable

from .running import NO_CACHE, RUNNABLE, VARIED, batches_of

HOLDS = {
    "deepseek_v4": "what it compresses; but MLA takes no KV scales, and is not calibrated",
    "diffusion_gemma": "what its encoder leaves for its decoder",
    "minimax_m3_vl": "keys of its indexer, one head",
    "qwen4_exp": "positions",
}
"""Families whose cache holds something after a call."""

FAMILIES_WITH_A_CACHE = [
    name
    for name in RUNNABLE
    if name not in NO_CACHE and not name.endswith(("_mtp", "_tied", "_unnamed"))
]


def held(value: Any) -> Iterator[Tensor]:
    """Every tensor inside a cache that is more than a number."""
    if isinstance(value, Tensor):
        if value.numel() > 1:
            yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            if name not in ("config", "layer_class_to_replicate"):
                yield from held(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from held(each)
    elif type(value).__module__.startswith(("transformers", "fourfold")):
        yield from held(vars(value))


@pytest.mark.parametrize("name", mostly_slow(FAMILIES_WITH_A_CACHE, *VARIED))
def test_it_holds_nothing(name: str) -> None:
    model = runnable(build_model(FAMILIES[name]))
    recorded: list[tuple[Tensor, Tensor]] = []
    cache = recording_cache(model, lambda keys, values: recorded.append((keys, values)))
    assert list(held(cache)) == []
    batch = batches_of(model)[1]
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
    assert bool(list(held(cache))) is (name in HOLDS)
    assert recorded
    samples, length = batch["input_ids"].shape
    assert {(len(keys), keys.shape[2]) for keys, _ in recorded} == {(samples, length)}


def test_it_gives_back_what_it_was_given() -> None:
    model = build_model(FAMILIES["qwen3_moe"])
    recorded: list[tuple[Tensor, Tensor]] = []
    cache = recording_cache(model, lambda keys, values: recorded.append((keys, values)))
    keys, values = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    for layer in (0, 1, 1):
        given = cache.update(keys, values, layer)
        assert given[0] is keys
        assert given[1] is values
    assert len(recorded) == 3
    assert cache.get_seq_length() == 0


def test_a_models_own_cache_class_is_used() -> None:
    model = build_model(FAMILIES["minimax"])
    cache = recording_cache(model, lambda *_: None)
    assert [each.__name__ for each in type(cache).__mro__[:3]] == [
        "RecordingMiniMaxCache",
        "_Recording",
        "MiniMaxCache",
    ]


def test_each_call_has_its_own() -> None:
    model = build_model(FAMILIES["qwen3_moe"])
    caches = [recording_cache(model, lambda *_: None) for _ in range(2)]
    assert type(caches[0]) is type(caches[1])
    assert caches[0].record is not caches[1].record
