# SPDX-License-Identifier: Apache-2.0
"""Where factors per channel can be moved from an activation into the weights that read it.

    norm, its weight g / s      →  every reader of its outputs, columns · s
    up of an MLP, its rows / s  →  down of the same MLP or expert, columns · s

A **fold** is one activation with those that write it and all that read it: routers, shared experts
and their gates, indexers, and gate and up of all experts of a layer. Whatever the factors s are,
the model computes the same. Quantization does not, which is what folds are for.

A layer's norms say what kind of layer it is (`LAYERS`): which module reads which norm. Inside of
such a module every parameter must be known, by name, as a reader of the norm (`READERS`) or as one
that reads something else (`INNER`). A single parameter that is not known leaves the module alone,
with a reason, which the plan shows. An MLP's up is folded if its outputs are only multiplied with
those of its gate. Norms that multiply by 1 + g are left alone: the folded g is not the old one with
another exponent, so that BF16 would round it. So is the last norm, which the head, and MTP layers,
may both read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from fourfold.models.experts import Projection
from fourfold.models.inventory import Inventory, LinearWeight, RawTensor
from fourfold.models.norms import Gain
from fourfold.models.regions import Region, whole
from fourfold.models.roles import Role

FOLDABLE = frozenset({"BF16", "F32"})
"""Dtypes whose exponents have room for factors."""

_ATTENTION = r"self_attn|linear_attn|mamba|conv"
_MLP = r"mlp|feed_forward|block_sparse_moe|shared_mlp"

LAYERS: Sequence[Mapping[str, str]] = (
    {"input_layernorm": _ATTENTION, "post_attention_layernorm": _MLP},
    {"input_layernorm": f"{_ATTENTION}|{_MLP}"},  # attention and MLP side by side
    {"operator_norm": _ATTENTION, "ffn_norm": _MLP},
    {"input_layernorm": _ATTENTION, "pre_ff_layernorm": _MLP},
    {
        "input_layernorm": _ATTENTION,
        "post_attention_layernorm": "",
        "pre_feedforward_layernorm": _MLP,
        "post_feedforward_layernorm": "",
    },
    {
        "input_layernorm": _ATTENTION,
        "post_attention_layernorm": "",
        "pre_mlp_layernorm": _MLP,
        "post_mlp_layernorm": "",
    },
    {
        "input_layernorm": _ATTENTION,
        "post_self_attn_layernorm": "",
        "post_attention_layernorm": _MLP,
        "post_mlp_layernorm": "",
    },
    {
        "input_layernorm": _ATTENTION,
        "post_attention_layernorm": "",
        "pre_feedforward_layernorm": "mlp",
        "post_feedforward_layernorm": "",
        "pre_feedforward_layernorm_2": "experts",  # the router has a norm of its own
        "post_feedforward_layernorm_1": "",
        "post_feedforward_layernorm_2": "",
    },
    {"norm": "mixer"},
    {"norm_attn_norm.norm_1": r"norm_attn_norm\.attn", "norm_attn_norm.norm_2": "ffn"},
    {
        "input_layernorm.0": r"self_attn\.0",
        "post_attention_layernorm.0": r"mlps\.0|mlp",
        "input_layernorm.1": r"self_attn\.1",
        "post_attention_layernorm.1": r"mlps\.1",
    },
)
"""For each kind of decoder layer, its norms of the hidden states, and the modules that read each:
a pattern of their paths in the layer, empty for a norm whose outputs are added to the hidden
states. A layer is of a kind if it has exactly these norms."""

READERS = re.compile(
    r"(^|\.)([qkv]_proj|qkv_proj|Wqkv|q_a_proj|kv_a_proj_with_mqa|kv_proj|gate_proj|up_proj"
    r"|gate_up_proj|in_proj(_\w+)?|[bfgr]_proj|f_a_proj|g_a_proj|output_gate|input_linear|w1|w3"
    r"|wk|weights_proj|router|gate|wg|classifier|layer|shared_expert_gate)\.weight$"
)
"""Parameters of a module that multiply its inputs."""

INNER = re.compile(
    r"(^|\.)(bias|\w+_bias|sinks|A_log|D|tid2eid|diagonal_decay|(conv|conv1d|o_proj|out_proj|q_b_proj|kv_b_proj|wq_b"
    r"|f_b_proj|g_b_proj|o_a_proj|o_b_proj|x_proj|dt_proj|output_linear"
    r"|[qkvob]_(layer)?norm|(q_a|kv_a|dt|b|c|query|key)_(layer)?norm|kv_norm"
    r"|k_rope_only_layernorm|post_mlp_layernorm|norm)\.weight)$"
)
"""Parameters that are added, or multiply something else than the module's inputs."""

