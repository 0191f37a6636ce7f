# SPDX-License-Identifier: Apache-2.0
"""Reads from the modules of a Megatron model what this rank holds of the whole model's parameters.

Names become those of the whole model, and local numbers global ones:

    decoder.layers.0                  the module's own `layer_number`, in any stage or chunk
    experts.linear_fc1.weight3        grouped: `num_gemms` experts, from `weight0` on
    experts.local_experts.3           sequential: a module each; expert = ep_rank · local + 3
    self_attention.in_proj, conv1d    delta net: queries, keys, values … of this rank's heads
    mixer.in_proj, conv1d             Mamba: z, x, B, C and dt of this rank's heads and groups

A tensor-parallel slice is a box of the whole parameter: rows of column-parallel layers and of
vocabularies, columns of row-parallel layers. A gated fc1 is two boxes: its gate rows and its up
rows are the halves of this rank's own rows.

All of it follows from the modules' children, attributes and class names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fourfold.distributed.process_groups import GroupRank
from fourfold.errors import SourceError
from fourfold.sources.megatron.live.groups import EXPERT, EXPERT_TENSOR, TENSOR, group_rank
from fourfold.sources.megatron.parameters import is_quantizer_state
from fourfold.storage.safetensors_header import DTYPE_NAMES

Sections = Mapping[str, int]
"""Sections of a projection, in order → how many rows each has in the whole model."""

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a parameter, which this rank holds."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter of the whole model, and the shards that this rank holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """The shape of the whole parameter."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class _Context:
    """The facts about the modules around the current one, on a walk through the model."""

    model: Any
    tp: GroupRank
    ep: GroupRank
    is_gated: bool = False
    tied: str | None = None
    """The prefix of a model whose head is its embedding."""
    projection: Sections = field(default_factory=dict)
    """The sections of the projection of a delta net or of Mamba, inside of one."""
    convolution: Sections = field(default_factory=dict)
    """The sections that its convolution has."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """The cut of tensor parallelism: along `dim`, in sections that may have names."""

    dim: int
    sections: tuple[int, ...]
    names: tuple[str, ...] = ()


def is_megatron(model: Any) -> bool:
    """True for a Megatron model, or a list of its chunks, as its configuration shows."""
    if isinstance(model, list | tuple):
        return bool(model) and all(map(is_megatron, model))
    config = getattr(_unwrapped(model), "config", None)
    fields = ("num_layers", "hidden_size", TENSOR.field, EXPERT.field)
    return isinstance(model, nn.Module) and all(hasattr(config, field) for field in fields)


def chunks_of(model: Any) -> list[Any]:
    """Return this rank's chunks of the model, without DDP and Float16Module around them."""
    return [_unwrapped(chunk) for chunk in (model if isinstance(model, list | tuple) else [model])]


