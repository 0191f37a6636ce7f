# SPDX-License-Identifier: Apache-2.0
"""Spend the budget of a recipe: measure its components, and give rules to those that are promoted.

    recipe with a budget ─▶ plan ─▶ components ─▶ rounds of `planning.promotion`, each measured by
                                             `evaluation.variants` ─▶ recipe with rules by name

The calibration text is read in two halves, sample by sample in turn. The choice is
made on the one, and the curve is measured again on the other. Ranks share the variants of each
round, and all make the same choice from the figures of all. A run that resumes takes the choice of
the run that it resumes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fourfold.calibration.data import CalibrationData
from fourfold.config import Runtime
from fourfold.distributed.ranks import Ranks
from fourfold.errors import RecipeError, UsageError
from fourfold.evaluation.sensitivity import MULTIPLY_ADDS, cost_of_token, tokens_within
from fourfold.evaluation.variants import Variants, check_memory
from fourfold.events import BudgetSpent, OnEvent, ignore
from fourfold.planning import Plan, make_plan
from fourfold.planning.components import Component, components_of, promoted, title_of
from fourfold.planning.promotion import Options, Promotion, Step
from fourfold.recipes import Budget, Recipe
from fourfold.recipes.budget import AS_RECIPE
from fourfold.run.preflight import check_output_fits
from fourfold.run.resume import calibration_threads
from fourfold.run.strategies import Observation, load_data
from fourfold.storage.output import OutputFolder
from fourfold.storage.quant_summary import BudgetComponent, BudgetEntry, BudgetStep
from fourfold.storage.source import Source

PASSES = 3
"""How often as much as the first round all rounds together cost, about."""

LEAST_TOKENS = 1024
"""Beside the errors of all other components, a few hundred tokens say nothing of one of them."""


@dataclass(frozen=True)
class Spent:
    """The recipe that is carried out, and what a budget was spent on."""

    recipe: Recipe
    entry: BudgetEntry | None = None
    """None if the recipe has no budget."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that resumes must find unchanged, and takes from here."""
        return {} if self.entry is None else {"budget": self.entry.to_dict()}


def spend_budget(
    recipe: Recipe,
    source: Source,
    folder: OutputFolder,
    ranks: Ranks,
    observation: Observation,
    runtime: Runtime,
    on_event: OnEvent = ignore,
) -> Spent:
    """Return the recipe with rules for the components that its budget is spent on.

    Args:
        recipe: What the caller asked for; returned as it is if it has no budget.
        source: The open checkpoint.
        folder: OUT, which may hold a run that is resumed.
        ranks: All of them call this.
        observation: The calibration text, and the device.
        runtime: The threads, and whether shards of a model on the hub are kept.
        on_event: Called with `WindowEvaluated`, and with `BudgetSpent` in the end.

    Raises:
        RecipeError: The budget is less than the recipe takes, or its KL is not reached.
        ResourceError: The disk has no room even for what the rules alone write, or the variants
            of a layer do not fit into memory.
        UsageError: The model is in memory, its shards are deleted once they are quantized, or there
            is no calibration text to measure on.
        FourfoldError: The model cannot be read, planned or run.
    """
    budget = recipe.budget
    if budget is None:
        return Spent(recipe)
    if source.model is not None:
        raise UsageError(
            f"recipe {recipe.name}: its budget is spent by running the model layer by layer, which "
            "is not possible with a model in memory. Save the model with `save_pretrained`, and "
            "quantize the folder."
        )
    if observation.config.statistics is not None:
        raise UsageError(
            f"recipe {recipe.name}: its budget is spent by what is measured on calibration text, "
            "not on `statistics`. Give `calib` instead, or leave it out."
        )
    plan = make_plan(source, recipe)
    _check_stays(source, plan, folder, runtime.keep_source)
    check_output_fits(plan, folder)  # what is chosen takes no less, and choosing may take hours
    check_memory(plan, observation.device, processes=ranks.local_size)
    components = components_of(plan)
    _check_bits(plan, components, budget)
    data = load_data(plan, source, replace(observation, on_event=ignore))
    tokens = budget.tokens or _affordable(_cost_of_token(plan, components, budget))
    texts = split_texts(data, tokens)
    entry = _of_earlier_run(folder, ranks, recipe, texts)
    if entry is None:
        with _threads(calibration_threads(folder, ranks, runtime.threads)):
            measuring = _Measuring(plan, source, components, texts, ranks, observation, on_event)
            entry = measuring.choose(budget, data.origin)
    options = {component.name: component.option for component in entry.components}
    first, last = entry.curve[0], entry.curve[-1]
    moved = sum(option != AS_RECIPE for option in options.values())
    on_event(BudgetSpent(moved, len(components), first.bits, last.bits, first.kl, last.kl))
    return Spent(promoted(plan, options, components), entry)


