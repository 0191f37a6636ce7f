# SPDX-License-Identifier: Apache-2.0
"""Tied embeddings, as a configuration states them.

A tied head computes with the embedding's values, and needs no tensor. Engines follow the
configuration: where it ties the head, they do not read an `lm_head.weight` that is stored all the
same. Whole models and their text models have a field each, and engines differ in which one they
read; a field that config.json lacks takes its class's default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any

import torch

from fourfold.models.internals import default_of

FIELD = "tie_word_embeddings"
_TEXT_MODELS = ("text_config", "llm_config", "language_config", "thinker_config")


class Tie(Enum):
    """Whether a configuration ties the head to the embedding."""

    NO = "no"
    DISPUTED = "disputed"
    """config.json states it for the whole or for the text model, and not for the other."""
    YES = "yes"


def tie_of(config: Mapping[str, Any]) -> Tie:
    """Return whether the configuration in a config.json ties the head to the embedding."""
    parts = [*_with_text_models(config)]
    values = [part.get(FIELD, default_of(part.get("model_type"), FIELD)) for part in parts]
    values = [value for value in values if value is not None]
    if values and all(values):
        return Tie.YES
    return Tie.DISPUTED if any(part.get(FIELD) for part in parts) else Tie.NO


def _with_text_models(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for name in _TEXT_MODELS:
        if isinstance(config.get(name), Mapping):
            yield from _with_text_models(config[name])


def tie(model: Any, stored: Collection[str]) -> None:
    """Tie the parameters of a loaded model, but none of `stored` that has values of its own.

    transformers' `tie_weights` puts the embedding over any head.
    """
    own = {name: model.get_parameter(name) for name in stored}
    model.tie_weights()
    for name, value in own.items():
        if not value.is_meta and not torch.equal(value, model.get_parameter(name)):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, value)
