# SPDX-License-Identifier: Apache-2.0
"""Runs a family's tiny model as a whole and streamed, and keeps what each computed and saw.

The whole model is transformers' own: `from_pretrained`, its default implementation of experts.
What it saw is taken by plain hooks that share nothing with fourfold: experts by the router's own
choice, token after token; the inputs of `down` from the operator that multiplies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import FAMILIES, quiet, read_back
from fourfold.calibration.activations import ActivationStore
from fourfold.calibration.kv_cache import recording_cache
from fourfold.calibration.observers import Observers
from fourfold.calibration.parking import Parking
from fourfold.calibration.statistics import DataSummary, Statistics
from fourfold.calibration.streaming import Pass, StreamedModel
from fourfold.models.internals import runnable
from fourfold.models.module_tree import ModuleTree
from fourfold.sources.safetensors import open_source

Batch = dict[str, Tensor]

RUNNABLE = [name for name, family in FAMILIES.items() if not family.load_error]

VARIED = (
    "qwen3_next", "deepseek_v3", "deepseek_v4", "gemma4", "jamba", "nemotron_h", "kimi_linear"
)  # fmt: skip
"""Families with attention of several kinds, beside those of `families.LAYOUTS`."""

NO_KNOWN_EXPERTS = {
    "jetmoe": "its experts' layout is not known, and `plan` refuses it",
    "nllb_moe": "its experts are nn.Linear modules",
    "switch_transformers": "its experts are nn.Linear modules",
}

SHAPES = ((2, 24, 0), (3, 17, 5), (1, 9, 0))
"""Samples, tokens, and how many of the last sample's tokens are padding, on the right."""

NO_CACHE = {
    "openai_privacy_filter": "it is an encoder",
    "glm5_next": "its indexer asks the cache how many keys it holds; MLA takes no KV scales",
    "switch_transformers": "its encoder refuses a cache",
}
"""Families that cannot be given a cache."""

SMALL, LIMIT = 16, 2000
"""So that the activations of models this tiny go to the file, too: bytes."""