DOWN = re.compile(r"^(?P<mlp>.+\.|)(down_proj|w2)\.weight$")
"""The last matrix of an MLP, which reads something else, too, if there is a first one."""

UPS = {"up_proj": ("gate_proj", "down_proj"), "w3": ("w1", "w2")}
"""By the last name of an MLP's up: those of its gate and its down."""

LIMITS = re.compile(r"swiglu\w*limit|glu\w*clamp")
"""Settings of models that cut off the outputs of gates and ups."""

NO_NORMS: Mapping[str, str] = {
    "minimax": "its outputs are added to the hidden states",
    "diffusion_gemma": "encoder and decoder share weights",
}
"""Families whose norms are left alone whatever their layers look like, and why."""

NO_UPS: Mapping[str, str] = {
    "zaya": "an experts class of its own",
    "muse_spark": "experts have norms of their own",
    "inkling2": "gate and up are capped",
    "diffusion_gemma": "encoder and decoder share weights",
}
"""Families whose ups are left alone, and why."""


class Kind(StrEnum):
    """Where the factors of a fold go."""

    NORM = "norm"
    UP = "up"


@dataclass(frozen=True, slots=True)
class Fold:
    """One activation, and the weights around it.

    Attributes:
        name: The tensor that is divided, as the checkpoint calls it, without `.weight`.
        kind: Whether a norm or an up writes the activation.
        layer: The number of the decoder layer.
        channels: The number of its channels.
        writers: What is divided by the factors: vectors, or the rows of a matrix.
        readers: The matrices whose columns are multiplied.
        linears: Those of the readers that are linear weights.
    """

    name: str
    kind: Kind
    layer: int
    channels: int
    writers: tuple[Region, ...]
    readers: tuple[Region, ...]
    linears: tuple[LinearWeight, ...]


@dataclass(frozen=True)
class Folds:
    """All folds of a model, by name, and why other activations have none."""

    folds: Mapping[str, Fold]
    left_alone: Mapping[str, int]
    """Reason → how many norms, or ups of MLPs, it is for."""


class _NoFoldError(Exception):
    """Why an activation cannot be folded."""


def find_folds(inventory: Inventory, config: Mapping[str, Any]) -> Folds:
    """Return every fold of a model.

    Args:
        inventory: The model's inventory.
        config: The contents of its config.json.
    """
    folds: list[Fold] = []
    left_alone: dict[str, int] = defaultdict(int)
    why_no_norms = _why(NO_NORMS, inventory)
    why_no_ups = _why(NO_UPS, inventory)
    if any(LIMITS.search(key) and value for key, value in _settings(config)):
        why_no_ups = "the configuration limits their outputs"
    for layer in _layers_of(inventory):
        for candidate in (*layer.norms(why_no_norms), *layer.ups(why_no_ups)):
            if isinstance(candidate, Fold):
                folds.append(candidate)
            else:
                left_alone[candidate] += 1
    return Folds({fold.name: fold for fold in folds}, dict(left_alone))