def _check_stays(source: Source, plan: Plan, folder: OutputFolder, keep: bool | None) -> None:
    """Raise `UsageError` for a model on the hub whose shards will be there only once."""
    source.fetching.settle(folder.folder, plan.nbytes_after + plan.side_files.nbytes, keep)
    if source.fetching.is_transient:
        raise UsageError(
            f"recipe {plan.recipe.name}: its budget is spent by running the model several times, "
            "and its shards would be deleted once they are quantized. Give `keep_source=True`."
        )


def _check_bits(plan: Plan, components: Sequence[Component], budget: Budget) -> None:
    """Raise `RecipeError` if the recipe's own rules take more than the budget."""
    numel = sum(component.numel for component in components)
    bits = 8 * sum(component.nbytes(AS_RECIPE) for component in components) / max(numel, 1)
    if budget.bits_per_weight is not None and bits > budget.bits_per_weight:
        raise RecipeError(
            f"recipe {plan.recipe.name}: budget.bits_per_weight: {budget.bits_per_weight:g} is "
            f"less than its own rules take, {bits:.3f}. Give more."
        )


def budget_operations(plan: Plan) -> float:
    """Return about how many operations of matrix products the choice for a budget takes, two for a
    multiplication and an addition; 0 without a budget."""
    budget = plan.recipe.budget
    if budget is None:
        return 0.0
    cost = _cost_of_token(plan, components_of(plan), budget)
    return 2 * PASSES * cost * (budget.tokens or _affordable(cost))


def _cost_of_token(plan: Plan, components: Sequence[Component], budget: Budget) -> float:
    """The multiply-adds of a token in the first round."""
    varied = [
        component
        for component in components
        for option in budget.candidates
        if component.has(option)
    ]
    return cost_of_token(plan, varied)


def _affordable(cost: float) -> int:
    """How many tokens each measurement reads, by what one costs in the first round."""
    return max(LEAST_TOKENS, tokens_within(cost, MULTIPLY_ADDS / PASSES))


Texts = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Windows that the choice is made on, and others."""


def split_texts(data: CalibrationData, tokens: int) -> Texts:
    """Return windows to choose on, and others to report, of `tokens` tokens each at most.

    Samples go to both in turn; a single one is cut into halves. Padding is left out.
    """
    samples = [
        ids_S[mask_S.bool()]
        for batch in data.batches
        for ids_S, mask_S in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    samples = [sample for sample in samples if len(sample) > 1]
    if len(samples) == 1:
        samples = list(samples[0].chunk(2))
    halves = [_cut(samples[start::2], tokens) for start in (0, 1)]
    if not all(halves):
        raise UsageError(
            f"{data.origin}: {data.tokens:,} tokens are too few to choose by and to measure the "
            "choice on others. Give more calibration text."
        )
    return halves[0], halves[1]


def _cut(samples: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first `tokens` tokens of some samples; a rest of one token is left out."""
    windows = []
    for sample in samples:
        window = sample[:tokens]
        tokens -= len(window)
        if len(window) > 1:
            windows.append(window)
    return windows


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let PyTorch compute with so many threads, on which the last digits depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_earlier_run(
    folder: OutputFolder, ranks: Ranks, recipe: Recipe, texts: Texts
) -> BudgetEntry | None:
    """Return the choice of the run that can be resumed, of whichever rank has one.

    Raises:
        OutputError: It was given another recipe.
    """
    wanted = as_json(recipe)
    stored = _stored_entry(folder)
    if stored is not None and stored.get("recipe") != wanted:
        identity = deepcopy(folder.state.identity or {})
        identity["calibration"]["budget"]["recipe"] = wanted
        folder.check_resumable(identity)
    for entry in ranks.gather(stored):
        if entry is not None:
            earlier = BudgetEntry.model_validate_json(json.dumps(entry))
            if (earlier.tokens, earlier.other_tokens) == tuple(map(_count, texts)):
                return earlier
    return None


