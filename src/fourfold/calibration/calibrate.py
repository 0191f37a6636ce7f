"""Run the calibration data through a checkpoint's model, layer by layer, and take statistics.

    with calibrating(plan, source, data) as run:
        for layer in run.units():      # this layer is loaded, and its statistics are complete
            …quantize and write it; run.held has its raw tensors in memory…

The model itself is never in memory: see `models.streaming`. Logits are not needed and can be
larger than everything else, so a call ends at the door of the output embeddings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourfold.calibration.data import Batch, CalibrationData
from fourfold.calibration.kv_cache import recording_cache
from fourfold.calibration.observers import Observers
from fourfold.calibration.scales import ActivationScales, model_summary
from fourfold.calibration.statistics import Statistics, data_summary
from fourfold.checkpoints.held import HeldTensors
from fourfold.checkpoints.source import Source
from fourfold.errors import ModelError, PlanError
from fourfold.models.internals import output_embeddings, runnable
from fourfold.models.module_tree import ModuleTree
from fourfold.models.parking import Parking
from fourfold.models.streaming import StreamedModel
from fourfold.models.watching import unwatchable
from fourfold.planning import Plan


@dataclass(frozen=True)
class CalibrationProgress:
    """A layer was run."""

    layer: int
    layers: int
    tokens: int


@contextmanager
def observing(plan: Plan, model: Any, tree: ModuleTree) -> Iterator[Observers]:
    """Observers at every input site of `plan`, attached to a model."""
    modules = {linear.module for linears in plan.sites.values() for linear in linears}
    experts = {path: tree.experts[path] for path in sorted(modules & tree.experts.keys())}
    linears = sorted(modules - experts.keys())
    all_experts = plan.recipe.calibration.all_experts
    if all_experts and (without := unwatchable(model, experts)):
        raise PlanError(
            f"{without[0]}: calibration.all_experts is not possible for a "
            f"{type(model.get_submodule(without[0])).__name__}. Leave it out of the recipe."
        )
    observers = Observers(model, experts, linears, all_experts=all_experts)
    with observers.attached():
        yield observers


class Calibration:
    """One pass of calibration data through a streamed model."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        data: CalibrationData,
        *,
        device: str = "cpu",
        activation_memory: int | None = None,
        scratch: Path | None = None,
        threads: int | None = None,
        trust_remote_code: bool = False,
        progress: Callable[[CalibrationProgress], None] | None = None,
    ) -> None:
        """activation_memory: bytes of waiting activations in memory; the rest goes to `scratch`.

        threads: PyTorch's, while the model runs.
        """
        self.threads = threads
        self.plan, self.data, self.progress = plan, data, progress
        self.streamed = StreamedModel(
            source, device=device, head=False, trust_remote_code=trust_remote_code
        )
        self.parking = Parking(limit=activation_memory, folder=scratch)
        all_experts = plan.recipe.calibration.all_experts
        summary = data_summary(data, all_experts=all_experts)
        self.statistics = Statistics(summary, model=model_summary(plan))
        self.scales = ActivationScales(plan, self.statistics)

    @property
    def held(self) -> HeldTensors:
        """The source, with the present layer's tensors in memory."""
        return self.streamed.held

    def units(self) -> Generator[int | None]:
        """Run everything; yields each layer when its statistics are complete, then the shell."""
        model, tree = self.streamed.model, self.streamed.tree
        done: set[int] = set()
        with ExitStack() as stack:
            if self.threads is not None:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.threads)
            observers = stack.enter_context(observing(self.plan, model, tree))
            stack.enter_context(ending_at_the_head(model))
            self._present = 0
            calls = [partial(self._call, observers, batch) for batch in self.data.batches]
            steps = self.streamed.run(
                calls,
                parking=self.parking,
                on_resume=lambda number: observers.see(self.data.batches[number].attention_mask),
                on_layer=self._enter,
                keep_shell=_has_decoder_inputs(runnable(model)),
            )
            stack.callback(steps.close)
            for layer in steps:
                if layer in done:
                    raise ModelError(
                        f"{tree.layers[layer]}: a text passes it more than once; such models "
                        "cannot be calibrated layer by layer."
                    )
                done.add(layer)
                observers.take(self.statistics)
                self.scales.check(layer)
                if self.progress is not None:
                    self.progress(CalibrationProgress(layer, len(tree.layers), self.data.tokens))
                yield layer
            observers.take(self.statistics)
        for layer in sorted(set(range(len(tree.layers))) - done):
            self.scales.check(layer)
            yield layer
        self.scales.check(None)
        yield None

    def _enter(self, layer: int) -> None:
        self._present = layer

    def _call(self, observers: Observers, batch: Batch, model: Any) -> None:
        model = runnable(model)
        inputs = call_inputs(model, batch, self.streamed.device)
        if self.plan.kv_scales:
            paths = self.streamed.tree.layers

            def record(keys: torch.Tensor, values: torch.Tensor) -> None:
                observers.see_kv(paths[self._present], keys, values)

            inputs |= {"past_key_values": recording_cache(model, record), "use_cache": True}
        with suppress(AtTheHeadError):
            model(**inputs)


def call_inputs(model: Any, batch: Batch, device: torch.device) -> dict[str, Any]:
    """What a model (`runnable`) is called with, to read a batch."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "use_cache": False,
    }
    if _has_decoder_inputs(model):
        canvas = getattr(model.config, "canvas_length", None)
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :canvas]
    return inputs


def _has_decoder_inputs(model: Any) -> bool:
    """Whether a decoder reads the text beside an encoder, so that it is embedded twice."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


class AtTheHeadError(Exception):
    """Everything that is observed was computed: the call may end."""


@contextmanager
def ending_at_the_head(model: Any) -> Iterator[None]:
    """Within, calls of the model raise `AtTheHeadError` where logits would be computed."""

    def end(_: nn.Module, __: Any) -> None:
        raise AtTheHeadError

    head = output_embeddings(runnable(model))
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(end)
    try:
        yield
    finally:
        hook.remove()
