"""What a rank's part of a Megatron model holds: parameters, and where in the whole they lie.

Names become those of the whole model, and local numbers global ones:

    decoder.layers.0                  the module's own `layer_number`, whatever stage or chunk
    experts.linear_fc1.weight3        grouped: `num_gemms` experts, `weight0` and on
    experts.local_experts.3           sequential: a module each; expert = ep_rank · local + 3
    self_attention.in_proj, conv1d    a delta net: queries, keys, values … of this rank's heads

A tensor-parallel slice is a box of the whole: rows of column-parallel layers and of vocabularies,
columns of row-parallel ones. A gated fc1 is two boxes, gate rows and up rows, halves of its own.

All of it is read off the modules: their parts, their attributes, the names of their classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fourfold.errors import SourceError, UsageError
from fourfold.sources.megatron.live.places import EXPERT, EXPERT_TENSOR, TENSOR, Place, place
from fourfold.storage.safetensors_header import DTYPE_NAMES

IN_PROJ = ("query", "key", "value", "z", "beta", "alpha")
"""What the rows of a delta net's projection are, in order; its convolution has the first three."""

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a parameter that this rank has."""

    offsets: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Local:
    """A parameter of the whole model, and what this rank has of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class _Here:
    """Where a walk through the modules is."""

    model: Any
    tp: Place
    ep: Place
    is_gated: bool = False
    tied: str | None = None
    """The prefix of a model whose head is its embedding."""
    sections: tuple[int, ...] = ()
    """Rows of this rank's part of a delta net's projection."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a tensor is cut: along which dimension, and in which sections, named or not."""

    dim: int | None = None
    sections: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


def is_megatron(model: Any) -> bool:
    """Whether this is a Megatron model, or its chunks: their configuration says so."""
    if isinstance(model, list | tuple):
        return bool(model) and all(map(is_megatron, model))
    config = getattr(_unwrapped(model), "config", None)
    fields = ("num_layers", "hidden_size", TENSOR.field, EXPERT.field)
    return isinstance(model, nn.Module) and all(hasattr(config, field) for field in fields)


def chunks_of(model: Any) -> list[Any]:
    """The parts of the model that this rank has, out of what DDP and Float16Module made of them."""
    return [_unwrapped(each) for each in (model if isinstance(model, list | tuple) else [model])]


