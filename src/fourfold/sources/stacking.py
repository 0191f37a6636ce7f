# SPDX-License-Identifier: Apache-2.0
"""NVFP4 experts one by one, presented stacked, as some layouts have them.

    source     experts.E.gate_proj.weight U8 [out, in/2], experts.E.gate_proj.weight_scale_2 []
    presented  experts.gate_up_proj U8 [E, 2·out, in/2], experts.gate_up_proj_weight_scale_2 [E, 2]

A stacked tensor is put together one expert at a time, as its rows are asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fourfold.errors import PlanError
from fourfold.layouts.modelopt import ModelOpt
from fourfold.layouts.stacks import Numbers, Stack
from fourfold.models.names import EXPERT_LINEAR
from fourfold.sources.relaid import RelaidSource
from fourfold.storage.safetensors_header import TensorInfo, nbytes_of
from fourfold.storage.source import Bytes, Source, SourceView, read_rounded

LEAVES = ModelOpt.suffixes["nvfp4"]
"""Last names of the tensors of one expert's linear layer, by part."""


class StackingSource(SourceView):
    """An NVFP4 checkpoint in ModelOpt's layout whose experts are presented stacked.

    Attributes:
        origins: The weight or other tensor of the decoded checkpoint that each tensor belongs to.
    """

    def __init__(self, source: RelaidSource, stacks: Sequence[Stack]) -> None:
        """Present `source`.

        Raises:
            PlanError: Some of a layer's experts are not quantized, have other shapes, or have
                global scales of their own where the stack has one for all.
        """
        super().__init__(source)
        self._members: dict[str, _Members] = {}
        infos: dict[str, Sequence[TensorInfo]] = {}
        for experts, linears in _modules(source.schemes).items():
            for stack in stacks:
                names = _linears(stack, experts, linears)
                if stack.numbers["global_scale"].per_layer:
                    _check_shared(names, source.group_scales)
                for part, suffix in _suffixes(stack, source, names[0][0]):
                    key = f"{stack.place(experts)}{suffix}"
                    members = [[f"{name}.{LEAVES[part]}" for name in row] for row in names]
                    infos |= dict.fromkeys((name for row in members for name in row), ())
                    self._members[key] = _Members(stack, stack.numbers.get(part), members)
                    infos[members[0][0]] = (self._stacked(key),)
        self.tensors = {
            info.key: info for key, own in source.tensors.items() for info in infos.get(key, (own,))
        }
        first = {key: members.names[0][0] for key, members in self._members.items()}
        self.origins = {key: source.origins[first.get(key, key)] for key in self.tensors}

    def _stacked(self, key: str) -> TensorInfo:
        members = self._members[key]
        infos = [self.source.tensors[name] for name in members.every]
        first, count, numbers = infos[0], len(members.names[0]), members.numbers
        if any(info.shape != first.shape for info in infos):
            raise PlanError(f"{key}: experts of several shapes, which no engine reads stacked.")
        shape: tuple[int, ...]
        if numbers is None:
            outputs, width = count * first.shape[0], first.shape[1]
            each = (width, outputs) if members.stack.is_transposed else (outputs, width)
            shape = len(members.names), *each
        elif numbers.per_layer:
            shape = ()
        else:
            shape = (len(members.names), *([count] if numbers.per_projection else []))
        stop = first.start + nbytes_of(first.dtype, shape)
        return replace(first, key=key, shape=shape, stop=stop)

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        if key not in self._members:
            return self.source.slab(key, start, stop, out)
        info, members = self.tensors[key], self._members[key]
        if members.numbers is None:
            rows = [self._matrix(members, expert) for expert in range(start, stop)]
        else:
            rows = [self._numbers(members, members.numbers, row) for row in range(start, stop)]
        data = torch.cat(rows).view(torch.uint8).view(-1)
        if out is not None:
            out[:] = data.numpy()
            data = torch.from_numpy(out)
        return data.view(info.torch_dtype).view(-1, *info.shape[1:])

    def _matrix(self, members: _Members, expert: int) -> torch.Tensor:
        """The bytes of one expert's rows."""
        parts = [self.source.read(name).view(torch.uint8) for name in members.names[expert]]
        joined = torch.stack(parts, dim=1) if members.stack.is_interleaved else torch.cat(parts)
        return (joined.T if members.stack.is_transposed else joined).flatten()

    def _numbers(self, members: _Members, numbers: Numbers, row: int) -> torch.Tensor:
        """The numbers of one expert, or the one of the layer: float32."""
        if numbers.per_layer:
            names: Sequence[str] = members.every
        else:
            names = members.names[row] if numbers.per_projection else members.names[row][:1]
        scales = torch.stack([self.source.read(name).reshape(()) for name in names])
        return (scales.max().view(1) if numbers.per_layer else scales) * numbers.factor

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        if key in self._members:
            read_rounded(partial(self.slab, key), self.tensors[key].row_bytes, start, out)
        else:
            self.source.read_bytes(key, start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        members = self._members.get(key)
        if members is None:
            self.source.will_need(key, start, stop)
        elif members.numbers is None:
            for name in [name for row in members.names[start:stop] for name in row]:
                self.source.will_need(name, 0, self.source.tensors[name].rows)

    def stored_keys(self, keys: Iterable[str]) -> Iterable[str]:
        members = {key: self._members.get(key) for key in keys}
        names = ([key] if x is None else x.every for key, x in members.items())
        return self.source.stored_keys([name for own in names for name in own])


@dataclass(frozen=True, slots=True)
class _Members:
    """The tensors that one stacked tensor is made of."""

    stack: Stack
    numbers: Numbers | None
    """None for codes and block scales."""
    names: Sequence[Sequence[str]]
    """By expert and projection."""

    @property
    def every(self) -> list[str]:
        return [name for row in self.names for name in row]


def _modules(linears: Iterable[str]) -> Mapping[str, set[str]]:
    """The linear layers of each experts module."""
    modules: dict[str, set[str]] = defaultdict(set)
    for linear in linears:
        if expert := EXPERT_LINEAR.match(linear):
            modules[expert["module"]].add(linear)
    return modules


def _linears(stack: Stack, experts: str, linears: Collection[str]) -> list[list[str]]:
    """The layers of a stack, by expert and projection."""
    matches = filter(None, map(EXPERT_LINEAR.match, linears))
    count = 1 + max(int(match["number"]) for match in matches)
    names = [[f"{experts}.{e}.{p}" for p in stack.projections] for e in range(count)]
    for name in [name for row in names for name in row]:
        if name not in linears:
            raise PlanError(
                f"{name}: not quantized, while other experts of the layer are. Engines read all "
                "of them stacked, or none."
            )
    return names


def _check_shared(names: Sequence[Sequence[str]], scales: Mapping[str, float]) -> None:
    first = names[0][0]
    for name in [name for row in names for name in row]:
        if scales[name] != scales[first]:
            raise PlanError(
                f"{name} has the global scale {scales[name]:.6g} and {first} {scales[first]:.6g}, "
                "but engines take one for all experts of a layer here. Quantize the model with "
                "weights: {scale_group: layer}."
            )


def _suffixes(stack: Stack, source: Source, linear: str) -> Iterator[tuple[str, str]]:
    """The parts of a stack that the checkpoint has, and what follows its name."""
    yield from stack.row_parts.items()
    for part, numbers in stack.numbers.items():
        if f"{linear}.{LEAVES[part]}" in source.tensors:
            yield part, numbers.suffix
