"""`fourfold generate`: the text of a quantized checkpoint, beside the text of its source.

Both models are run by transformers, one after the other, from the same prompt and with the same
seed: the source as it is, the checkpoint dequantized and, if it is W4A4, with rounded activations.
A model that does not fit into memory is streamed: each token passes the layers one by one as they
are read, and the keys and values of earlier tokens are kept, so the tokens are the same.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch

from fourfold.distributed.machine import choose_device, memory_available
from fourfold.errors import SourceError, UsageError
from fourfold.evaluation.continuation import Sampling, continue_prompt, text_after
from fourfold.evaluation.loading import OpenedModel
from fourfold.evaluation.simulated_activations import check_w4a4
from fourfold.events import OnEvent, TokenGenerated, ignore
from fourfold.layouts import quantization_of
from fourfold.models.tokenizer import load_tokenizer
from fourfold.sources.decoded import DecodedSource, open_decoded
from fourfold.sources.opening import opened
from fourfold.storage.source import Source

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Continuation:
    """The text that one model wrote after the prompt."""

    model: str
    """The checkpoint's folder."""
    text: str
    """Without the prompt and without special tokens."""
    tokens: tuple[int, ...]
    streamed: bool
    """True if the model's layers were loaded one at a time."""
    seconds: float


@dataclass(frozen=True)
class Generation:
    """Both texts. Printing it gives what the command prints."""

    prompt: str
    source: Continuation | None
    """None if no source was given."""
    quantized: Continuation
    simulated: bool
    """True if the quantized model's activations were rounded."""

    @property
    def same_tokens(self) -> int | None:
        """The number of tokens that both begin with; None without a source."""
        if self.source is None:
            return None
        pairs = zip(self.source.tokens, self.quantized.tokens, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"same_tokens": self.same_tokens}

    @property
    def visible_prompt(self) -> str:
        return visible(self.prompt)

    def columns(self) -> list[tuple[str, str, str]]:
        """Return a heading, the model's folder and its text, for each model."""
        how = "activations rounded (W4A4)" if self.simulated else "weights alone"
        ours = (f"quantized, {how}", self.quantized.model, visible(self.quantized.text))
        if self.source is None:
            return [ours]
        return [("source", self.source.model, visible(self.source.text)), ours]

    @property
    def remark(self) -> str:
        """The number of tokens that are the same."""
        if self.source is None:
            return "`source` shows the source's text next to it"
        longer = max(len(self.source.tokens), len(self.quantized.tokens))
        if self.same_tokens == longer:
            return f"all {longer} tokens are the same"
        return f"the first {self.same_tokens} of {longer} tokens are the same"

    def __str__(self) -> str:
        texts = [f"--- {heading}: {model}\n{text}" for heading, model, text in self.columns()]
        return "\n".join([self.visible_prompt, *texts, f"--- {self.remark}"])


def generate(
    out: str | Path,
    prompt: str,
    *,
    source: str | Path | Source | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    simulate_activations: bool | None = None,
    stream: bool | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Generation:
    """Let the quantized checkpoint `out`, and its source if given, continue a prompt.

    Args:
        out: A checkpoint that `load` can read.
        prompt: The beginning of the text, taken as it is.
        source: The checkpoint that `out` was made from.
        max_new_tokens: The most tokens to write.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn.
        seed: Random seed for sampling.
        simulate_activations: Round activations as W4A4 engines do; by default if `out` is W4A4.
        stream: Load one layer at a time; by default if the model does not fit into memory.
        device: cpu, cuda, cuda:N or auto.
        trust_remote_code: Run the Python code that the checkpoints bring.
        on_event: Called with a `TokenGenerated` for every token.

    Raises:
        UsageError: If the options make no sense.
        SourceError, ModelError, ResourceError: If a checkpoint cannot be read or run, or lacks a
            tokenizer.
    """
    _check_options(prompt, max_new_tokens, temperature)
    with closing(open_decoded(out, trust_remote_code=trust_remote_code)) as checkpoint:
        simulated = simulate_activations
        if simulated is None:
            simulated = bool(checkpoint.input_scales)
        if simulated:
            check_w4a4(checkpoint)
        writer = _Writer(
            prompt,
            Sampling(max_new_tokens, temperature, seed),
            load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code),
            choose_device(device),
            stream,
            on_event,
        )
        original = None if source is None else _from_source(writer, source, trust_remote_code)
        quantized = writer.write("quantized", checkpoint, rounded=checkpoint if simulated else None)
    return Generation(prompt, original, quantized, simulated)


def _check_options(prompt: str, max_new_tokens: int, temperature: float) -> None:
    if not prompt:
        raise UsageError("The prompt is empty. Give the beginning of a text.")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}: give at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature {temperature}: give 0, for the likeliest token, or more.")


def _from_source(
    writer: _Writer, model: str | Path | Source, trust_remote_code: bool
) -> Continuation:
    with opened(model, trust_remote_code=trust_remote_code) as source:
        algorithm = quantization_of(source.config)
        if algorithm is not None:
            raise SourceError(
                f"{source.folder}: is quantized already ({algorithm}). Give the checkpoint that "
                "OUT was made from as `source`."
            )
        return writer.write("source", source)


@dataclass(frozen=True)
class _Writer:
    """Lets one model after the other continue the same prompt."""

    prompt: str
    sampling: Sampling
    tokenizer: Any
    device: str
    stream: bool | None
    on_event: OnEvent

    def write(
        self,
        label: Literal["source", "quantized"],
        source: Source,
        *,
        rounded: DecodedSource | None = None,
    ) -> Continuation:
        """Load the model of `source`, let it write, and free its memory.

        rounded: The checkpoint whose input scales round the model's activations, if any.
        """

        def count(tokens: int) -> None:
            self.on_event(TokenGenerated(label, tokens, self.sampling.max_new_tokens))

        def write(model: Any) -> list[int]:
            return continue_prompt(model, self.tokenizer, self.prompt, self.sampling, count)

        begun = time.perf_counter()
        opened_model = OpenedModel(source, device=self.device)
        streamed = self.stream
        if streamed is None:
            streamed = opened_model.nbytes > _available(self.device)
        with opened_model.simulate_activations(rounded) if rounded is not None else nullcontext():
            tokens = _run(opened_model, write, streamed)
        del opened_model
        gc.collect()
        text = text_after(self.tokenizer, self.prompt, tokens)
        seconds = time.perf_counter() - begun
        return Continuation(str(source.folder), text, tuple(tokens), streamed, seconds)


def _run(model: OpenedModel, write: Callable[[Any], list[int]], streamed: bool) -> list[int]:
    """Call `write` with the model, loaded whole or layer by layer."""
    if not streamed:
        return write(model.load())
    results: list[list[int]] = []
    for _ in model.streamed.run([lambda streamed: results.append(write(streamed))]):
        pass
    return results[0]


def _available(device: str) -> int:
    """Bytes that a model may take on the device, with some room left for what it computes."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.9)
    return int(memory_available() * 0.9)


def visible(text: str) -> str:
    """Return `text` with control characters spelled out, since a model may write anything."""
    return "".join(x if x.isprintable() or x in "\n\t" else repr(x)[1:-1] for x in text)