def _unwrapped(model: Any) -> Any:
    while not hasattr(model, "decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def local_parameters(chunks: Sequence[Any]) -> Iterator[Local]:
    """Everything that this rank has of the model.

    Raises `SourceError` for what cannot be read: packed experts, FSDP, quantized weights.
    """
    for model in chunks:
        here = _Here(model, place(TENSOR, model, model), Place())
        yield from _walk(model, "", here)


def _walk(module: Any, name: str, here: _Here) -> Iterator[Local]:
    config = getattr(module, "config", None)
    here = replace(here, is_gated=getattr(config, "gated_linear_unit", here.is_gated))
    if getattr(module, "share_embeddings_and_output_weights", False):
        here = replace(here, tied=name)
    if _is_delta_net(module):
        here = replace(here, sections=_sections_of(module, name, here.tp))
    for leaf, tensor in _own(module):
        yield from _cut_out(module, name, leaf, tensor, here)
    for child_name, child in module.named_children():
        yield from _walk(child, *_entered(module, name, child_name, child, here))


def _entered(module: Any, name: str, child_name: str, child: Any, here: _Here) -> tuple[str, _Here]:
    """The name of a module in the whole model, and what is known inside of it."""
    number = getattr(child, "layer_number", None)
    if isinstance(module, nn.ModuleList) and isinstance(number, int):
        return f"{name}{number - 1}.", here
    if isinstance(module, nn.ModuleList) and name.endswith(".local_experts."):
        expert = here.ep.rank * len(module) + int(child_name)
        return f"{name.removesuffix('local_experts.')}{expert}.", here
    if _is_experts(child_name, child):
        _check_experts(child, f"{name}{child_name}")
        tp, ep = place(EXPERT_TENSOR, child, here.model), place(EXPERT, child, here.model)
        return f"{name}{child_name}.", replace(here, tp=tp, ep=ep)
    return f"{name}{child_name}.", here


def _is_experts(name: str, module: Any) -> bool:
    return (
        name == "experts"
        or isinstance(getattr(module, "local_experts", None), nn.ModuleList)
        or any(hasattr(child, "num_gemms") for child in module.children())
    )


def _check_experts(module: Any, name: str) -> None:
    """Each expert has a weight of its own."""
    linears = [each for each in module.children() if hasattr(each, "num_gemms")]
    packed = [each for each in linears if not hasattr(each, f"weight{each.num_gemms - 1}")]
    if hasattr(module, "weight1") or packed:
        raise SourceError(
            f"{name}: {type(packed[0] if packed else module).__name__} packs all experts in one "
            "weight, which no rule takes apart. Build the model with TEGroupedMLP (weight0, "
            "weight1, …) or SequentialMLP."
        )


def _is_delta_net(module: Any) -> bool:
    parts = ("A_log", "dt_bias", "in_proj", "conv1d", "out_proj")
    return all(hasattr(module, part) for part in parts)


def _sections_of(module: Any, name: str, tp: Place) -> tuple[int, ...]:
    """Rows of queries, keys, values, z, beta, alpha in this rank's projection."""
    try:
        qk, v, heads = module.qk_dim, module.v_dim, module.num_value_heads
    except AttributeError as error:
        raise SourceError(
            f"{name.removesuffix('.')}: {type(module).__name__} has no {error.name}, so its "
            "projection cannot be taken apart. Which version of Megatron is it from?"
        ) from None
    return tuple(size // tp.size for size in (qk, qk, v, v, heads, heads))


def _own(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters and buffers, those that a checkpoint keeps."""
    for leaf, tensor in module._parameters.items():
        if tensor is not None:
            yield leaf, tensor
    for leaf, tensor in module._buffers.items():
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, tensor


def _cut_out(
    module: Any, name: str, leaf: str, tensor: torch.Tensor, here: _Here
) -> Iterator[Local]:
    """A tensor of this rank as a parameter of the whole model, or as several."""
    value = _value(tensor, name + leaf)
    cut = _cut_of(module, name, leaf, tensor, here)
    whole = _whole_name(module, name, leaf, here)
    dtype, shape = DTYPE_NAMES[value.dtype], tuple(value.shape)
    if cut.dim is None:
        yield Local(whole, dtype, shape, (Part((0,) * len(shape), value),))
        return
    if sum(cut.sections) != shape[cut.dim]:
        raise SourceError(
            f"{name}{leaf} {list(shape)}: should have {sum(cut.sections)} rows here: "
            f"{', '.join(map(str, cut.sections))}. Which version of Megatron is it from?"
        )
    parts, at, first = [], 0, 0
    for number, size in enumerate(cut.sections):
        offsets = [0] * len(shape)
        offsets[cut.dim] = first + here.tp.rank * size
        parts.append(Part(tuple(offsets), value.narrow(cut.dim, at, size)))
        at += size
        if cut.names:
            part = parts.pop()
            yield Local(f"{whole}.{cut.names[number]}", dtype, _grown(part, cut.dim, here), (part,))
        else:
            first += size * here.tp.size
    if parts:
        grown = tuple(
            size * here.tp.size if dim == cut.dim else size for dim, size in enumerate(shape)
        )
        yield Local(whole, dtype, grown, tuple(parts))


def _grown(part: Part, dim: int, here: _Here) -> tuple[int, ...]:
    """The shape of what all tensor-parallel ranks have of it."""
    shape = list(part.tensor.shape)
    shape[dim] *= here.tp.size
    return tuple(shape)


def _whole_name(module: Any, name: str, leaf: str, here: _Here) -> str:
    if here.tied is not None and name + leaf == here.tied + HEAD:
        return here.tied + EMBEDDING
    kind = leaf.rstrip("0123456789")
    if hasattr(module, "num_gemms") and kind in ("weight", "bias") and kind != leaf:
        expert = here.ep.rank * module.num_gemms + int(leaf.removeprefix(kind))
        experts, _, linear = name.removesuffix(".").rpartition(".")
        return f"{experts}.{expert}.{linear}.{kind}"
    return name + leaf


def _cut_of(module: Any, name: str, leaf: str, tensor: torch.Tensor, here: _Here) -> _Cut:
    last = name.removesuffix(".").rpartition(".")[2]
    if here.sections and last == "in_proj" and leaf in ("weight", "bias"):
        return _Cut(0, here.sections, IN_PROJ)
    if here.sections and last == "conv1d":
        return _Cut(0, here.sections[:3], IN_PROJ[:3])
    is_heads = bool(here.sections) and leaf in ("A_log", "dt_bias")
    dim = 0 if is_heads else _dim_of(module, last, leaf, tensor)
    if dim is None or here.tp.size == 1:
        return _Cut()
    size = tensor.shape[dim]
    is_gate_up = last == "linear_fc1" and here.is_gated and dim == 0
    count = 2 if is_gate_up else max(1, getattr(tensor, "partition_stride", 1))
    return _Cut(dim, (size // count,) * count)


def _dim_of(module: Any, last: str, leaf: str, tensor: torch.Tensor) -> int | None:
    """Which dimension tensor parallelism cuts; None for what every rank has whole.

    Classes come first: Transformer Engine marks weights that every rank has whole as cut, too, and
    grouped ones not at all; of these, the one of gate and up is cut by rows, the other by columns.
    """
    mode = getattr(module, "parallel_mode", None)
    if hasattr(module, "num_gemms"):
        mode = {"linear_fc1": "column", "linear_fc2": "row"}.get(last, mode)
    classes = [each.__name__ for each in type(module).__mro__]
    is_weight = leaf.startswith("weight")
    if is_weight or leaf.startswith("bias"):
        if mode == "column" or any("ColumnParallel" in x or "VocabParallel" in x for x in classes):
            return 0
        if mode == "row" or any("RowParallel" in x for x in classes):
            return 1 if is_weight else None
    if hasattr(module, "parallel_mode") or not getattr(tensor, "tensor_model_parallel", False):
        return None
    dim = getattr(tensor, "partition_dim", 0)
    return dim if isinstance(dim, int) and dim >= 0 else None


def _value(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The plain values of a tensor; raises `SourceError` where they are not here as such."""
    value = tensor.detach()
    if type(value) is not torch.Tensor or value.dtype not in DTYPE_NAMES:
        kind = type(value).__name__ if type(value) is not torch.Tensor else str(value.dtype)
        raise SourceError(
            f"{name}: is {kind}, no plain tensor: quantized in memory, or sharded by FSDP. "
            "Keep parameters in BF16, FP16 or FP32 (no fp8_param), without FSDP."
        )
    if value.is_meta or (value.numel() and not value.untyped_storage().nbytes()):
        raise SourceError(f"{name}: has no values in memory. Load the model's weights before.")
    return value


def arguments_of(chunks: Iterable[Any]) -> Mapping[str, Any]:
    """What the model's configuration says of how it computes, as a checkpoint's arguments do."""
    for model in chunks:
        config = model.config
        return {
            **vars(config),
            "norm_epsilon": getattr(config, "layernorm_epsilon", None),
            "rotary_base": _rotary_base(model, config),
            "group_query_attention": True,
        }
    raise UsageError("model: an empty list. Give the model's chunks.")


def _rotary_base(model: Any, config: Any) -> Any:
    """Latent attention has it in the configuration, others in the model."""
    if getattr(config, "multi_latent_attention", False):
        return getattr(config, "rotary_base", None)
    return getattr(model, "rotary_base", None)
