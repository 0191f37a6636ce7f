# SPDX-License-Identifier: Apache-2.0
"""Scale groups that are quantized before their shard is written.

A layer whose later weights depend on its earlier ones cannot be quantized in the order of its
shards. Its groups are quantized in the order that calibration asks for, into memory; the shards
take their bytes from here, and calibration takes their values to run the quantized layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fourfold.distributed.ranks import Ranks
from fourfold.execution.buffers import Arena
from fourfold.execution.context import ExecutionContext
from fourfold.execution.cpu import CPUBackend
from fourfold.execution.results import LinearResult
from fourfold.execution.stacks import StackBackend, stacks_of
from fourfold.execution.streams import can_stack
from fourfold.execution.threads import one_thread_each
from fourfold.formats.base import FORMATS
from fourfold.models.inventory import LinearWeight
from fourfold.planning import Plan, ScaleGroup
from fourfold.storage.safetensors_header import nbytes_of
from fourfold.storage.shard_file import ShardFile
from fourfold.storage.source import Bytes, Source, SourceView

SEPARATOR = ":"


@dataclass
class _Quantized:
    """What a group has become: its results, and the bytes of its tensors by name."""

    results: list[LinearResult]
    tensors: Mapping[str, Bytes]


@dataclass
class GroupsAhead:
    """Quantizes groups of one layer at a time, and keeps them until their shards are written."""

    context: ExecutionContext
    ranks: Ranks
    in_float32: bool
    """True if the values of weights are handed to the model unrounded, in float32."""
    _groups: dict[str, _Quantized] = field(default_factory=dict)
    _schemes: dict[str, ScaleGroup] = field(default_factory=dict)
    """By linear weight, the group that it belongs to."""

    def quantize(self, groups: Sequence[ScaleGroup]) -> None:
        """Quantize some groups; ranks share them out and exchange the results."""
        mine = self._portions(groups)[self.ranks.rank :: self.ranks.size]
        quantized: dict[str, _Quantized] = {}
        with ThreadPoolExecutor(self.context.threads) as pool, one_thread_each():
            for of_portion in pool.map(self._together, mine):
                quantized |= of_portion
        self._groups |= self._exchanged(quantized)
        self._schemes |= {linear.name: group for group in groups for linear in group.linears}

    def _exchanged(self, mine: Mapping[str, _Quantized]) -> dict[str, _Quantized]:
        """The groups of all ranks, given those of this one."""
        if self.ranks.size == 1:
            return dict(mine)
        results = {name: [asdict(x) for x in group.results] for name, group in mine.items()}
        sent = {
            f"{name}{SEPARATOR}{tensor}": torch.from_numpy(data)
            for name, group in mine.items()
            for tensor, data in group.tensors.items()
        }
        tensors: dict[str, dict[str, Bytes]] = defaultdict(dict)
        for key, data in self.ranks.reduce(sent, "max").items():  # others count as zeros
            name, _, tensor = key.partition(SEPARATOR)
            tensors[name][tensor] = data.numpy()
        return {
            name: _Quantized([*map(LinearResult.from_dict, dicts)], tensors[name])
            for of_rank in self.ranks.gather(results)
            for name, dicts in of_rank.items()
        }

    def _portions(self, groups: Sequence[ScaleGroup]) -> list[list[ScaleGroup]]:
        """The groups that are quantized at a time: each alone, or a stack on a GPU."""
        pool, plan = self.context.pool, self._plan
        if pool is None:
            return [[group] for group in groups]
        stackable = [group for group in groups if can_stack(plan, group)]
        alone = [[group] for group in groups if not can_stack(plan, group)]
        return [*stacks_of(stackable, pool.stack_room), *alone]

    def _together(self, groups: Sequence[ScaleGroup]) -> dict[str, _Quantized]:
        cpu, pool = CPUBackend(self.context, Arena()), self.context.pool
        file = _Memory(self._plan, groups)
        results, inexact = list[LinearResult](), list[ScaleGroup]()
        for group in groups:
            exact = cpu.cast(file, group)
            if exact is None:
                inexact.append(group)
            else:
                results += exact
        backend = cpu if pool is None else StackBackend(self.context, pool, cpu)
        results += backend.run(file, inexact)
        by_name = {result.name: result for result in results}
        return {
            group.name: _Quantized([by_name[x.name] for x in group.linears], tensors)
            for group, tensors in zip(groups, file.tensors, strict=True)
        }

    def write(self, file: ShardFile, group: ScaleGroup) -> list[LinearResult] | None:
        """Write a group that is quantized already; None if it is not."""
        quantized = self._groups.get(group.name)
        if quantized is None:
            return None
        for name, data in quantized.tensors.items():
            file.write(name, data)
        return quantized.results

    def clear(self) -> None:
        """Forget all groups: their layer is written."""
        self._groups.clear()
        self._schemes.clear()

    def has(self, linear: LinearWeight) -> bool:
        """True if a linear weight is quantized already."""
        return linear.name in self._schemes

    def values(self, linear: LinearWeight) -> torch.Tensor:
        """Return what a linear weight has become, float32 `[out, in]`."""
        group = self._schemes[linear.name]
        fmt, tensors = FORMATS[group.scheme.weights], self._groups[group.name].tensors
        specs = self._plan.layout.tensors(linear.name, linear.shape, group.scheme)
        parts = {
            part: torch.from_numpy(tensors[specs[part].name]).view(spec[1][0], -1)
            for part, spec in fmt.row_parts(linear.shape).items()
        }
        result = next(x for x in self._groups[group.name].results if x.name == linear.name)
        values_OI = torch.empty(linear.shape)
        fmt.dequantize(parts, result.global_scale, values_OI)
        return values_OI

    def source(self, source: Source) -> Source:
        """Return a view of a source in which these weights have their quantized values."""
        return _Replaced(source, self, self._plan.inventory.linears_by_key)

    @property
    def _plan(self) -> Plan:
        assert isinstance(self.context.plan, Plan)
        return self.context.plan


class _Memory(ShardFile):
    """Takes the bytes of the tensors of some groups in place of a file."""

    def __init__(self, plan: Plan, groups: Sequence[ScaleGroup]) -> None:
        self.tensors: list[dict[str, Bytes]] = [
            {
                spec.name: np.zeros(nbytes_of(spec.dtype, spec.shape), dtype=np.uint8)
                for linear in group.linears
                for spec in plan.layout.tensors(linear.name, linear.shape, group.scheme).values()
            }
            for group in groups
        ]
        """Of each group, by name."""
        self._all = {name: data for tensors in self.tensors for name, data in tensors.items()}

    def write(self, name: str, data: Any, offset: int = 0) -> None:
        flat = np.frombuffer(memoryview(data).cast("B"), dtype=np.uint8)
        self._all[name][offset : offset + len(flat)] = flat


class _Replaced(SourceView):
    """A source in which some linear weights have the values of their codes."""

    def __init__(
        self,
        source: Source,
        ahead: GroupsAhead,
        linears: Mapping[str, Sequence[LinearWeight]],
    ) -> None:
        super().__init__(source)
        self._ahead, self._linears = ahead, linears

    def read(self, key: str) -> torch.Tensor:
        tensor = self.source.read(key)
        linears = [x for x in self._linears.get(key, ()) if self._ahead.has(x)]
        if not linears:
            return tensor
        # 16 bits round the values, which a model that computes in them does anyway.
        dtype = torch.float32 if self._ahead.in_float32 else tensor.dtype
        tensor = tensor.to(dtype, copy=True)
        for linear in linears:
            start, stop = linear.region.slab
            linear.region.view(tensor[start:stop]).copy_(self._ahead.values(linear))
        return tensor
