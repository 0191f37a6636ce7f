# SPDX-License-Identifier: Apache-2.0
"""Choose which components of a model are stored in a larger format: greedily, by KL for each byte.

A **move** stores one component as another option. In a round, moves are measured: the KL of the
whole model after each of them alone. Then the moves that save most KL for each byte they add are
made, one for every sixteen components. Components do not add up (their sum is half as much again as
the whole), so what is left is measured again in the next round: of all moves those that looked best
when they were measured last, and all of them where none of these helps any more.

A move adds bytes, but for those from the recipe's own option to `w4a16`, which are free and come
first where they help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fourfold.recipes.budget import AS_RECIPE

Options = Mapping[str, str]
"""By a component's name, its option."""

Measure = Callable[[Sequence[Options]], Sequence[float]]
"""Returns the KL of the whole model with components in these options, for each of several
choices."""

COMPONENTS_A_MOVE = 16
"""A round makes one move for every so many components, and at least one."""

LEAST_MEASURED = 8
"""The moves that a round measures, at least: twice as many as it makes, if that is more."""


class Promotable(Protocol):
    """What is stored in one format."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def numel(self) -> int:
        """The number of its weights."""

    def has(self, option: str) -> bool:
        """True if it can be stored so."""

    def nbytes(self, option: str) -> int:
        """Return the bytes that it takes then."""

    def is_nvfp4(self, option: str) -> bool:
        """True if its weights are NVFP4 then."""


@dataclass(frozen=True)
class Step:
    """A point of the curve."""

    moved: Options
    """The components that have another option than in the step before."""
    bits: float
    """Bits for each weight of all components, scales included."""
    kl: float
    """KL of the whole model."""


@dataclass
class Promotion:
    """The choice while it is made."""

    components: Sequence[Promotable]
    candidates: Sequence[str]
    measure: Measure
    bits_per_weight: float | None = None
    """The most bits for each weight; None for no limit."""
    max_kl: float | None = None
    """The KL that ends the choice; None for none."""
    steps: list[Step] = field(default_factory=list, init=False)
    """The curve, from the recipe's own options on."""
    first: dict[tuple[str, str], float] = field(default_factory=dict, init=False)
    """By component and option, the KL of the whole model after this move alone: the first round."""
    _options: dict[str, str] = field(default_factory=dict, init=False)
    _gains: dict[tuple[str, str], float] = field(default_factory=dict, init=False)
    """By move, the KL that it saved when it was measured last."""

    def __post_init__(self) -> None:
        self._components = {component.name: component for component in self.components}
        self._options = dict.fromkeys(self._components, AS_RECIPE)
        self._numel = sum(component.numel for component in self.components)
        self._a_round = max(1, len(self.components) // COMPONENTS_A_MOVE)

    def run(self) -> list[Step]:
        """Make moves until the budget is spent, or the KL is reached, or none helps."""
        moves = self._moves()
        kl, *after = self.measure([self._options, *map(self._after, moves)])
        self.first = dict(zip(moves, after, strict=True))
        self._note(moves, after, kl)
        self.steps.append(Step({}, self.bits, kl))
        chosen = self._best(moves)
        while chosen and not self._is_reached(kl):
            expected = kl - self._gains[chosen[0]]
            self._options |= dict(chosen)
            kl = expected if len(chosen) == 1 else self.measure([self._options])[0]
            self.steps.append(Step(dict(chosen), self.bits, kl))
            if not self._is_reached(kl):
                chosen = self._next(kl)
        return self.steps

    @property
    def nbytes(self) -> int:
        """Bytes of all components now."""
        return sum(component.nbytes(self._options[component.name]) for component in self.components)

    @property
    def bits(self) -> float:
        """Bits for each weight now."""
        return 8 * self.nbytes / self._numel

    def _is_reached(self, kl: float) -> bool:
        return self.max_kl is not None and kl <= self.max_kl

    def _moves(self) -> list[tuple[str, str]]:
        """The moves that are possible now: component and option."""
        moves = []
        for component in self.components:
            now = self._options[component.name]
            for option in self.candidates:
                is_larger = now == AS_RECIPE or component.nbytes(option) > component.nbytes(now)
                if option != now and component.has(option) and is_larger:
                    moves.append((component.name, option))
        return [
            move for move in moves if self._fits(self._added(*move)) and self._has_nvfp4([move])
        ]

    def _has_nvfp4(self, moves: Iterable[tuple[str, str]]) -> bool:
        """True if some weights are NVFP4 after these moves, which engines expect."""
        options = self._options | dict(moves)
        return any(component.is_nvfp4(options[component.name]) for component in self.components)

    def _fits(self, added: int) -> bool:
        if self.bits_per_weight is None:
            return True
        return 8 * (self.nbytes + added) <= self.bits_per_weight * self._numel

    def _added(self, name: str, option: str) -> int:
        """Bytes that a move adds; the scale of an input that is not rounded any more is none."""
        component = self._components[name]
        return max(0, component.nbytes(option) - component.nbytes(self._options[name]))

    def _after(self, move: tuple[str, str]) -> Options:
        return self._options | dict([move])

    def _note(self, moves: Sequence[tuple[str, str]], after: Sequence[float], kl: float) -> None:
        self._gains |= {move: kl - other for move, other in zip(moves, after, strict=True)}

    def _worth(self, move: tuple[str, str]) -> tuple[float, float]:
        """How good a move is: KL for each byte, and KL."""
        gain, added = self._gains[move], self._added(*move)
        if gain <= 0:
            return -math.inf, gain
        return (gain / added if added else math.inf), gain

    def _next(self, kl: float) -> list[tuple[str, str]]:
        """Measure the moves that look best, or else all, and return those to make."""
        moves = sorted(self._moves(), key=self._worth, reverse=True)
        looking_best = moves[: max(LEAST_MEASURED, 2 * self._a_round)]
        for measured in (looking_best, moves[len(looking_best) :]):
            if not measured:
                continue
            self._note(measured, self.measure([*map(self._after, measured)]), kl)
            if chosen := self._best(measured):
                return chosen
        return []

    def _best(self, moves: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """The best of some moves that were measured, as many as a round makes, and fit together."""
        chosen: dict[str, str] = {}
        added = 0
        for name, option in sorted(moves, key=self._worth, reverse=True):
            if self._gains[name, option] <= 0 or len(chosen) == self._a_round:
                break
            more = self._added(name, option)
            makes_sense = name not in chosen and self._has_nvfp4([*chosen.items(), (name, option)])
            if makes_sense and self._fits(added + more):
                chosen[name] = option
                added += more
        return list(chosen.items())
