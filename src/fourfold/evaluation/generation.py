"""What a checkpoint writes, beside what its source writes: `fourfold generate` prints this.

Both models are run by transformers, one after the other, from the same prompt and with the same
seed: the source as it is, the checkpoint dequantized and, where it is W4A4, with rounded
activations. A model that does not fit into memory is streamed: each token passes the layers one
by one as they are read, and the keys and values of earlier tokens are kept, so what it writes is
the same. Greedy by default; at a temperature, every token is drawn from the whole distribution.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fourfold.distributed.machine import choose_device, memory_available
from fourfold.errors import ModelError, SourceError, UsageError
from fourfold.evaluation.loading import OpenedModel
from fourfold.evaluation.simulation import Simulation, check_w4a4
from fourfold.events import OnEvent, TokenGenerated, ignore
from fourfold.layouts import quantization_of
from fourfold.models.internals import quiet, runnable
from fourfold.models.tokenizer import load_tokenizer
from fourfold.sources.decoded import DecodedSource, open_decoded
from fourfold.sources.opening import opened
from fourfold.storage.source import Source
from fourfold.storage.units import plain

MAX_NEW_TOKENS = 64

Label = Literal["source", "quantized"]


@dataclass(frozen=True)
class Continuation:
    """What one model wrote."""

    model: str
    """The checkpoint's folder."""
    text: str
    """Without the prompt and without special tokens."""
    tokens: tuple[int, ...]
    streamed: bool
    """Whether its layers were loaded one at a time."""
    seconds: float


@dataclass(frozen=True)
class Generation:
    """Both texts. Prints as the command prints."""

    prompt: str
    source: Continuation | None
    """None where no source was given."""
    quantized: Continuation
    simulated: bool
    """Whether the quantized model's activations were rounded, too."""

    @property
    def same_tokens(self) -> int | None:
        """How many tokens both begin with alike; None without a source."""
        if self.source is None:
            return None
        pairs = enumerate(zip(self.source.tokens, self.quantized.tokens, strict=False))
        shorter = min(len(self.source.tokens), len(self.quantized.tokens))
        return next((at for at, (one, other) in pairs if one != other), shorter)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"same_tokens": self.same_tokens}

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="", expand=True)
        texts = [part for part in (self.source, self.quantized) if part is not None]
        for part in texts:
            table.add_column(self._heading(part), ratio=1, overflow="fold", vertical="top")
        table.add_row(*(_visible(part.text) for part in texts))
        return Group(_visible(self.prompt), Text(), table, Text(), Text(self._remark(), "dim"))

    def _heading(self, part: Continuation) -> Text:
        name = "source"
        if part is self.quantized:
            name = (
                f"quantized, {'activations rounded (W4A4)' if self.simulated else 'weights alone'}"
            )
        return Text.assemble((name, "bold"), (f"\n{part.model}", "dim"))

    def _remark(self) -> str:
        if self.source is None:
            return "--source MODEL shows beside it what the source writes"
        longer = max(len(self.source.tokens), len(self.quantized.tokens))
        if self.same_tokens == longer:
            return f"all {longer} tokens are the same"
        return f"the first {self.same_tokens} of {longer} tokens are the same"

    def __str__(self) -> str:
        return plain(self)


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
    """What the NVFP4 checkpoint `out`, and its `source` where given, make of `prompt`.

    temperature: 0 takes the likeliest token; above, tokens are drawn from `seed`.
    simulate_activations: round activations, too; by default where the checkpoint is W4A4.
    stream: load one layer at a time; by default for a model that does not fit into memory.
    device: cpu, cuda, cuda:N or auto.

    Raises UsageError for options that make no sense; SourceError, ModelError or PlanError where a
    checkpoint cannot be read or run, or lacks a tokenizer.
    """
    _check_options(prompt, max_new_tokens, temperature)
    checkpoint = open_decoded(out, trust_remote_code=trust_remote_code)
    try:
        simulated = bool(checkpoint.input_scales)
        if simulate_activations is not None:
            simulated = simulate_activations
        if simulated:
            check_w4a4(checkpoint)
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
        writer = _Writer(
            _Request(prompt, max_new_tokens, temperature, seed),
            tokenizer,
            choose_device(device),
            stream,
            on_event,
        )
        theirs = None if source is None else _from_source(writer, source, trust_remote_code)
        ours = writer.write("quantized", checkpoint, rounded=checkpoint if simulated else None)
    finally:
        checkpoint.close()
    return Generation(prompt, theirs, ours, simulated)


