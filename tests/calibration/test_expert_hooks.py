# SPDX-License-Identifier: Apache-2.0
"""Proves what a `Watch` is shown: the rows of both products, with their experts and tokens.

Small whole numbers everywhere, so that float32 computes without rounding and every
implementation gives the same numbers, exactly: those of a formula written down here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Kimi_K25ForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from families import FAMILIES, build_model, quiet
from families.configs import tiny_config
from fourfold.models.expert_hooks import Product, Rows, unwatchable, watch_experts
from fourfold.models.internals import experts_kind
from fourfold.models.module_tree import describe

from .whole_numbers import DECORATED, EAGER_ONLY, KINDS, Experts, T, experts_with, tokens


@dataclass
class Recorder:
    """Keeps what it is shown; changes it if asked to."""

    all_experts: bool = False
    zeroes: Product | None = None
    routed: list[Rows] = field(default_factory=list)
    more: list[Rows] = field(default_factory=list)

    def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
        (self.routed if is_routed else self.more).append(rows)
        return torch.zeros_like(rows.x) if rows.product is self.zeroes else rows.x


def pairs(shown: list[Rows], product: Product) -> Iterator[tuple[int, int, Tensor, bool]]:
    """(token, expert, row, whether it counts) of everything that a product was given."""
    for rows in shown:
        if rows.product is product:
            assert rows.tokens is not None
            each = rows.experts if rows.experts.ndim == 2 else rows.experts[:, None]
            for token, experts, row in zip(
                rows.tokens.tolist(), each.tolist(), rows.x, strict=True
            ):
                for expert in experts:
                    if expert >= 0:
                        yield token, expert, row, rows.is_counted


def check_rows(experts: Experts, shown: list[Rows], x: Tensor, index: Tensor) -> None:
    """Every routed row was shown to both products, as what it is, and counts once."""
    chosen = enumerate(index.tolist())
    wanted = Counter((token, expert) for token, experts in chosen for expert in experts)
    for product in Product:
        found = list(pairs(shown, product))
        assert {(token, expert) for token, expert, *_ in found} == set(wanted)
        for token, expert, row, _ in found:
            right = x[token] if product is Product.GATE_UP else experts.inner(x[token], expert)
            assert torch.equal(row, right)
        assert Counter((token, expert) for token, expert, _, counts in found if counts) == wanted
    assert all(rows.path == experts.path for rows in shown)
    assert all(rows.of == len(x) for rows in shown)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECORATED)
def test_rows_of_decorated_classes(name: str, kind: str) -> None:
    experts, recorder = experts_with(name, kind), Recorder()
    x, index, weights = tokens()
    before = experts(x, index, weights)
    with watch_experts(experts.model, {experts.path: experts.layout}, recorder):
        watched = experts(x, index, weights)
    assert torch.equal(before, experts.wanted(x, index, weights))
    assert torch.equal(watched, before)
    check_rows(experts, recorder.routed, x, index)
    assert recorder.more == []


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_rows_of_classes_that_only_run_eagerly(name: str) -> None:
    experts, recorder = experts_with(name), Recorder()
    assert experts_kind(experts.module) is None
    x, index, weights = tokens()
    before = experts(x, index, weights)
    with watch_experts(experts.model, {experts.path: experts.layout}, recorder):
        watched = experts(x, index, weights)
    assert torch.equal(before, experts.wanted(x, index, weights))
    assert torch.equal(watched, before)
    check_rows(experts, recorder.routed, x, index)


def test_rows_of_llama4() -> None:
    """Every token goes through every expert there; rows are zero where it is not routed."""
    experts, recorder = experts_with("llama4"), Recorder()
    x, index, _ = tokens()
    rows_ETH = torch.zeros(4, T, 64)
    for token, (expert, _) in enumerate(index.tolist()):
        rows_ETH[expert, token] = x[token]
    before = experts.owner(rows_ETH.reshape(-1, 64))
    with watch_experts(experts.model, {experts.path: experts.layout}, recorder):
        watched = experts.owner(rows_ETH.reshape(-1, 64))
    assert torch.equal(watched, before)
    assert not (x == 0).all(-1).any()
    shown = list(pairs(recorder.routed, Product.GATE_UP))
    assert Counter((t, e) for t, e, *_ in shown) == Counter(
        (t, chosen[0]) for t, chosen in enumerate(index.tolist())
    )
    assert all(torch.equal(row, x[token]) for token, _, row, _ in shown)
    for token, expert, row, counts in pairs(recorder.routed, Product.DOWN):
        assert torch.equal(row, experts.inner(x[token], expert))
        assert counts


def test_rows_of_a_privacy_filter_are_float32() -> None:
    """It computes in float32 whatever its weights are: casts are followed, of both factors."""
    model = build_model(FAMILIES["openai_privacy_filter"])
    tree, recorder = describe(model), Recorder()
    path, layout = next(iter(tree.experts.items()))
    module: Any = model.get_submodule(path)
    x, index, weights = tokens()
    x = x.bfloat16()
    with torch.no_grad():
        before = module(x, index, weights.bfloat16())
        with watch_experts(model, {path: layout}, recorder):
            watched = module(x, index, weights.bfloat16())
    assert torch.equal(watched, before)
    for product in Product:
        found = list(pairs(recorder.routed, product))
        assert {(t, e) for t, e, *_ in found} == {
            (t, e) for t, chosen in enumerate(index.tolist()) for e in chosen
        }
        for token, expert, row, _ in found:
            gate_up = x[token].float() @ module.gate_up_proj[expert].detach().float()
            gate_up += module.gate_up_proj_bias[expert].detach().float()
            right = x[token].float() if product is Product.GATE_UP else module._apply_gate(gate_up)
            assert row.dtype is torch.float32
            torch.testing.assert_close(row, right)
            assert product is Product.DOWN or torch.equal(row, right)


def test_a_model_that_refuses_to_be_told_an_implementation() -> None:
    """Kimi K2.5: its experts are DeepSeek's, decorated, but its own source says nothing of that."""
    sizes = {
        "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
        "text_config": {"num_key_value_heads": 4},
    }
    with quiet():
        config = tiny_config("kimi_k25", sizes)
        model = Kimi_K25ForConditionalGeneration._from_config(config).eval()
    tree, chosen = describe(model), {}
    paths = list(tree.experts)
    assert len(paths) == 2
    for path in paths:
        module: Any = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, path=path: chosen.update({path: args}))
    ids = torch.arange(3, 15)[None]
    for kind in KINDS:
        recorder = Recorder()
        for path in paths:
            model.get_submodule(path).config._experts_implementation_internal = kind
        with torch.no_grad():
            before = model(input_ids=ids).logits
            with watch_experts(model, tree.experts, recorder):
                assert torch.equal(model(input_ids=ids).logits, before)
        for path in paths:
            x, index, _ = chosen[path]
            shown = [rows for rows in recorder.routed if rows.path == path]
            wanted = Counter((t, e) for t, row in enumerate(index.tolist()) for e in row)
            for product in Product:
                found = Counter((t, e) for t, e, _, counts in pairs(shown, product) if counts)
                assert found == wanted
            for token, _, row, _ in pairs(shown, Product.GATE_UP):
                assert torch.equal(row, x[token])


