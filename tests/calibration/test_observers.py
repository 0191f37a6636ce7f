# SPDX-License-Identifier: Apache-2.0
"""Proves the statistics: pads do not count, and all implementations of experts give the same.

`test_every_family.py` compares the statistics of every family with those of plain hooks.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, build_model, mostly_slow
from fourfold.calibration.kv_cache import recording_cache
from fourfold.calibration.observers import Observers
from fourfold.calibration.statistics import DataSummary, Statistics
from fourfold.errors import ObservationError
from fourfold.models.expert_hooks import Product, Rows, unwatchable
from fourfold.models.experts import Half, Part, Projection
from fourfold.models.internals import runnable
from fourfold.models.module_tree import describe

from .running import NO_CACHE, NO_KNOWN_EXPERTS, RUNNABLE, VARIED, batches_of
from .whole_numbers import DECORATED, EAGER_ONLY, KINDS, Experts, experts_with, tokens


def none_yet() -> Statistics:
    return Statistics(DataSummary("random", "", 0, 0, 0))


# --- whole models -------------------------------------------------------------------------


PADS_ARE_SEEN = {
    "diffusion_gemma": "its decoder attends to what its encoder made of pads",
    "nllb_moe": "an nn.Linear that is an expert does not know which tokens it is given",
    "switch_transformers": "an nn.Linear that is an expert does not know which tokens it is given",
}
"""Families whose statistics depend on what stands where a text has ended."""


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        [name for name in RUNNABLE if not name.endswith(("_mtp", "_tied", "_unnamed"))], *VARIED
    ),
)
def test_what_stands_in_pads_does_not_matter(name: str) -> None:
    """Every model computes the same for real tokens; so all statistics are the same."""
    model = build_model(FAMILIES[name])
    tree, part = describe(model), runnable(model)
    batch = batches_of(part)[1]
    assert bool((batch["input_ids"] == 0).any())
    found = [_statistics(name, model, tree, part, batch, pad) for pad in (0, 77)]
    assert (found[0] == found[1]) is (name not in PADS_ARE_SEEN)


def _statistics(name: str, model: Any, tree: Any, part: Any, batch: Any, pad: int) -> Any:
    """Everything that observers find, in plain numbers."""
    observers, found, kwargs = Observers(model, tree.experts, tree.linears), none_yet(), {}
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    inputs = {k: ids[:, : v.shape[1]] if k.endswith("_ids") else v for k, v in batch.items()}
    if name not in NO_CACHE:
        calls = itertools.count()
        cache = recording_cache(part, lambda k, v: observers.see_kv(str(next(calls)), k, v))
        kwargs = {"past_key_values": cache}
    observers.see(batch["attention_mask"])
    with torch.no_grad(), observers.attached():
        part(**inputs, use_cache=bool(kwargs), **kwargs)
    observers.take(found)
    experts = {
        path: [each.tolist() for each in vars(values).values()]
        for path, values in found.experts.items()
    }
    return experts, found.linears, found.kv


# --- other implementations ----------------------------------------------------------------------


DECORATED_FAMILIES = [
    name
    for name in RUNNABLE
    if FAMILIES[name].layout != "dense"
    and name not in (*NO_KNOWN_EXPERTS, *EAGER_ONLY, "llama4", "openai_privacy_filter")
    and not name.endswith(("_mtp", "_tied", "_unnamed", "_vl"))
]


@pytest.mark.parametrize("name", mostly_slow(DECORATED_FAMILIES, *VARIED))
def test_all_experts_and_eager_of_every_family(name: str) -> None:
    """Every token through every expert: what is computed and counted stays; eager agrees."""
    model = build_model(FAMILIES[name])
    tree, part = describe(model), runnable(model)
    batch = batches_of(part)[1]
    assert unwatchable(model, tree.experts) == []
    chosen: dict[str, tuple[Tensor, Tensor]] = {}
    for path in tree.experts:
        module: Any = model.get_submodule(path)
        module.register_forward_pre_hook(_keeping(path, chosen), with_kwargs=True)
    for all_experts, kind in ((True, "grouped_mm"), (False, "eager")):
        for path in tree.experts:
            module = model.get_submodule(path)
            module.config._experts_implementation_internal = kind
        chosen.clear()
        with torch.no_grad():
            before = part(**batch, use_cache=False)[0]
        expected = _counted(model, chosen, batch["attention_mask"], all_experts)
        observers = Observers(model, tree.experts, [], all_experts=all_experts)
        observers.see(batch["attention_mask"])
        with torch.no_grad(), observers.attached():
            assert torch.equal(part(**batch, use_cache=False)[0], before)
        found = none_yet()
        observers.take(found)
        counted = {
            path: (each.tokens.tolist(), each.gate_up_amax.tolist())
            for path, each in found.experts.items()
        }
        assert counted == expected
        assert counted


def _keeping(path: str, chosen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden, index, *_ = (*args, *kwargs.values())
        chosen[path] = hidden, index

    return keep


def _counted(
    model: nn.Module, chosen: dict[str, tuple[Tensor, Tensor]], mask: Tensor, all_experts: bool
) -> dict[str, tuple[list[int], list[float]]]:
    """From the router's choice: tokens of each expert, and the largest hidden state it is shown."""
    found = {}
    for path, (hidden, index) in chosen.items():
        kept = mask.reshape(-1).bool() if mask.numel() == len(hidden) else torch.ones(len(hidden))
        counts, largest = [], []
        for expert in range(int(model.get_submodule(path).num_experts)):  # type: ignore[arg-type]
            times = (index == expert).sum(-1) * kept
            shown = hidden[kept.bool() if all_experts else times.bool()]
            counts.append(int(times.sum()))
            largest.append(float(shown.abs().max()) if len(shown) else 0.0)
        found[path] = counts, largest
    return found