def _why(table: Mapping[str, str], inventory: Inventory) -> str | None:
    """The reason that a table gives for a model; None if it has none."""
    return next((table[name] for name in inventory.model_types if name in table), None)


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _settings(value)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer, its parameters by their paths in it."""

    number: int
    raws: Mapping[str, RawTensor]
    """Its tensors by raw key."""
    parameters: Mapping[str, tuple[RawTensor, ...]]
    linears: Mapping[str, tuple[LinearWeight, ...]]
    """Linear weights by raw key."""
    gains: Mapping[str, Gain]
    """By path in the layer."""

    @cached_property
    def biases(self) -> Sequence[tuple[str, RawTensor]]:
        """The biases, by their names in memory."""
        named = ((name, raw) for raw in self.raws.values() for name in raw.parameters)
        return [(name, raw) for name, raw in named if name.endswith("bias")]

    def norms(self, why_not: str | None) -> Iterator[Fold | str]:
        """Yield the fold of each norm of the hidden states, or why there is none."""
        names = {path for path in self.gains if "norm" in path.split(".")[0]}
        kind = next((kind for kind in LAYERS if kind.keys() == names), None)
        if kind is None:
            yield f"norms: no rule for layers with {', '.join(sorted(names)) or 'no norm'}"
            return
        for norm, modules in kind.items():
            if modules:
                try:
                    yield f"{norm}: {why_not}" if why_not else self._norm(norm, modules)
                except _NoFoldError as error:
                    yield f"{norm}: {error}"

    def _norm(self, norm: str, modules: str) -> Fold:
        if self.gains[norm] is not Gain.PLAIN:
            offset = self.gains[norm] is Gain.OFFSET
            raise _NoFoldError("multiplies by 1 + weight" if offset else "is no plain norm")
        parts = (f"{norm}.weight", f"{norm}.bias")
        vectors = [raw for part in parts for raw in self.parameters.get(part, ())]
        if not vectors or any(len(raw.info.shape) != 1 for raw in vectors):
            raise _NoFoldError("its weight is no vector of its own")
        channels = vectors[0].info.shape[0]
        is_read = re.compile(rf"({modules})\.(?P<rest>.+)")
        readers: dict[str, tuple[RawTensor, ...]] = {}
        for path, raws in self.parameters.items():
            match = is_read.fullmatch(path)
            if match is not None and self._reads(match["rest"], raws):
                readers[path] = raws
        regions, linears = self._columns(readers, channels)
        if not linears:
            raise _NoFoldError("no linear weight reads it")
        writers = tuple(Region(x.info.key, None, range(channels), None) for x in vectors)
        self._check_dtypes([*writers, *regions])
        name = vectors[0].stem
        return Fold(name, Kind.NORM, self.number, channels, writers, regions, linears)

    def _reads(self, path: str, raws: Iterable[RawTensor]) -> bool:
        """True for a parameter of a module that multiplies the module's inputs."""
        down = DOWN.match(path)
        if any(raw.role is Role.EXPERTS for raw in raws):
            return "bias" not in path
        if INNER.search(path) or (down is not None and self._has_first(down["mlp"])):
            return False
        if READERS.search(path):
            return True
        raise _NoFoldError(f"{path} is not known to read it, or not to")

    def _has_first(self, mlp: str) -> bool:
        """True if a module has the first matrices of an MLP."""
        firsts = ("gate_proj", "up_proj", "gate_up_proj", "w1")
        ends = tuple(f".{mlp}{first}.weight" for first in firsts)
        return any(f".{path}".endswith(ends) for path in self.parameters)

    def _columns(
        self, readers: Mapping[str, tuple[RawTensor, ...]], channels: int
    ) -> tuple[tuple[Region, ...], tuple[LinearWeight, ...]]:
        """The matrices with inputs of a norm, and those that are linear weights."""
        regions: list[Region] = []
        linears: list[LinearWeight] = []
        raws = {raw.info.key: raw for of_one in readers.values() for raw in of_one}
        for key, raw in raws.items():
            own = [x for x in self.linears.get(key, ()) if x.projection is not Projection.DOWN]
            if key not in self.linears:
                if raw.role is not Role.ROUTER or len(raw.info.shape) != 2:
                    raise _NoFoldError(f"{raw.stem} is not cut into matrices")
                regions.append(whole(key, raw.info.shape))
            linears += own
        regions += [linear.region for linear in linears]
        for region in regions:
            if region.shape[1] != channels:
                raise _NoFoldError(f"{region.key} has {region.shape[1]} inputs, not {channels}")
        return tuple(regions), tuple(linears)

    def ups(self, why_not: str | None) -> Iterator[Fold | str]:
        """Yield the fold of each MLP's up, or why there is none."""
        linears = [linear for group in self.linears.values() for linear in group]
        for up, gate, down in (*_of_experts(linears), *_of_modules(linears)):
            try:
                yield f"ups: {why_not}" if why_not else self._up(up, gate, down)
            except _NoFoldError as error:
                yield f"ups: {error}"

    def _up(self, up: LinearWeight, gate: LinearWeight | None, down: LinearWeight) -> Fold:
        if gate is None:
            raise _NoFoldError("an MLP without a gate is not linear in them")
        if up.shape[0] != down.shape[1]:
            raise _NoFoldError("their outputs are not what down reads")
        writers = [up.region]
        own = [raw for name, raw in self.biases if name.startswith(f"{up.module}.")]
        if own and up.expert is not None:
            raise _NoFoldError("experts with biases")
        writers += [Region(raw.info.key, None, range(up.shape[0]), None) for raw in own]
        self._check_dtypes([*writers, down.region])
        regions = tuple(writers), (down.region,)
        return Fold(up.name, Kind.UP, self.number, up.shape[0], *regions, (down,))

    def _check_dtypes(self, regions: Iterable[Region]) -> None:
        for region in regions:
            dtype = self.raws[region.key].info.dtype
            if dtype not in FOLDABLE:
                raise _NoFoldError(f"{dtype} has no room for factors in its exponent")