# --- every token through every expert -------------------------------------------------------


@pytest.mark.parametrize("rows_at_a_time", [1, 8, 1 << 14])
@pytest.mark.parametrize("kind", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", DECORATED)
def test_every_token_through_every_expert(name: str, kind: str, rows_at_a_time: int) -> None:
    experts, recorder = experts_with(name, kind), Recorder(all_experts=True)
    x, index, weights = tokens()
    layouts = {experts.path: experts.layout}
    with watch_experts(experts.model, layouts, recorder, rows_at_a_time=rows_at_a_time):
        watched = experts(x, index, weights)
    assert torch.equal(watched, experts.wanted(x, index, weights))
    check_rows(experts, recorder.routed, x, index)
    every = [(token, expert) for token in range(T) for expert in range(4)]
    for product in Product:
        found = list(pairs(recorder.more, product))
        assert sorted((token, expert) for token, expert, *_ in found) == every
        for token, expert, row, _ in found:
            right = x[token] if product is Product.GATE_UP else experts.inner(x[token], expert)
            assert torch.equal(row, right)


def test_who_cannot_send_every_token_to_every_expert() -> None:
    for name in [*EAGER_ONLY, "llama4", "openai_privacy_filter"]:
        model = build_model(FAMILIES[name])
        paths = list(describe(model).experts)
        assert unwatchable(model, paths) == paths
    for name in DECORATED:
        model = build_model(FAMILIES[name])
        assert unwatchable(model, describe(model).experts) == []


# --- a watch may change what is multiplied ----------------------------------------------------


@pytest.mark.parametrize("product", list(Product))
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in DECORATED for kind in KINDS] + [(name, "") for name in EAGER_ONLY],
)
def test_what_a_watch_gives_is_multiplied(name: str, kind: str, product: Product) -> None:
    experts = experts_with(name, kind)
    x, index, weights = tokens()
    before = experts(x, index, weights)
    assert before.any()
    with watch_experts(experts.model, {experts.path: experts.layout}, Recorder(zeroes=product)):
        assert not experts(x, index, weights).any()
    assert torch.equal(experts(x, index, weights), before)


