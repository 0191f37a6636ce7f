# SPDX-License-Identifier: Apache-2.0
"""How a model reads calibration data while observers are attached.

Shared by the layer-by-layer run (`layerwise`) and by models that are live in memory (`live`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from fourfold.calibration.data import Batch
from fourfold.calibration.observers import Observers
from fourfold.errors import PlanError
from fourfold.models.expert_hooks import unwatchable
from fourfold.models.internals import output_embeddings, runnable
from fourfold.models.module_tree import ModuleTree
from fourfold.planning import Plan
from fourfold.statistics import KEPT


@contextmanager
def observing(
    plan: Plan, model: Any, tree: ModuleTree, *, large: bool = True
) -> Iterator[Observers]:
    """Attach observers to a model at every site that the plan observes.

    `large`: False to leave out the statistics that are dropped with their layer.

    Raises:
        PlanError: The recipe shows every token to every expert, and a class of experts cannot.
    """
    modules, statistics = {linear.module for linear in plan.observed}, plan.statistics
    if plan.recipe.calibration.propagate == "quantized":
        modules |= {linear.module for linear in plan.linears if plan.scheme_of(linear).activations}
        layers = tuple(f"{layer}." for layer in tree.layers)
        statistics = {  # those of layers are measured before each stage
            site: names & KEPT if site.startswith(layers) else names
            for site, names in statistics.items()
        }
    if not large:
        statistics = {site: names & KEPT for site, names in statistics.items()}
    experts = {path: tree.experts[path] for path in sorted(modules & tree.experts.keys())}
    linears = sorted(modules - experts.keys())
    all_experts = plan.recipe.calibration.all_experts
    if all_experts and (without := unwatchable(model, experts)):
        raise PlanError(
            f"{without[0]}: calibration.all_experts is not possible for a "
            f"{type(model.get_submodule(without[0])).__name__}. Leave it out of the recipe."
        )
    observers = Observers(
        model,
        experts,
        linears,
        all_experts=all_experts,
        statistics=statistics,
        large_on_cpu=plan.is_live,
    )
    with observers.attached():
        yield observers


def read_batch(model: Any, batch: Batch, device: torch.device, cache: Any = None) -> None:
    """Call a model (the part that is `runnable`) on a batch, with a cache of keys and values."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "use_cache": cache is not None,
    }
    if reads_text_twice(model):
        canvas = getattr(model.config, "canvas_length", None)
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :canvas]
    if cache is not None:
        inputs["past_key_values"] = cache
    with suppress(AtTheHeadError):
        model(**inputs)


def reads_text_twice(model: Any) -> bool:
    """True if a decoder embeds the text besides an encoder."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


class AtTheHeadError(Exception):
    """Everything that is observed has been computed, so the call can end."""


@contextmanager
def ending_at_the_head(model: Any) -> Iterator[None]:
    """End calls of the model by `AtTheHeadError` instead of computing logits.

    Calibration needs no logits, and they can be larger than everything else.
    """

    def end(_: nn.Module, __: Any) -> None:
        raise AtTheHeadError

    head = output_embeddings(runnable(model))
    with nullcontext() if head is None else head.register_forward_pre_hook(end):
        yield