def _layers_of(inventory: Inventory) -> Iterator[_Layer]:
    by_key = inventory.linears_by_key
    raws: dict[int, dict[str, RawTensor]] = defaultdict(dict)
    for key, raw in inventory.tensors.items():
        if raw.layer is not None:
            raws[raw.layer][key] = raw
    for number, layer in enumerate(inventory.layer_paths):
        prefix = f"{layer}."
        parameters: dict[str, list[RawTensor]] = defaultdict(list)
        for raw in raws[number].values():
            for name in raw.parameters:
                parameters[name.removeprefix(prefix)].append(raw)
        yield _Layer(
            number,
            raws[number],
            {path: tuple(of_one) for path, of_one in parameters.items()},
            {key: by_key[key] for key in raws[number] if key in by_key},
            {
                path.removeprefix(prefix): gain
                for path, gain in inventory.norms.items()
                if path.startswith(prefix)
            },
        )


Ups = Iterator[tuple[LinearWeight, LinearWeight | None, LinearWeight]]
"""Up, gate and down of MLPs; None for an MLP without a gate."""


def _of_experts(linears: Iterable[LinearWeight]) -> Ups:
    experts: dict[tuple[str, int], dict[Projection, LinearWeight]] = defaultdict(dict)
    for linear in linears:
        if linear.expert is not None and linear.projection is not None:
            experts[linear.module, linear.expert][linear.projection] = linear
    for parts in experts.values():
        if Projection.UP in parts and Projection.DOWN in parts:
            yield parts[Projection.UP], parts.get(Projection.GATE), parts[Projection.DOWN]


def _of_modules(linears: Iterable[LinearWeight]) -> Ups:
    modules = {linear.module: linear for linear in linears if linear.expert is None}
    for path, linear in modules.items():
        parent, _, last = path.rpartition(".")
        gate, down = (modules.get(f"{parent}.{name}") for name in UPS.get(last, ("", "")))
        if down is not None:
            yield linear, gate, down