def _stored_entry(folder: OutputFolder) -> dict[str, Any] | None:
    """What an unfinished run in a folder has spent its budget on."""
    if folder.overwrite or not folder.state.has_finished_shards:
        return None
    calibration = (folder.state.identity or {}).get("calibration")
    entry = calibration.get("budget") if isinstance(calibration, dict) else None
    return entry if isinstance(entry, dict) else None


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON holds it."""
    values: dict[str, Any] = json.loads(json.dumps(recipe.model_dump(mode="json")))
    return values


def _count(windows: Sequence[Tensor]) -> int:
    return sum(map(len, windows))


class _Measuring:
    """Measures the choices of a model's components, on all ranks."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        components: Sequence[Component],
        texts: Texts,
        ranks: Ranks,
        observation: Observation,
        on_event: OnEvent,
    ) -> None:
        self.plan, self.components, self.texts, self.ranks = plan, components, texts, ranks
        self.round = 0
        self._on, self._beside = (
            Variants(
                plan,
                source,
                components,
                windows,
                device=observation.device,
                threads=torch.get_num_threads(),
                activation_memory=observation.config.activation_memory,
                on_event=on_event,
            )
            for windows in texts
        )

    def choose(self, budget: Budget, origin: str) -> BudgetEntry:
        """Spend the budget; `origin` names the text."""
        promotion = Promotion(
            self.components,
            budget.candidates,
            self._measure,
            budget.bits_per_weight,
            budget.max_kl,
        )
        steps = promotion.run()
        self._check_reached(budget, steps)
        steps = steps[: 1 + min(range(len(steps)), key=lambda n: (steps[n].kl, n))]
        points = list(self._points(steps))
        others = self._shared(self._beside, points, "the curve")
        return BudgetEntry(
            recipe=as_json(self.plan.recipe),
            text=origin,
            tokens=_count(self.texts[0]),
            other_tokens=_count(self.texts[1]),
            curve=tuple(
                BudgetStep(moved=dict(step.moved), bits=step.bits, kl=step.kl, other_kl=other)
                for step, other in zip(steps, others, strict=True)
            ),
            components=tuple(
                BudgetComponent(
                    name=component.name,
                    role=component.role.value,
                    layer=component.layer,
                    weights=component.numel,
                    option=points[-1][component.name],
                    format=title_of(points[-1][component.name], component),
                    kl={
                        option: promotion.first[component.name, option]
                        for option in budget.candidates
                        if (component.name, option) in promotion.first
                    },
                )
                for component in self.components
            ),
        )

    def _check_reached(self, budget: Budget, steps: Sequence[Step]) -> None:
        least = min(step.kl for step in steps)
        if budget.max_kl is not None and least > budget.max_kl:
            raise RecipeError(
                f"recipe {self.plan.recipe.name}: budget.max_kl: {budget.max_kl:g} is not reached; "
                f"the least that {', '.join(budget.candidates)} give is {least:.3g}. Give more, or "
                "other candidates."
            )

    def _points(self, steps: Sequence[Step]) -> Iterator[Options]:
        """The options of all components at each step."""
        options = {component.name: AS_RECIPE for component in self.components}
        for step in steps:
            options |= step.moved
            yield dict(options)

    def _measure(self, choices: Sequence[Options]) -> list[float]:
        self.round += 1
        return self._shared(self._on, choices, f"budget, round {self.round}")

    def _shared(self, variants: Variants, choices: Sequence[Options], what: str) -> list[float]:
        """KL of some choices; each rank measures some of them."""
        mine = choices[self.ranks.rank :: self.ranks.size]
        measured = variants.measure(mine, what) if mine else []
        by_rank = self.ranks.gather([x.kl_mean for x in measured])
        return [by_rank[n % self.ranks.size][n // self.ranks.size] for n in range(len(choices))]