# --- several at once, and afterwards ----------------------------------------------------------


def left_behind(model: nn.Module) -> dict[str, Any]:
    """What the hooks change for a while."""
    modules = dict(model.named_modules())
    return {
        "functions": dict(ALL_EXPERTS_FUNCTIONS.items()),
        "implementations": [
            module.config._experts_implementation_internal
            for module in modules.values()
            if hasattr(module, "config")
        ],
        "attributes": {path: dict(module.__dict__) for path, module in modules.items()},
        "modes": torch._C._len_torch_function_stack(),
    }


MODELS = ["qwen3_moe", "dbrx"]


@pytest.mark.parametrize("name", MODELS)
def test_watches_nest(name: str) -> None:
    experts, first, second = experts_with(name), Recorder(), Recorder(zeroes=Product.DOWN)
    where = {experts.path: experts.layout}
    x, index, weights = tokens()
    before, state = experts(x, index, weights), left_behind(experts.model)
    with watch_experts(experts.model, where, first):
        inside = left_behind(experts.model)
        with watch_experts(experts.model, where, second):
            assert not experts(x, index, weights).any()
        assert left_behind(experts.model) == inside
        check_rows(experts, second.routed, x, index)
        shown = len(first.routed)
        assert torch.equal(experts(x, index, weights), before)
        check_rows(experts, first.routed[shown:], x, index)
    assert left_behind(experts.model) == state


def test_two_models_at_once() -> None:
    both_models = [experts_with(name) for name in MODELS]
    recorders = [Recorder(), Recorder()]
    x, index, weights = tokens()
    states = [left_behind(experts.model) for experts in both_models]
    one, other = (
        watch_experts(experts.model, {experts.path: experts.layout}, recorder)
        for experts, recorder in zip(both_models, recorders, strict=True)
    )
    with one, other:
        for experts in both_models:
            experts(x, index, weights)
    for experts, recorder in zip(both_models, recorders, strict=True):
        check_rows(experts, recorder.routed, x, index)
    assert [left_behind(experts.model) for experts in both_models] == states


def test_models_watched_at_overlapping_times() -> None:
    """The first ends before the second; a third begins meanwhile."""
    three = [experts_with("qwen3_moe") for _ in range(3)]
    recorders = [Recorder(), Recorder(), Recorder()]
    x, index, weights = tokens()
    state = left_behind(three[0].model)
    first, second, third = (
        watch_experts(experts.model, {experts.path: experts.layout}, recorder)
        for experts, recorder in zip(three, recorders, strict=True)
    )
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    third.__enter__()
    for experts in three:
        experts(x, index, weights)
    second.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert recorders[0].routed == []
    check_rows(three[1], recorders[1].routed, x, index)
    check_rows(three[2], recorders[2].routed, x, index)
    assert left_behind(three[0].model) == state


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", MODELS)
def test_an_error_leaves_nothing(name: str, error: type[BaseException]) -> None:
    experts = experts_with(name)
    x, index, weights = tokens()
    before, state = experts(x, index, weights), left_behind(experts.model)

    class Fails(Recorder):
        def __call__(self, rows: Rows, *, is_routed: bool) -> Tensor:
            if rows.product is Product.DOWN:
                raise error
            return rows.x

    with (
        pytest.raises(error),
        watch_experts(experts.model, {experts.path: experts.layout}, Fails()),
    ):
        experts(x, index, weights)
    assert left_behind(experts.model) == state
    assert torch.equal(experts(x, index, weights), before)


def test_only_what_was_asked_for_is_shown() -> None:
    """Other experts modules of the same model, with the same configuration, run as always."""
    model = build_model(FAMILIES["mixtral"])
    tree, recorder = describe(model), Recorder()
    path, layout = list(tree.experts.items())[1]
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with watch_experts(model, {path: layout}, recorder):
            assert torch.equal(model(input_ids=ids).logits, before)
    assert {rows.path for rows in recorder.routed} == {path}


def test_two_models_that_share_their_configuration() -> None:
    first = experts_with("qwen3_moe")
    second = experts_with("qwen3_moe")
    for module in second.model.modules():
        if hasattr(module, "is_transposed"):
            module.config = first.module.config
    recorder, (x, index, weights) = Recorder(), tokens()
    with watch_experts(first.model, {first.path: first.layout}, recorder):
        before = second(x, index, weights)
        assert recorder.routed == []
        first(x, index, weights)
    assert torch.equal(before, second.wanted(x, index, weights))
    check_rows(first, recorder.routed, x, index)
