# SPDX-License-Identifier: Apache-2.0
"""Models of plain modules with the children, attributes and class names of Megatron's.

So Transformer Engine's layout is tried, which no CPU has; how a rank's part is cut is told here
once more, apart from what the package knows of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

COLUMN = ("linear_qkv", "linear_q_up_proj", "linear_kv_up_proj", "linear_fc1", "output_layer")
ROW = ("linear_proj", "linear_fc2", "out_proj")

MAMBA_NORM = ".mixer.norm."
SECTIONS = {
    sum(sizes): sizes
    for sizes in (
        [32, 32, 64, 64, 4, 4], [32, 32, 64],  # a delta net of 2 key and 4 value heads of 16
        [128, 128, 32, 32, 8], [128, 32, 32],  # Mamba of 8 heads of 16, and 2 groups of 16 states
    )
}  # fmt: skip
"""By the rows of a projection or convolution."""


@dataclass(frozen=True)
class Group:
    """A process group that knows its size and this process's rank."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


ALONE = Group(0, 1)


@dataclass(frozen=True)
class Rank:
    """A rank's position in each group, and the layers that it has."""

    tp: Group = ALONE
    ep: Group = ALONE
    etp: Group = ALONE
    layers: Sequence[int] = range(3)
    sequential: bool = False
    is_gated: bool = True


class Module(nn.Module):
    """A module whose class gets the name of one of Megatron's."""


def module_of(name: str) -> nn.Module:
    kinds = {
        **dict.fromkeys(COLUMN, "TELayerNormColumnParallelLinear"),
        **dict.fromkeys(ROW, "TERowParallelLinear"),
        "in_proj": "TELayerNormColumnParallelLinear",
        "word_embeddings": "VocabParallelEmbedding",
        "linear_q_down_proj": "TELinear", "linear_kv_down_proj": "TELinear",
    }  # fmt: skip
    made: nn.Module = type(kinds.get(name, "Module"), (Module,), {})()
    if name in kinds and "TE" in kinds[name]:
        made.parallel_mode = None  # as for experts, and for shared ones that overlap
    return made


def build(tensors: Mapping[str, Tensor], rank: Rank, delta: Mapping[str, int] | None = None) -> Any:
    """A rank's model.

    tensors: the whole, layers apart, experts stacked (dialect B).
    delta: the sizes of delta nets, or of Mamba.
    """
    model = Module()
    for key, tensor in joined(tensors).items():
        found = re.fullmatch(r"(.*decoder\.layers)\.(\d+)\.(.+)", key)
        if found is None:
            _put(model, key, _own(key, tensor, rank), rank)
        elif int(found[2]) in rank.layers:
            local = rank.layers.index(int(found[2]))
            _put(model, f"{found[1]}.{local}.{found[3]}", _own(key, tensor, rank), rank)
    for local, number in enumerate(rank.layers):
        model.get_submodule(f"decoder.layers.{local}").layer_number = number + 1
    model.config = SimpleNamespace(
        num_layers=3, hidden_size=64, gated_linear_unit=rank.is_gated, layernorm_epsilon=1e-6,
        tensor_model_parallel_size=rank.tp.count, expert_model_parallel_size=rank.ep.count,
    )  # fmt: skip
    model.pg_collection = SimpleNamespace(tp=rank.tp, ep=rank.ep, expt_tp=rank.etp)
    for module in model.modules():
        if delta is not None and hasattr(module, "A_log"):
            for name, value in delta.items():
                setattr(module, name, value)
    return model


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the parts of the projection and convolution of a delta net or of Mamba."""
    made: dict[str, list[Tensor]] = {}
    parts = ("query", "key", "value", "z", "x", "B", "C", "dt", "beta", "alpha")
    order = {name: number for number, name in enumerate(parts)}
    for key in sorted(tensors, key=lambda key: order.get(key.rpartition(".")[2], 99)):
        whole = re.sub(rf"\.({'|'.join(parts)})$", "", key)
        made.setdefault(whole, []).append(tensors[key])
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in made.items()}


def _own(key: str, tensor: Tensor, rank: Rank) -> Tensor:
    """This rank's part of a tensor."""
    linear, leaf = key.split(".")[-2:]
    is_expert = ".experts.experts." in key
    group, dim = (rank.etp, 1) if is_expert else (rank.tp, 0)
    if is_expert:
        tensor = tensor.chunk(rank.ep.count)[rank.ep.number]
    if linear in ("in_proj", "conv1d") and leaf in ("weight", "bias"):
        return _heads(tensor, rank)
    if leaf in ("A_log", "D", "dt_bias") or linear == "word_embeddings" or MAMBA_NORM in key:
        return tensor.chunk(rank.tp.count)[rank.tp.number]
    if linear == "linear_fc1" and leaf == "weight" and rank.is_gated:
        halves = tensor.chunk(2, dim)
        return torch.cat([half.chunk(group.count, dim)[group.number] for half in halves], dim)
    if linear in COLUMN and leaf == "weight":
        return tensor.chunk(group.count, dim)[group.number]
    if linear in ROW and leaf == "weight":
        return tensor.chunk(group.count, dim + 1)[group.number]
    return tensor


def _heads(tensor: Tensor, rank: Rank) -> Tensor:
    """A rank's heads of each section of a projection or convolution."""
    parts = tensor.split(SECTIONS[tensor.shape[0]])
    return torch.cat([part.chunk(rank.tp.count)[rank.tp.number] for part in parts])


def _put(model: nn.Module, key: str, value: Tensor, rank: Rank) -> None:
    found = re.fullmatch(r"(.+\.experts)\.experts\.(linear_fc[12])\.weight", key)
    if found is None:
        _set(model, key, value)
        return
    for number, each in enumerate(value):
        if rank.sequential:
            _set(model, f"{found[1]}.local_experts.{number}.{found[2]}.weight", each)
        else:
            _set(model, f"{found[1]}.{found[2]}.weight{number}", each)
            model.get_submodule(f"{found[1]}.{found[2]}").num_gemms = number + 1


def _set(model: nn.Module, key: str, value: Tensor) -> None:
    *path, leaf = key.split(".")
    for name, after in zip(path, [*path[1:], ""], strict=True):
        if name not in model._modules:
            made = nn.ModuleList() if after.isdecimal() else module_of(name)
            model.add_module(name, made)
        model = model._modules[name]  # type: ignore[assignment]
    parameter = nn.Parameter(value.clone(), requires_grad=False)
    if hasattr(model, "parallel_mode"):
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # as TE marks all
        parameter.partition_dim = 0  # type: ignore[attr-defined]
    if MAMBA_NORM in key:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    model.register_parameter(leaf, parameter)
