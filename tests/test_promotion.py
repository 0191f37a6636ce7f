# SPDX-License-Identifier: Apache-2.0
"""Proves that components are promoted in the order of KL for each byte, within the budget, and
measured again after each round: on made-up tables of what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from fourfold.planning.promotion import Options, Promotion, Step

BYTES = {"recipe": 450, "w4a16": 449, "fp8": 800, "bf16": 1600}
"""Of 800 weights: 4.5, 4.49, 8 and 16 bits."""


@dataclass(frozen=True)
class Made:
    """A component of some times 800 weights."""

    name: str
    size: int = 1
    options: Sequence[str] = ("w4a16", "fp8", "bf16")

    @property
    def numel(self) -> int:
        return 800 * self.size

    def has(self, option: str) -> bool:
        return option in self.options

    def nbytes(self, option: str) -> int:
        return BYTES[option] * self.size

    def is_nvfp4(self, option: str) -> bool:
        return option in ("recipe", "w4a16")


@dataclass
class Table:
    """KL as a sum of what components cost; notes what is measured."""

    costs: Mapping[str, Mapping[str, float]]
    calls: list[list[dict[str, str]]] = field(default_factory=list)

    def __call__(self, choices: Sequence[Options]) -> list[float]:
        self.calls.append([dict(options) for options in choices])
        return [self.kl(options) for options in choices]

    def kl(self, options: Options) -> float:
        return math.fsum(self.costs[name].get(option, 0.0) for name, option in options.items())


def run(components: Sequence[Made], table: Table, *candidates: str, **budget: float) -> list[Step]:
    return Promotion(components, candidates, table, **budget).run()


def moved(steps: Sequence[Step]) -> list[tuple[str, str]]:
    return [move for step in steps for move in step.moved.items()]


def test_the_most_kl_for_each_byte_comes_first() -> None:
    """`large` saves most, but for each byte less than the others."""
    components = [Made("large", 10), Made("b"), Made("c"), Made("d")]
    table = Table(
        {
            "large": {"recipe": 0.5, "fp8": 0.1},
            "b": {"recipe": 0.10, "fp8": 0.01},
            "c": {"recipe": 0.30, "fp8": 0.10},
            "d": {"recipe": 0.05, "fp8": 0.04},
        }
    )
    steps = run(components, table, "fp8")
    assert moved(steps) == [("c", "fp8"), ("b", "fp8"), ("large", "fp8")]  # or none is NVFP4
    assert [step.kl for step in steps] == pytest.approx([0.95, 0.75, 0.66, 0.26])
    assert steps[0].bits == 4.5
    assert steps[1].bits == pytest.approx((12 * 4.5 + 8) / 13)


def test_the_budget_is_kept() -> None:
    """The best move does not fit, so that others are made."""
    components = [Made("a", 4), Made("b"), Made("c")]
    table = Table({name: {"recipe": cost} for name, cost in (("a", 8.0), ("b", 1.0), ("c", 0.9))})
    whole = (4 * 4.5 + 2 * 8) / 6
    assert moved(run(components, table, "fp8", bits_per_weight=whole)) == [
        ("b", "fp8"),
        ("c", "fp8"),
    ]
    less = run(components, table, "fp8", bits_per_weight=whole - 0.01)
    assert moved(less) == [("b", "fp8")]
    assert moved(run(components, table, "fp8", bits_per_weight=4.5)) == []


def test_parts_that_do_not_add_up_are_measured_again() -> None:
    """`a` and `b` cost the same thing: once one of them is promoted, the other costs nothing."""

    class Shared(Table):
        def kl(self, options: Options) -> float:
            shared = 0.4 if options["a"] == options["b"] == "recipe" else 0.0
            return shared + super().kl(options)

    costs = {"a": {"recipe": 0.02}, "b": {"recipe": 0.01}, "c": {"recipe": 0.1}, "d": {}}
    steps = run([*map(Made, costs)], Shared(costs), "fp8")
    assert moved(steps) == [("a", "fp8"), ("c", "fp8"), ("b", "fp8")]


def test_a_move_that_never_helps_is_not_made() -> None:
    costs = {"a": {"recipe": 0.1, "fp8": 0.2}, "b": {"recipe": 0.1, "fp8": 0.1}, "c": {}}
    table = Table(costs)
    assert moved(run([*map(Made, costs)], table, "fp8")) == []
    assert len(table.calls) == 1


def test_what_looked_useless_is_tried_before_the_end() -> None:
    """A component that is too bad for anything else to matter hides what the others cost."""

    class Hidden(Table):
        def kl(self, options: Options) -> float:
            return 1.0 if options["a"] == "recipe" else super().kl(options)

    names = [f"p{number}" for number in range(12)]
    costs = {"a": {}} | {name: {"recipe": 0.01} for name in names} | {"last": {}}
    steps = run([*map(Made, costs)], Hidden(costs), "fp8")
    assert sorted(name for name, _ in moved(steps)) == ["a", *sorted(names)]


def test_moves_that_cost_no_bytes() -> None:
    """They come first, and only if they are asked for; later they may become something larger."""
    components = [Made("a"), Made("b"), Made("c")]
    costs = {
        "a": {"recipe": 0.5, "w4a16": 0.45, "fp8": 0.01},
        "b": {"recipe": 0.3, "w4a16": 0.2, "fp8": 0.19},
        "c": {},
    }
    free = [("b", "w4a16"), ("a", "w4a16"), ("a", "fp8"), ("b", "fp8")]
    assert moved(run(components, Table(costs), "w4a16", "fp8")) == free
    assert moved(run(components, Table(costs), "fp8")) == [("a", "fp8"), ("b", "fp8")]
    steps = run(components, Table(costs), "w4a16", "fp8", bits_per_weight=4.5)
    assert moved(steps) == free[:2]
    assert steps[-1].bits < 4.5


def test_from_one_candidate_to_a_larger_one() -> None:
    costs = {"a": {"recipe": 1.0, "fp8": 0.1}, "b": {}}
    steps = run([*map(Made, costs)], Table(costs), "fp8", "bf16")
    assert moved(steps) == [("a", "fp8"), ("a", "bf16")]
    assert steps[-1].kl == 0


def test_a_part_has_only_its_options() -> None:
    components = [Made("a", options=("bf16",)), Made("b")]
    costs = {"a": {"recipe": 2.0}, "b": {"recipe": 0.5}}
    assert moved(run(components, Table(costs), "fp8", "bf16")) == [("a", "bf16")]


def test_kl_that_is_reached_ends_the_choice() -> None:
    costs = {"a": {"recipe": 0.5}, "b": {"recipe": 0.3}, "c": {"recipe": 0.1}}
    table = Table(costs)
    assert moved(run([*map(Made, costs)], table, "fp8", max_kl=0.4)) == [("a", "fp8")]
    assert len(table.calls) == 1  # what is known is not measured again
    assert moved(run([*map(Made, costs)], table, "fp8", max_kl=1.0)) == []


def test_many_parts_move_several_at_a_time() -> None:
    """And the whole is measured after each round; the last NVFP4 component stays."""
    costs = {f"p{number:02}": {"recipe": 1.0 + number} for number in range(48)}
    table = Table(costs)
    steps = run([*map(Made, costs)], table, "fp8")
    assert [len(step.moved) for step in steps] == [0, *[3] * 15, 2]
    assert list(steps[1].moved) == ["p47", "p46", "p45"]
    assert [len(call) for call in table.calls[:4]] == [49, 1, 8, 1]
    assert steps[-1].kl == pytest.approx(1.0)
    bounded = run([*map(Made, costs)], table, "fp8", bits_per_weight=4.5 + 5 * 3.5 / 48)
    assert [len(step.moved) for step in bounded] == [0, 3, 2]
