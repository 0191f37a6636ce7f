# SPDX-License-Identifier: Apache-2.0
"""The one way in which fourfold lets a model write text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import torch

from fourfold.errors import ModelError, UsageError
from fourfold.models.internals import quiet, runnable


@dataclass(frozen=True)
class Sampling:
    """The settings of generation: the number of tokens, and how they are chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token; above 0, tokens are drawn from the whole distribution."""
    seed: int = 0
    """Random seed for sampling."""

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {self.max_new_tokens}: give at least 1.")
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"temperature {self.temperature}: give 0, for the likeliest token, or more."
            )


Prompt = str | Sequence[int]
"""The beginning of a text: the text, or its token ids."""


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    sampling: Sampling,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Return the tokens that `model` puts after `prompt`.

    The `top_p`, `top_k` and temperature of the model's own generation settings do not count.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer; None will do for ids.
        prompt: The beginning of the text.
        sampling: How the tokens are chosen.
        on_token: Called with the number of tokens written so far, first with 0.

    Raises:
        ModelError: If the model does not write text.
        UsageError: If the prompt has no token.
    """
    model = runnable(model)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ModelError(f"{type(model).__name__}: a model that does not write text.")
    input_ids = torch.tensor([token_ids(tokenizer, prompt)], device=model.device)
    if not input_ids.numel():
        raise UsageError("The prompt has no token. Give the beginning of a text.")
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        options = {"do_sample": True, **drawn}
    pad = _pad(tokenizer)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), quiet():
        torch.manual_seed(sampling.seed)
        ids = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            streamer=None if on_token is None else _Counter(on_token),
            **options,
        )[0].tolist()
    if model.config.is_encoder_decoder:
        # A decoder is given one token to begin with.
        return list(dropwhile(lambda token: token == pad, ids[1:]))
    return list(ids[input_ids.shape[1] :])


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt."""
    return list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)


def text_of(tokenizer: Any, prompt: Prompt) -> str:
    """Return a prompt as text, without leading pads and special tokens.

    Without a tokenizer, the ids themselves are the text.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        return " ".join(map(str, prompt))
    pad = _pad(tokenizer)
    ids = list(dropwhile(lambda token: token == pad, prompt))
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _pad(tokenizer: Any) -> int | None:
    """Return the id for padding: the end of text where there is none of its own."""
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    return getattr(tokenizer, "eos_token_id", None) if pad is None else pad


def text_after(tokenizer: Any, prompt: Prompt, new_tokens: Sequence[int]) -> str:
    """Return new tokens as text that reads on from the prompt, without special tokens."""
    if tokenizer is None:
        return text_of(None, new_tokens)
    prompt_tokens = token_ids(tokenizer, prompt)
    before = tokenizer.decode(prompt_tokens, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_tokens, *new_tokens], skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True))


class _Counter:
    """A streamer for transformers, which gives it the prompt and then each token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.count = on_token, -1

    def put(self, _: Any) -> None:
        self.count += 1
        self.on_token(self.count)

    def end(self) -> None:
        """Required by transformers."""