def wanted(experts: Experts, x: Tensor, index: Tensor, is_kept: Tensor, every: bool) -> Any:
    """Statistics of whole numbers by the formula, expert by expert."""
    rows = []
    for expert in range(4):
        times = (index == expert).sum(-1) * is_kept
        mine = x[is_kept if every else times.bool()]
        inner = experts.inner(mine, expert)
        largest = [float(each.abs().max()) if len(each) else 0.0 for each in (mine, inner)]
        rows.append((int(times.sum()), *largest))
    return rows


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "every"),
    [(name, kind, False) for name in DECORATED for kind in KINDS]
    + [(name, kind, True) for name in DECORATED for kind in KINDS[:2]]
    + [(name, "", False) for name in EAGER_ONLY],
)
def test_every_implementation_gives_the_same(
    name: str, kind: str, every: bool, is_padded: bool
) -> None:
    experts = experts_with(name, kind)
    x, index, weights = tokens()
    is_kept = torch.arange(len(x)) % 7 != 3 if is_padded else torch.ones(len(x), dtype=torch.bool)
    x[3] *= 100  # padding has the largest values
    observers = Observers(
        experts.model, {experts.path: experts.layout}, [], all_experts=every
    )  # fmt: skip
    with observers.attached():
        for part in (slice(0, 12), slice(12, None)):  # two calls add up
            observers.see(is_kept[part][None].long())
            experts(x[part], index[part], weights[part])
    found = none_yet()
    observers.take(found)
    assert list(found.experts) == [experts.path]
    each = found.experts[experts.path]
    table = zip(each.tokens, each.gate_up_amax, each.down_amax, strict=True)
    numbers = [tuple(value.item() for value in row) for row in table]
    assert numbers == wanted(experts, x, index, is_kept, every)
    assert numbers[3][0] == 0, "one expert is never chosen"
    assert observers.states == {}


# --- what observers do with rows ------------------------------------------------------------


