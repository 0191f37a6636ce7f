# SPDX-License-Identifier: Apache-2.0
"""`fourfold generate`: the text of a quantized checkpoint, beside the text of its source.

Both models are run by transformers, one after the other, from the same prompt and with the same
seed: the source as it is, the checkpoint dequantized and, if it is W4A4, with rounded activations,
and with a rounded KV cache if it asks for one.
A model that does not fit into memory is streamed: each token passes the layers one by one as they
are read, and the keys and values of earlier tokens are kept, so the tokens are the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch

from fourfold.calibration.live import evaluating
from fourfold.distributed.machine import choose_device, memory_available
from fourfold.documents import Shown, document
from fourfold.errors import SourceError, UsageError
from fourfold.evaluation.continuation import (
    Prompt,
    Sampling,
    continue_prompt,
    text_after,
    text_of,
)
from fourfold.evaluation.loading import OpenedModel
from fourfold.evaluation.simulated_activations import check_rounded, is_rounded
from fourfold.events import OnEvent, TokenGenerated, ignore
from fourfold.formats.kv_cache import KVFormat
from fourfold.models.tokenizer import load_tokenizer
from fourfold.sources.decoded import DecodedSource, open_decoded
from fourfold.sources.opening import opened
from fourfold.storage.source import Source
from fourfold.storage.units import printable


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


@dataclass(frozen=True, repr=False)
class Generation(Shown):
    """Both texts. Printing it gives what the command prints."""

    prompt: str
    source: Continuation | None
    """None if no source was given."""
    quantized: Continuation
    simulated: bool
    """True if the inputs of the quantized model's linear layers were rounded."""
    kv_cache: KVFormat | None = None
    """The format that its keys and values were rounded to."""

    @property
    def same_tokens(self) -> int | None:
        """The number of tokens that both begin with; None without a source."""
        if self.source is None:
            return None
        pairs = zip(self.source.tokens, self.quantized.tokens, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return document("generation", **asdict(self), same_tokens=self.same_tokens)

    @property
    def visible_prompt(self) -> str:
        return printable(self.prompt, keep="\n\t")

    def columns(self) -> list[tuple[str, str, str]]:
        """Return a heading, the model's folder and its text, for each model."""
        how = "activations rounded" if self.simulated else "weights alone"
        if self.kv_cache is not None:
            how += f", {self.kv_cache.upper()} KV cache"
        ours = (
            f"quantized, {how}",
            self.quantized.model,
            printable(self.quantized.text, keep="\n\t"),
        )
        if self.source is None:
            return [ours]
        return [("source", self.source.model, printable(self.source.text, keep="\n\t")), ours]

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
    prompt: Prompt,
    sampling: Sampling,
    *,
    source: str | Path | Source | None = None,
    simulate_activations: bool | None = None,
    stream: bool | None = None,
    streamed_tokens: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Generation:
    """Let the quantized checkpoint `out`, and its source, continue `prompt`; see `api.generate`.

    For a prompt of ids, `out` needs no tokenizer. A model that is streamed, which reads all of its
    weights for each token, writes `streamed_tokens` at most.
    """
    if not prompt:
        raise UsageError("The prompt is empty. Give the beginning of a text.")
    with closing(open_decoded(out, trust_remote_code=trust_remote_code)) as checkpoint:
        simulated = simulate_activations
        if simulated is None:
            simulated = is_rounded(checkpoint)
        if simulated:
            check_rounded(checkpoint)
        tokenizer = _tokenizer(checkpoint, prompt, trust_remote_code)
        fewer = replace(sampling, max_new_tokens=streamed_tokens or sampling.max_new_tokens)
        writer = _Writer(
            prompt, sampling, fewer, tokenizer, choose_device(device), stream, on_event
        )
        original = None
        if source is not None:
            with opened(source, trust_remote_code=trust_remote_code) as unquantized:
                original = writer.write("source", unquantized)
        quantized = writer.write("quantized", checkpoint, rounded=checkpoint if simulated else None)
        if original is not None and quantized.streamed and not original.streamed:
            original = writer.cut(original, fewer.max_new_tokens)
        rounds_inputs = simulated and bool(checkpoint.input_roundings)
    text, kv_cache = text_of(tokenizer, prompt), next(iter(writer.kv_formats), None)
    return Generation(text, original, quantized, rounds_inputs, kv_cache)


def _tokenizer(checkpoint: DecodedSource, prompt: Prompt, trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    except SourceError:
        if isinstance(prompt, str):
            raise
        return None


@dataclass(frozen=True)
class _Writer:
    """Lets one model after the other continue the same prompt."""

    prompt: Prompt
    sampling: Sampling
    streamed_sampling: Sampling
    """The settings for a model that is streamed."""
    tokenizer: Any
    device: str
    stream: bool | None
    on_event: OnEvent
    kv_formats: list[KVFormat] = field(default_factory=list)
    """The format that keys and values were rounded to, once `write` has done so."""

    def write(
        self,
        label: Literal["source", "quantized"],
        source: Source,
        *,
        rounded: DecodedSource | None = None,
    ) -> Continuation:
        """Load the model of `source`, let it write, and free its memory.

        rounded: The checkpoint whose scales round the model's activations, if any.
        """
        begun, written = time.perf_counter(), list[int]()

        def write(model: Any, sampling: Sampling = self.sampling) -> None:
            def count(tokens: int) -> None:
                self.on_event(TokenGenerated(label, tokens, sampling.max_new_tokens))

            written.extend(continue_prompt(model, self.tokenizer, self.prompt, sampling, count))

        if source.model is None:
            streamed = self._run(source, rounded, write)
        else:
            streamed = False
            with evaluating(source.model):
                write(source.model)
        gc.collect()
        text = text_after(self.tokenizer, self.prompt, written)
        seconds = time.perf_counter() - begun
        return Continuation(str(source.folder), text, tuple(written), streamed, seconds)

    def cut(self, continuation: Continuation, tokens: int) -> Continuation:
        """Return the beginning of what a model wrote."""
        written = continuation.tokens[:tokens]
        text = text_after(self.tokenizer, self.prompt, written)
        return replace(continuation, text=text, tokens=written)

    def _run(
        self, source: Source, rounded: DecodedSource | None, write: Callable[..., None]
    ) -> bool:
        """Call `write` with the model of `source`; return True if it was streamed."""
        opened_model = OpenedModel(source, device=self.device)
        streamed = self.stream
        if streamed is None:
            streamed = opened_model.nbytes > _available(self.device)
        with ExitStack() as stack:
            if rounded is not None:
                simulation = stack.enter_context(opened_model.simulate_activations(rounded))
                if (kv_cache := simulation.sites.kv_cache) is not None:
                    self.kv_formats.append(kv_cache.format)
            if streamed:
                for _ in opened_model.streamed.run(
                    [partial(write, sampling=self.streamed_sampling)]
                ):
                    pass
            else:
                write(opened_model.load())
        return streamed


def _available(device: str) -> int:
    """Bytes that a model may take on the device, with some room left for what it computes."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.9)
    return int(memory_available() * 0.9)
