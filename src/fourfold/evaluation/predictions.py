# SPDX-License-Identifier: Apache-2.0
"""What a model predicts for windows of text, computed layer by layer.

Every window is an ordinary call of the model, paused before each decoder layer, so neither the
weights of more than one layer nor the logits of more than one window are in memory
(`calibration.streaming`). The logits are, bit for bit, those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.calibration.activations import ActivationStore
from fourfold.calibration.parking import Parking
from fourfold.calibration.reading import reads_text_twice
from fourfold.calibration.streaming import Pass
from fourfold.distributed.machine import memory_available
from fourfold.errors import ModelError
from fourfold.evaluation.loading import OpenedModel
from fourfold.events import OnEvent, WindowEvaluated, ignore
from fourfold.models.internals import runnable

DTYPE = torch.float32
"""Models compute in it: their difference is that of their weights and inputs, not of rounding."""

STATE_BYTES = 24
"""Bytes for each element of the hidden states that a paused call holds at most, usually: hidden
states and embeddings in 32 bits take 8; masks, rotary embeddings and parallel streams the rest."""

OnLogits = Callable[[int, Tensor], None]
"""Called with the number of a window, and its logits [W, V]."""


@dataclass
class Predictor:
    """Runs models over the same windows, one model after the other."""

    ids_NW: Tensor
    models: int
    """How many models will be run."""
    device: str = "cpu"
    activation_memory: int | None = None
    """Bytes of hidden states in memory; None for half of what is free."""
    scratch: Path | None = None
    """The folder of a file for those beyond that; None for the system's temporary folder."""
    on_event: OnEvent = ignore
    _models_done: int = 0
    _passed: int = field(default=0, init=False)

    def run(self, name: str, opened: OpenedModel, on_logits: OnLogits) -> None:
        """Let a model read all windows; `name` is what events call it.

        Raises:
            ModelError: The model does not predict the next token, or fails.
        """
        model = runnable(opened.model)
        check_predicts_text(model)
        layers, count = len(opened.streamed.layers), len(self.ids_NW)
        total, begun = layers * count, self._models_done * layers * count
        layer_now: list[int] = []
        self._passed = 0

        def say() -> None:
            if layer_now:
                done = begun + min(self._passed, total)
                where = layer_now[-1], layers
                self.on_event(WindowEvaluated(name, *where, done, total * self.models))

        def resume(_: int) -> None:
            say()
            self._passed += bool(layer_now)

        def enter(layer: int, _: Pass) -> None:
            layer_now.append(layer)

        calls = [partial(self._call, number, on_logits) for number in range(count)]
        steps = opened.streamed.run(
            calls,
            store=state_store(
                opened, self.ids_NW.numel(), self.device, self.activation_memory, self.scratch
            ),
            on_resume=resume,
            on_layer=enter,
            keep_embeddings=False,
        )
        for _ in steps:
            pass
        self._passed = total
        say()
        self._models_done += 1

    def _call(self, number: int, on_logits: OnLogits, model: Any) -> None:
        ids_BW = self.ids_NW[number][None].to(self.device)
        on_logits(number, runnable(model)(input_ids=ids_BW, use_cache=False).logits[0])


def state_store(
    opened: OpenedModel, tokens: int, device: str, limit: int | None, scratch: Path | None
) -> ActivationStore:
    """Return where hidden states of so many tokens wait: in memory, if they surely fit there.

    Args:
        opened: The model.
        tokens: The number of tokens of all calls together.
        device: The device that the model runs on.
        limit: Bytes of memory for them; None for half of what is free.
        scratch: The folder of a file for those beyond that.
    """
    if limit is None:
        limit = max(memory_available() // 2, 1 << 28)
    likely = STATE_BYTES * tokens * opened.streamed.tree.hidden_size
    if device == "cpu" and likely <= limit:
        return ActivationStore()
    return Parking(limit=limit, folder=scratch)


def check_predicts_text(model: Any) -> None:
    """Raise `ModelError` for a model that has no next token to predict."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ModelError(
            f"{type(model).__name__}: does not predict the next token. Only models that write text "
            "can be measured."
        )
    if reads_text_twice(model):
        raise ModelError(
            f"{type(model).__name__}: reads a text through an encoder, so that it has no "
            "perplexity. Only models that are decoders can be measured."
        )