class Small(nn.Module):
    """Two linear layers, one of them called by keyword."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, dtype=dtype)
        self.two = nn.Linear(8, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(input=self.one(x))


def observed(model: nn.Module, x: Tensor, mask: Tensor | None) -> Statistics:
    observers, found = Observers(model, {}, ["one", "two"]), none_yet()
    observers.see(mask)
    with torch.no_grad(), observers.attached():
        model(x)
    observers.take(found)
    return found


MASKS = {
    "none": (None, slice(None), 12),
    "no pads": (torch.ones(3, 4), slice(None), 12),
    "on the right": (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]), None, 7),
    "on the left": (torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]), None, 8),
    "of other texts": (torch.tensor([[1, 0]]), slice(None), 12),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_pads_are_left_out(name: str, dtype: torch.dtype) -> None:
    mask, where, count = MASKS[name]
    model = Small(dtype)
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = observed(model, x, mask).linears
    kept = x.reshape(-1, 8)[mask.reshape(-1).bool() if where is None else where]
    with torch.no_grad():
        between = model.one(x).reshape(-1, 8)[mask.reshape(-1).bool() if where is None else where]
    assert (found["one"].amax, found["one"].rows) == (float(kept.abs().max()), count)
    assert (found["two"].amax, found["two"].rows) == (float(between.abs().max()), count)


def test_nothing_but_pads_is_nothing() -> None:
    assert observed(Small(), torch.randn(2, 3, 8), torch.zeros(2, 3)).linears == {}


def test_the_largest_may_be_negative_and_last() -> None:
    x = torch.zeros(2, 3, 8)
    x[1, 2, 7] = -5.5
    found = observed(Small(), x, None).linears["one"]
    assert (found.amax, found.rows) == (5.5, 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_name_the_layer(bad: float, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 8, dtype=dtype)
    x[1, 1, 4] = bad
    with pytest.raises(ObservationError, match=r"^one: NaN or Inf among the activations"):
        observed(Small(dtype), x, None)
    mask = torch.ones(2, 3)
    mask[1, 1] = 0
    assert observed(Small(dtype), x, mask).linears["one"].amax == 0.0


@pytest.mark.parametrize("product", list(Product))
def test_nan_names_the_experts(product: Product) -> None:
    experts = experts_with("qwen3_moe")
    x, index, weights = tokens()
    if product is Product.GATE_UP:
        x[5, 3] = math.nan
    else:
        experts.module.gate_up_proj.data[0, 50] = math.inf
        experts.module.gate_up_proj.data[0, 2] = -math.inf
    observers = Observers(experts.model, {experts.path: experts.layout}, [])
    with observers.attached():
        experts(x, index, weights)
    with pytest.raises(ObservationError, match=rf"{experts.path}\.{product}: NaN or Inf"):
        observers.take(none_yet())


def test_nan_names_the_layer_of_keys_and_values() -> None:
    observers = Observers(nn.Module(), {}, [])
    keys = torch.zeros(1, 2, 3, 4)
    keys[0, 1, 2, 3] = math.nan
    observers.see_kv("layers.7", keys, torch.ones(1, 2, 3, 4))
    with pytest.raises(ObservationError, match=r"^layers\.7\.kv: NaN or Inf"):
        observers.take(none_yet())


def test_keys_and_values_without_pads() -> None:
    observers, found = Observers(nn.Module(), {}, []), none_yet()
    keys, values = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 6)
    keys[0, 2, 1, 4], values[1, 0, 2, 5] = -2.0, 3.0
    keys[1, 0, 3, 0], values[0, 1, 3, 0] = 100.0, 100.0  # the last tokens are pads
    observers.see(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]))
    observers.see_kv("a", keys, values)
    observers.see_kv("a", keys / 2, values * 2)
    observers.see(None)
    observers.see_kv("b", keys, values)
    observers.take(found)
    assert found.kv == {"a": (2.0, 6.0), "b": (100.0, 100.0)}


def test_experts_of_what_is_no_expert_are_left_out() -> None:
    """Rows whose expert is −1, or beyond (LongCat's zero experts), count for nobody."""
    parts = tuple(Part(each, "w", "eoi", Half.FIRST) for each in Projection)
    layout = next(iter(describe(build_model(FAMILIES["mixtral"])).experts.values()))
    layout = type(layout)("e", "Experts", 2, parts)
    observers, found = Observers(nn.Module(), {"e": layout}, []), none_yet()
    x = torch.tensor([[1.0], [2.0], [-3.0], [100.0], [200.0]])
    numbers = torch.tensor([0, 1, 1, 2, -1])
    for product in Product:
        is_counted = product is Product.GATE_UP
        rows = Rows("e", product, x, numbers, torch.arange(5), 5, is_counted)
        assert observers(rows, is_routed=True) is x
    observers.take(found)
    each = found.experts["e"]
    assert each.tokens.tolist() == [1, 2]
    assert each.gate_up_amax.tolist() == each.down_amax.tolist() == [1.0, 3.0]


def test_hooks_go_also_after_an_error() -> None:
    model = Small()
    observers = Observers(model, {}, ["one", "two"])

    def boom(*_: Any) -> None:
        raise KeyboardInterrupt

    model.two.register_forward_pre_hook(boom)
    before = [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), observers.attached():
        model(torch.zeros(1, 8))
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == before