def _unwrapped(model: Any) -> Any:
    while not hasattr(model, "decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def arguments_of(model: Any) -> Mapping[str, Any]:
    """Return how a model computes, as the training arguments of a checkpoint would say it."""
    config = model.config
    # Latent attention keeps it in the configuration, other models on the module.
    is_latent = getattr(config, "multi_latent_attention", False)
    pattern = getattr(model, "hybrid_override_pattern", None)
    return {
        **vars(config),
        **({"hybrid_override_pattern": pattern} if pattern else {}),
        "norm_epsilon": getattr(config, "layernorm_epsilon", None),
        "rotary_base": getattr(config if is_latent else model, "rotary_base", None),
        "group_query_attention": True,
    }


def local_parameters(chunks: Sequence[Any]) -> Iterator[LocalParameter]:
    """Yield everything that this rank holds of the model.

    Raises:
        SourceError: Experts are packed in one weight, parameters are sharded by FSDP or quantized,
            or modules are not those of a version that is known.
        UsageError: Weights are shared, but no process group says how.
    """
    for model in chunks:
        context = _Context(model, group_rank(TENSOR, model, model), GroupRank())
        yield from _walk(model, "", context)


def _walk(module: Any, name: str, context: _Context) -> Iterator[LocalParameter]:
    config = getattr(module, "config", None)
    is_gated = getattr(config, "gated_linear_unit", context.is_gated)
    context = replace(context, is_gated=is_gated)
    if getattr(module, "share_embeddings_and_output_weights", False):
        context = replace(context, tied=name)
    if all(hasattr(module, part) for part in ("A_log", "dt_bias", "in_proj", "conv1d", "out_proj")):
        projection, convolution = _sections(module)
        context = replace(context, projection=projection, convolution=convolution)
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    for leaf, tensor in own:
        if is_quantizer_state(name + leaf):
            continue
        if leaf not in module._non_persistent_buffers_set:  # others are in no checkpoint
            yield from _parameters(module, name, leaf, tensor, context)
    for child_name, child in module.named_children():
        yield from _walk(child, *_enter(module, name, child_name, child, context))


def _sections(module: Any) -> tuple[Sections, Sections]:
    """The sections of the projection and of the convolution: of Mamba, or of a delta net."""
    if hasattr(module, "d_state"):
        states = module.ngroups * module.d_state
        convolved = {"x": module.d_inner, "B": states, "C": states}
        return {"z": module.d_inner, **convolved, "dt": module.nheads}, convolved
    convolved = {"query": module.qk_dim, "key": module.qk_dim, "value": module.v_dim}
    heads = module.num_value_heads
    return {**convolved, "z": module.v_dim, "beta": heads, "alpha": heads}, convolved


def _enter(
    module: Any, name: str, child_name: str, child: Any, context: _Context
) -> tuple[str, _Context]:
    """The name of a child in the whole model, and what is known inside of it."""
    number = getattr(child, "layer_number", None)
    if isinstance(module, nn.ModuleList) and isinstance(number, int):
        return f"{name}{number - 1}.", context
    if isinstance(module, nn.ModuleList) and name.endswith(".local_experts."):
        expert = context.ep.rank * len(module) + int(child_name)
        return f"{name.removesuffix('local_experts.')}{expert}.", context
    if _is_experts(child_name, child):
        _check_experts(child, f"{name}{child_name}")
        tp = group_rank(EXPERT_TENSOR, child, context.model)
        ep = group_rank(EXPERT, child, context.model)
        context = replace(context, tp=tp, ep=ep)
    return f"{name}{child_name}.", context


def _is_experts(name: str, module: Any) -> bool:
    return (
        name == "experts"
        or isinstance(getattr(module, "local_experts", None), nn.ModuleList)
        or any(hasattr(child, "num_gemms") for child in module.children())
    )


def _check_experts(module: Any, name: str) -> None:
    """Each expert must have a weight of its own."""
    linears = [child for child in module.children() if hasattr(child, "num_gemms")]
    packed = [linear for linear in linears if not hasattr(linear, f"weight{linear.num_gemms - 1}")]
    if hasattr(module, "weight1") or packed:
        raise SourceError(
            f"{name}: {type(packed[0] if packed else module).__name__} packs all experts in one "
            "weight, which no rule takes apart. Build the model with TEGroupedMLP (weight0, "
            "weight1, …) or SequentialMLP."
        )


def _parameters(
    module: Any, name: str, leaf: str, tensor: torch.Tensor, context: _Context
) -> Iterator[LocalParameter]:
    """A tensor of this rank as a parameter of the whole model, or as several."""
    value = _value(tensor, name + leaf)
    cut = _cut_of(module, name, leaf, tensor, context)
    whole = _whole_name(module, name, leaf, context)
    dtype, shape, tp = DTYPE_NAMES[value.dtype], list(value.shape), context.tp
    if cut is None:
        yield LocalParameter(whole, dtype, tuple(shape), (Shard((0,) * len(shape), value),))
        return
    if sum(cut.sections) != shape[cut.dim]:
        raise SourceError(
            f"{name}{leaf} {shape}: should have {sum(cut.sections)} rows here: "
            f"{', '.join(map(str, cut.sections))}. Which version of Megatron is it from?"
        )

    def with_size(size: int) -> tuple[int, ...]:
        return (*shape[: cut.dim], size, *shape[cut.dim + 1 :])

    shards, start = [], 0
    for tensor in torch.split(value, list(cut.sections), cut.dim):
        size = tensor.shape[cut.dim]
        offsets = [0] * len(shape)
        offsets[cut.dim] = (0 if cut.names else start * tp.size) + tp.rank * size
        shards.append(Shard(tuple(offsets), tensor))
        start += size
    if not cut.names:
        yield LocalParameter(whole, dtype, with_size(start * tp.size), tuple(shards))
    for section, shard, size in zip(cut.names, shards, cut.sections, strict=False):
        yield LocalParameter(f"{whole}.{section}", dtype, with_size(size * tp.size), (shard,))


def _whole_name(module: Any, name: str, leaf: str, context: _Context) -> str:
    if context.tied is not None and name + leaf == context.tied + HEAD:
        return context.tied + EMBEDDING
    kind = leaf.rstrip("0123456789")
    if hasattr(module, "num_gemms") and kind in ("weight", "bias") and kind != leaf:
        expert = context.ep.rank * module.num_gemms + int(leaf.removeprefix(kind))
        experts, _, linear = name.removesuffix(".").rpartition(".")
        return f"{experts}.{expert}.{linear}.{kind}"
    return name + leaf


def _cut_of(
    module: Any, name: str, leaf: str, tensor: torch.Tensor, context: _Context
) -> _Cut | None:
    last = name.removesuffix(".").rpartition(".")[2]
    sections = {"in_proj": context.projection, "conv1d": context.convolution}.get(last)
    if sections and leaf in ("weight", "bias"):
        sizes = tuple(size // context.tp.size for size in sections.values())
        return _Cut(0, sizes, tuple(sections))
    is_heads = bool(context.projection) and leaf in ("A_log", "D", "dt_bias")
    dim = 0 if is_heads else _dim_of(module, last, leaf, tensor)
    if dim is None or context.tp.size == 1:
        return None
    is_gate_up = last == "linear_fc1" and context.is_gated and dim == 0
    count = 2 if is_gate_up else max(1, getattr(tensor, "partition_stride", 1))
    return _Cut(dim, (tensor.shape[dim] // count,) * count)


def _dim_of(module: Any, last: str, leaf: str, tensor: torch.Tensor) -> int | None:
    """The dimension that tensor parallelism cuts; None if every rank holds the whole tensor.

    The class decides before attributes of the tensor do: Transformer Engine also marks weights as
    cut that every rank holds whole, and does not mark grouped weights. Of grouped weights, that of
    gate and up is cut by rows, the other by columns.
    """
    mode = getattr(module, "parallel_mode", None)
    if hasattr(module, "num_gemms"):
        mode = {"linear_fc1": "column", "linear_fc2": "row"}.get(last, mode)
    classes = " ".join(base.__name__ for base in type(module).__mro__)
    is_weight = leaf.startswith("weight")
    if is_weight or leaf.startswith("bias"):
        if mode == "column" or "ColumnParallel" in classes or "VocabParallel" in classes:
            return 0
        if mode == "row" or "RowParallel" in classes:
            return 1 if is_weight else None
    if hasattr(module, "parallel_mode") or not getattr(tensor, "tensor_model_parallel", False):
        return None
    dim = getattr(tensor, "partition_dim", 0)
    return dim if isinstance(dim, int) and dim >= 0 else None


def _value(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The values of a tensor; raises `SourceError` if it is not a plain tensor in memory."""
    value = tensor.detach()
    is_plain = type(value) is torch.Tensor
    if not is_plain or value.dtype not in DTYPE_NAMES:
        kind = str(value.dtype) if is_plain else type(value).__name__
        raise SourceError(
            f"{name}: is {kind}, not a plain tensor: quantized in memory, or sharded by FSDP. "
            "Keep parameters in BF16, FP16 or FP32 (no fp8_param), without FSDP."
        )
    if value.is_meta or (value.numel() and not value.untyped_storage().nbytes()):
        raise SourceError(f"{name}: has no values in memory. Load the model's weights before.")
    return value