def _check_options(prompt: str, max_new_tokens: int, temperature: float) -> None:
    if not prompt:
        raise UsageError("the prompt is empty: give the beginning of a text.")
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens: give at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"a temperature of {temperature}: give 0, for the likeliest, or more.")


def _from_source(
    writer: _Writer, model: str | Path | Source, trust_remote_code: bool
) -> Continuation:
    with opened(model, trust_remote_code=trust_remote_code) as source:
        algorithm = quantization_of(source.config)
        if algorithm is not None:
            raise SourceError(
                f"{source.folder}: quantized already ({algorithm}). Give the checkpoint that OUT "
                "was made of as --source."
            )
        return writer.write("source", source)


@dataclass(frozen=True)
class _Request:
    """What is to be written."""

    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class _Writer:
    """Runs one model after the other on one request."""

    request: _Request
    tokenizer: Any
    device: str
    stream: bool | None
    on_event: OnEvent

    def write(
        self, label: Label, source: Source, *, rounded: DecodedSource | None = None
    ) -> Continuation:
        """Let the model of `source` write a text. Nothing of the model stays in memory.

        rounded: the checkpoint whose input scales round the model's activations, if any.
        """
        begun = time.perf_counter()
        runner = OpenedModel(source, device=self.device)
        streamed = self.stream
        if streamed is None:
            streamed = runner.nbytes > _available(self.device)
        with ExitStack() as stack:
            if rounded is not None:
                sites = runner.sites(rounded)
                simulation = Simulation(runner.model, runner.streamed.tree, sites)
                stack.callback(simulation.remove)
            ids = _run(runner, partial(self._continue, label), streamed)
        del runner
        gc.collect()
        seconds = time.perf_counter() - begun
        return Continuation(str(source.folder), self._text(ids), tuple(ids), streamed, seconds)

    def _continue(self, label: Label, model: Any) -> list[int]:
        count = _Count(label, self.request.max_new_tokens, self.on_event)
        return continue_prompt(
            model,
            self.tokenizer,
            self.request.prompt,
            self.request.max_new_tokens,
            self.request.seed,
            self.request.temperature,
            on_token=count,
        )

    def _text(self, new_ids: list[int]) -> str:
        """New tokens as text, as they read after the prompt."""
        prompt_ids = self.tokenizer(self.request.prompt)["input_ids"]
        before = self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        whole = self.tokenizer.decode([*prompt_ids, *new_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return str(whole[len(before) :])
        return str(self.tokenizer.decode(new_ids, skip_special_tokens=True))


def _run(runner: OpenedModel, call: Callable[[Any], list[int]], streamed: bool) -> list[int]:
    """What `call` makes of the model, loaded whole or layer by layer."""
    if not streamed:
        return call(runner.load())
    found: list[list[int]] = []
    for _ in runner.streamed.run([lambda model: found.append(call(model))]):
        pass
    return found[0]


class _Count:
    """A streamer of transformers' kind: is given the prompt, then each token."""

    def __init__(self, label: Label, total: int, on_event: OnEvent) -> None:
        self.label, self.total, self.on_event, self.done = label, total, on_event, -1

    def put(self, _: Any) -> None:
        self.done += 1
        self.on_event(TokenGenerated(self.label, self.done, self.total))

    def end(self) -> None:
        """Nothing is left to do."""


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    seed: int = 0,
    temperature: float = 0.0,
    on_token: Any = None,
) -> list[int]:
    """The tokens that a model puts after the prompt: greedy, or sampled from `seed`."""
    model = runnable(model)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ModelError(f"{type(model).__name__}: a model that does not write text.")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise UsageError("the prompt has no token: give the beginning of a text.")
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), quiet():
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=on_token,
            **options,
        )[0].tolist()
    if model.config.is_encoder_decoder:
        return _without_leading(ids[1:], pad)  # a decoder is given one token to begin with
    return [int(each) for each in ids[inputs["input_ids"].shape[1] :]]


def _without_leading(ids: Sequence[int], pad: int | None) -> list[int]:
    begin = next((at for at, each in enumerate(ids) if each != pad), len(ids))
    return list(ids[begin:])


def _available(device: str) -> int:
    """Bytes that a model may take on the device, some room for what it computes left out."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.9)
    return int(memory_available() * 0.9)


def _visible(text: str) -> Text:
    """A model may write anything: what would steer a terminal is shown, not sent."""
    return Text("".join(x if x.isprintable() or x in "\n\t" else repr(x)[1:-1] for x in text))