def batches_of(model: Any, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[Batch]:
    """Random texts, right-padded; and what a decoder reads, for models that have one."""
    generator = torch.Generator().manual_seed(0)
    inputs = inspect.signature(model.forward).parameters
    batches = []
    for samples, tokens, pads in shapes:
        ids = torch.randint(3, 90, (samples, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if pads:
            ids[-1, -pads:], mask[-1, -pads:] = 0, 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if "decoder_input_ids" in inputs:
            batch["decoder_input_ids"] = ids[:, : getattr(model.config, "canvas_length", None)]
        batches.append(batch)
    return batches


@dataclass
class Trace:
    """What a run computed, batch by batch."""

    outputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    hidden: dict[int, list[tuple[str, Tensor]]] = field(default_factory=dict)
    """By batch: what each layer gave, in the order in which layers ran."""

    def see(self, batch: int, layer: str, output: Any) -> None:
        first = next(tensors_of(output))
        self.hidden.setdefault(batch, []).append((layer, first.clone()))

    def finish(self, batch: int, output: Mapping[str, Any]) -> None:
        self.outputs[batch] = {
            f"{name}.{number}": tensor.clone()
            for name, value in output.items()
            for number, tensor in enumerate(tensors_of(value))
        }


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


def differences(found: Trace, wanted: Trace) -> list[str]:
    """Where two runs differ by a bit."""
    texts = []
    for batch in sorted(wanted.outputs.keys() | found.outputs.keys()):
        texts += _differing(f"batch {batch}", found.outputs[batch], wanted.outputs[batch])
        layers = [layer for layer, _ in wanted.hidden[batch]]
        if [layer for layer, _ in found.hidden[batch]] != layers:
            texts.append(f"batch {batch}: other layers")
        else:
            pairs = [dict(enumerate(map(_second, run.hidden[batch]))) for run in (found, wanted)]
            texts += _differing(f"batch {batch}, layer", *pairs)
    return texts


def _second(pair: tuple[str, Tensor]) -> Tensor:
    return pair[1]


def _differing(what: str, found: Mapping[Any, Tensor], wanted: Mapping[Any, Tensor]) -> list[str]:
    if found.keys() != wanted.keys():
        return [f"{what}: {sorted(found)} instead of {sorted(wanted)}"]
    return [f"{what} {key}" for key in wanted if not same_bits(found[key], wanted[key])]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)


# --- the whole model, seen by plain hooks ---------------------------------------------------


@dataclass
class Seen:
    """Plain statistics: tokens of each expert and largest inputs, pads left out."""

    tokens: dict[str, Tensor] = field(default_factory=dict)
    gate_up: dict[str, Tensor] = field(default_factory=dict)
    down: dict[str, Tensor] = field(default_factory=dict)
    linears: dict[str, tuple[float, int]] = field(default_factory=dict)
    kv: dict[str, tuple[float, float]] = field(default_factory=dict)
    is_kept: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    """bool [B·S]: which tokens of the present batch are no padding."""

    def expert(self, path: str, count: int, number: int, tokens: int, x: Tensor, inner: Tensor):
        """`x` and `inner` are all that expert `number` was given for this batch, without pads."""
        for kind in (self.tokens, self.gate_up, self.down):
            kind.setdefault(path, torch.zeros(count, dtype=torch.float64))
        self.tokens[path][number] += tokens
        for kind, rows in ((self.gate_up, x), (self.down, inner)):
            kind[path][number] = max(float(kind[path][number]), largest(rows))

    def linear(self, path: str, x: Tensor) -> None:
        rows = self.kept(x.reshape(-1, x.shape[-1]))
        if x.ndim == 4 and x.shape[0] * x.shape[1] == len(self.is_kept):  # [B, S, groups, in]
            rows = x.flatten(0, 1)[self.is_kept].flatten(0, 1)
        amax, count = self.linears.get(path, (0.0, 0))
        if len(rows):
            self.linears[path] = max(amax, largest(rows)), count + len(rows)

    def cached(self, layer: str, keys: Tensor, values: Tensor) -> None:
        pair = [largest(self.kept(_by_token(states))) for states in (keys, values)]
        before = self.kv.get(layer, (0.0, 0.0))
        self.kv[layer] = max(before[0], pair[0]), max(before[1], pair[1])

    def kept(self, rows: Tensor) -> Tensor:
        """Without pads, where there is a row for each token of the batch."""
        return rows[self.is_kept] if len(rows) == len(self.is_kept) else rows


def largest(rows: Tensor) -> float:
    return float(rows.abs().max()) if rows.numel() else 0.0


def _by_token(states: Tensor) -> Tensor:
    """[B, heads, S, width] → [B·S, …]."""
    return torch.cat([sample.transpose(0, 1).flatten(1) for sample in states])


def routed(seen: Seen, path: str, module: Any, args: Sequence[Tensor], inners: list[Tensor]):
    """Count a decorated experts module's call, token after token, from the router's choice.

    inners: what its two grouped products were given, with the end of each expert's rows.
    """
    hidden, index = args[0], args[1]
    (x, ends), (inner, _) = inners
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        mine = [
            token
            for token, chosen in enumerate(index.tolist())
            for number in chosen
            if number == expert and seen.is_kept[token]
        ]
        rows, middle = x[begin:end], inner[begin:end]
        is_mine = (rows[:, None] == hidden[mine][None]).all(-1).any(-1)
        seen.expert(path, len(ends), expert, len(mine), hidden[mine], middle[is_mine])
        begin = end


Inner = Callable[[Any, Tensor, int], Tensor]
"""What an expert's down projection is given, of the rows that gate and up were given."""


def one_by_one(seen: Seen, path: str, module: Any, args: Sequence[Tensor], inner: Inner) -> None:
    """Count a call of a class that computes one expert after the other, by its own formula."""
    hidden, index = args[0].reshape(-1, args[0].shape[-1]), args[1]
    count = module.num_routed_experts if hasattr(module, "num_routed_experts") else (
        module.num_experts
    )  # fmt: skip
    for expert in range(count):
        tokens = (index == expert).any(-1).nonzero().flatten()
        kept = seen.is_kept[tokens]
        middle = inner(module, hidden[tokens], expert)
        seen.expert(path, count, expert, int(kept.sum()), hidden[tokens][kept], middle[kept])


def _linear_inner(module: Any, x: Tensor, expert: int) -> Tensor:
    gate_up = F.linear(x, module.gate_up_proj[expert])
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _float_inner(module: Any, x: Tensor, expert: int) -> Tensor:
    gate_up = x.float() @ module.gate_up_proj[expert].float()
    return module._apply_gate(gate_up + module.gate_up_proj_bias[expert].float()).float()


def _dbrx_inner(module: Any, x: Tensor, expert: int) -> Tensor:
    glu = module.mlp
    w1, v1 = (w.view(module.num_experts, -1, w.shape[-1])[expert] for w in (glu.w1, glu.v1))
    return glu.activation_fn(x.matmul(w1.T)) * x.matmul(v1.T)


def all_at_once(seen: Seen, path: str, module: Any, args: Sequence[Tensor], _: Any = None) -> None:
    """Llama 4: every token goes to every expert; rows are zero where it is not routed."""
    rows_ETH = args[0].view(module.num_experts, -1, args[0].shape[-1])
    gate, up = torch.bmm(rows_ETH, module.gate_up_proj).chunk(2, dim=-1)
    inner_ETI = up * module.act_fn(gate)
    for expert, rows_TH in enumerate(rows_ETH):
        mine = [t for t, row in enumerate(rows_TH) if seen.is_kept[t] and bool(row.any())]
        inner = inner_ETI[expert][mine]
        seen.expert(path, len(rows_ETH), expert, len(mine), rows_TH[mine], inner)


BY_CLASS: dict[str, tuple[Callable[..., None], Inner | None, str]] = {
    "Llama4TextExperts": (all_at_once, None, ""),
    "DbrxExperts": (one_by_one, _dbrx_inner, ".mlp"),
    "LongcatFlashExperts": (one_by_one, _linear_inner, ""),
    "Step3p7Experts": (one_by_one, _linear_inner, ""),
    "OpenAIPrivacyFilterExperts": (one_by_one, _float_inner, ""),
}
"""Classes that do not run as grouped products: how to count, what down is given, which path."""


@contextmanager
def plainly_seen(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Within, everything that `model` is given is counted."""
    grouped: list[tuple[Tensor, Tensor]] = []
    original = torch.nn.functional.grouped_mm

    def watched(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        grouped.append((x.clone(), offs.clone()))
        return original(x, weight, offs=offs)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        grouped.clear()

    def after(path: str, module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        values = (*args, *kwargs.values())
        count, inner, more = BY_CLASS.get(type(module).__name__, (routed, None, ""))
        count(seen, path + more, module, values, grouped if count is routed else inner)

    def linear(path: str, module: nn.Module, args: Any) -> None:
        seen.linear(path, args[0])

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.nn.functional, "grouped_mm", watched)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_pre_hook(partial(linear, path)).remove)
            elif hasattr(module, "is_transposed") or type(module).__name__ in BY_CLASS:
                hooks = (
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(partial(after, path), with_kwargs=True),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
        yield


@contextmanager
def hidden_states(model: nn.Module, layers: Sequence[str], see: Callable[[str, Any], None]):
    """Within, `see(layer, output)` is called for each layer that ran."""
    with ExitStack() as stack:
        for path in layers:
            hook = model.get_submodule(path).register_forward_hook(
                lambda _, __, output, path=path: see(path, output)
            )
            stack.callback(hook.remove)
        yield


def run_whole(model: Any, layers: Sequence[str], batches: Sequence[Batch]) -> tuple[Trace, Seen]:
    """What the whole model computes, hooked by nothing but the trace; then, what it sees."""
    trace, seen = Trace(), Seen()
    part = runnable(model)
    for number, batch in enumerate(batches):
        with torch.no_grad(), hidden_states(model, layers, partial(trace.see, number)):
            trace.finish(number, part(**batch, use_cache=False))
    with plainly_seen(model, seen):
        for batch in batches:
            seen.is_kept = batch["attention_mask"].reshape(-1).bool()
            with torch.no_grad():
                part(**batch, use_cache=False)
    return trace, seen


def see_cached(model: Any, layers: Sequence[str], batches: Sequence[Batch], seen: Seen) -> None:
    """Run the whole model with transformers' own cache; what is put into it goes to `seen`."""
    from transformers import DynamicCache

    part, present = runnable(model), [""]
    original = DynamicCache.update

    def update(cache: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.cached(present[0], keys, values)
        return original(cache, keys, values, *args, **kwargs)

    def enter(path: str, *_: Any) -> None:
        present[0] = path

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(DynamicCache, "update", update)
        for path in layers:
            hook = model.get_submodule(path).register_forward_pre_hook(partial(enter, path))
            stack.callback(hook.remove)
        for batch in batches:
            seen.is_kept = batch["attention_mask"].reshape(-1).bool()
            with torch.no_grad():
                part(**batch, use_cache=True)


# --- the streamed model -------------------------------------------------------------------


@dataclass
class Streamed:
    """A streamed run: what it computed, what observers saw, and how it ran."""

    trace: Trace
    statistics: Statistics
    store: ActivationStore
    steps: list[int]
    leaks: list[str]
    """What of a call was still in force while it waited."""


def run_streamed(
    streamed: StreamedModel,
    batches: Sequence[Batch],
    *,
    observed: bool = False,
    cached: bool = False,
    evicting: bool = False,
) -> Streamed:
    """All batches through a streamed model.

    observed: with observers at every experts module and linear layer. cached: with the recording
    cache. evicting: with hardly any memory for activations.
    """
    model, tree = streamed.model, streamed.tree
    trace, statistics = Trace(), Statistics(DataSummary("random", "", 0, 0, 0))
    store = Parking(limit=LIMIT, smallest=SMALL) if evicting else ActivationStore()
    observers = Observers(model, tree.experts, tree.linears)
    present = [0, 0]

    def resume(number: int) -> None:
        present[0] = number
        observers.see(batches[number]["attention_mask"])

    def enter(layer: int, _: Pass) -> None:
        present[1] = layer

    def record(keys: Tensor, values: Tensor) -> None:
        observers.see_kv(tree.layers[present[1]], keys, values)

    def call(number: int, model: Any) -> None:
        part, kwargs = runnable(model), {"use_cache": False}
        if cached:
            kwargs = {"past_key_values": recording_cache(part, record), "use_cache": True}
        trace.finish(number, part(**batches[number], **kwargs))

    with ExitStack() as stack:
        see = partial(_see, trace, present)
        stack.enter_context(hidden_states(model, tree.layers, see))
        if observed:
            stack.enter_context(observers.attached())
        calls = [partial(call, number) for number in range(len(batches))]
        steps: list[int] = []
        leaks: list[str] = []
        for layer in streamed.run(calls, store=store, on_resume=resume, on_layer=enter):
            steps.append(layer)
            leaks += in_force()
            observers.take(statistics)
        observers.take(statistics)
    return Streamed(trace, statistics, store, steps, leaks)


def in_force() -> list[str]:
    """What a model may have switched on for a while, and is still on."""
    switches = {
        "no_grad": not torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "another dtype": torch.get_default_dtype() is not torch.float32,
        "another device": torch.get_default_device().type != "cpu",
        "a function mode": torch._C._len_torch_function_stack() > 0,
        "a dispatch mode": torch._C._len_torch_dispatch_stack() > 0,
    }
    return [name for name, is_on in switches.items() if is_on]


def _see(trace: Trace, present: list[int], layer: str, output: Any) -> None:
    trace.see(present[0], layer, output)


# --- both -----------------------------------------------------------------------------------


@dataclass
class Compared:
    """A family's model, run as a whole and streamed."""

    tree: ModuleTree
    batches: list[Batch]
    whole: Trace
    seen: Seen
    bare: Streamed
    """With hardly any memory for activations."""
    observed: Streamed
    """With observers, and the recording cache where the family takes one."""


@cache
def compare(name: str, folder: Path) -> Compared:
    """Run the family's checkpoint in `folder` in every way; once for all tests."""
    with quiet():
        model, _ = read_back(FAMILIES[name], folder)
        batches = batches_of(runnable(model))
        streamed = StreamedModel(open_source(folder))
        layers = streamed.tree.layers
        trace, seen = run_whole(model.eval(), layers, batches)
        takes_cache = name not in NO_CACHE
        if takes_cache:
            see_cached(model, layers, batches, seen)
        return Compared(
            tree=streamed.tree,
            batches=batches,
            whole=trace,
            seen=seen,
            bare=run_streamed(streamed, batches, evicting=True),
            observed=run_streamed(streamed, batches, observed=True, cached=takes_cache),
        )
