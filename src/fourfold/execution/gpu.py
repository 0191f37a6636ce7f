# SPDX-License-Identifier: Apache-2.0
"""Scale groups quantized on a GPU, many of them at a time.

    disk ─read─▶ pinned ─copy─▶ device: largest magnitudes ─▶ host: group scales
                                device: codes, scales ─copy─▶ pinned ─write─▶ shard

Everything between two waits is queued on the worker's own stream: the device works for one worker
while the others read, write and copy. A batch is written when all of it was computed, so that it
can be done again if memory runs out. Its bytes are those of the CPU.

Shapes: N weights of one size, dtype and scheme; X elements of each; P bytes of one part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from traceback import clear_frames

import numpy as np
import torch

from fourfold.algorithms.base import Figures
from fourfold.execution.context import ExecutionContext
from fourfold.execution.cpu import (
    CPUBackend,
    CPUKernels,
    contiguous,
    cpu_kernels,
    label_of,
    slab_bytes,
)
from fourfold.execution.results import LinearResult, finish_group, row_tensors
from fourfold.execution.stacks import StackBackend
from fourfold.execution.streams import (
    BufferPool,
    BufferSet,
    Need,
    can_batch,
    is_out_of_memory,
    need_of,
    part_bytes,
    rows_that_fit,
)
from fourfold.formats.base import FORMATS
from fourfold.models.inventory import LinearWeight
from fourfold.models.regions import Region
from fourfold.planning import ScaleGroup
from fourfold.storage.shard_file import ShardFile
from fourfold.storage.units import size


class GPUBackend:
    """Quantizes scale groups on a GPU, and those that do not fit there on the CPU."""

    def __init__(self, context: ExecutionContext, pool: BufferPool, cpu: CPUBackend) -> None:
        self.context, self.pool, self.cpu = context, pool, cpu
        self.buffers = BufferSet(pool.device)
        self.stacks = StackBackend(context, pool, cpu)

    def run(self, file: ShardFile, groups: Sequence[ScaleGroup]) -> list[LinearResult]:
        """Quantize some groups of a shard, in batches that fit."""
        waiting = [group for group in groups if can_batch(group)]
        others = [group for group in groups if not can_batch(group)]
        results = self.stacks.run(file, others)
        while waiting:
            room = self.pool.room
            needs = accumulate(need_of(group, self.context.source.tensors) for group in waiting)
            batch = waiting[: max(1, sum(need.room <= room for need in needs))]
            done = self._try(file, batch, room)
            if done is None and self.pool.halve(room):
                continue
            if done is None:
                self.pool.leave_to_cpu(batch[0].name, "out of memory")
                done = self.cpu.run(file, batch)
            results += done
            del waiting[: len(batch)]
        return results

    def free(self) -> None:
        """Give the memory back."""
        self.cpu.free()
        self.buffers.free()

    def _try(
        self, file: ShardFile, batch: Sequence[ScaleGroup], room: int
    ) -> list[LinearResult] | None:
        """Do a batch; None if memory ran out, and everything that the batch took was freed."""
        try:
            return self._do(file, batch, room)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            clear_frames(error.__traceback__)  # they hold buffers, and may be in a cycle
        self.buffers.free()
        return None

    def _do(self, file: ShardFile, batch: Sequence[ScaleGroup], room: int) -> list[LinearResult]:
        tensors = self.context.source.tensors
        need = sum((need_of(group, tensors) for group in batch), Need())
        if need.room <= room:
            self.buffers.begin(room)
            return _Batch(self.context, file, batch, self.buffers, need).run()
        (group,) = batch  # one that does not fit is alone
        fmt = FORMATS[group.scheme.weights]
        for linear in group.linears:
            itemsize = tensors[linear.region.key].torch_dtype.itemsize
            if not rows_that_fit(fmt, room, linear.shape[1], itemsize):
                reason = f"{size(self.pool.nbytes)} of its memory are too little"
                self.pool.leave_to_cpu(linear.name, reason)
                return self.cpu.run(file, batch)
        cpu = cpu_kernels(self.context, group)
        kernels = GPUKernels(cpu.format, cpu.scale, cpu.computing, self.buffers, room)
        return self.cpu.quantize(file, group, kernels)


class _Stack:
    """Weights of one size and dtype on the device, and their parts, there and on the host."""

    def __init__(
        self,
        buffers: BufferSet,
        kernels: CPUKernels,
        count: int,
        numel: int,
        dtype: torch.dtype,
    ) -> None:
        self.buffers, self.kernels = buffers, kernels
        sizes = part_bytes(kernels.format, numel)
        onboard, host = buffers.onboard, buffers.host
        self.w_NX = onboard.take(count * numel * dtype.itemsize).view(dtype).view(count, numel)
        self._parts = [onboard.take(count * nbytes).view(count, nbytes) for nbytes in sizes]
        self._group_scales = onboard.take(4 * count).view(torch.float32)
        self._workspace = onboard.take(kernels.format.workspace_bytes(count, numel))
        self.parts_NP = [host.take(count * nbytes).view(count, nbytes) for nbytes in sizes]
        """The row parts on the host, in the order of the format."""
        self.group_scales = host.take(4 * count).view(torch.float32)
        self.amaxes = host.take(4 * count).view(torch.float32)
        self.figures = host.take(16 * count).view(torch.float64).view(count, 2)

    def find_amaxes(self) -> None:
        """Queue the search for the largest magnitudes; they are in `amaxes` after a wait."""
        with self.buffers.streaming():
            self.amaxes.copy_(self.kernels.format.amaxes(self.w_NX), non_blocking=True)

    def quantize(self) -> None:
        """Queue the quantization with `group_scales`; parts and figures are there after a wait."""
        with self.buffers.streaming():
            self._group_scales.copy_(self.group_scales, non_blocking=True)
            figures = self.kernels.format.quantize_batch(
                self.w_NX,
                self._parts,
                scale=self.kernels.scale,
                group_scales=self._group_scales,
                workspace=self._workspace,
            )
            for host, onboard in zip(self.parts_NP, self._parts, strict=True):
                host.copy_(onboard, non_blocking=True)
            self.figures.copy_(figures, non_blocking=True)

    def out(self, n: int, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """The host's buffers of weight `n` as `WeightFormat.quantize` takes them."""
        names = self.kernels.format.row_parts(shape)
        return {
            name: part_NP[n].view(shape[0], -1)
            for name, part_NP in zip(names, self.parts_NP, strict=True)
        }


class _Batch:
    """Some scale groups, quantized together."""

    def __init__(
        self,
        context: ExecutionContext,
        file: ShardFile,
        groups: Sequence[ScaleGroup],
        buffers: BufferSet,
        need: Need,
    ) -> None:
        self.context, self.file, self.groups, self.buffers = context, file, groups, buffers
        self.tensors = context.source.tensors
        self._scratch = buffers.onboard.take(need.scratch)
        self._in_scratch: tuple[str, int, int] | None = None
        self._slabs: dict[tuple[str, int, int], torch.Tensor] = {}
        self._group_of = {linear.name: group for group in groups for linear in group.linears}
        self.stacks = list(self._stacked())

    def run(self) -> list[LinearResult]:
        self._load()
        figures = self._amaxes()
        scales: dict[str, float | None] = {}
        for group in self.groups:
            amax = max(figures[linear.name].amax for linear in group.linears)
            scale = FORMATS[group.scheme.weights].group_scale(amax)
            scales |= dict.fromkeys((linear.name for linear in group.linears), scale)
        self._quantize(scales, figures)
        self._write()
        results = []
        for group in self.groups:
            scale = scales[group.linears[0].name]
            results += finish_group(self.context, self.file, group, scale, figures)
        return results

    def _stacked(self) -> Iterator[tuple[list[LinearWeight], _Stack]]:
        """The groups' weights, those that are alike together, in their order."""
        alike = defaultdict(list)
        for group in self.groups:
            for linear in group.linears:
                dtype = self.tensors[linear.region.key].torch_dtype
                alike[math.prod(linear.shape), dtype, group.scheme].append(linear)
        for (numel, dtype, _), linears in alike.items():
            kernels = cpu_kernels(self.context, self._group_of[linears[0].name])
            yield linears, _Stack(self.buffers, kernels, len(linears), numel, dtype)

    def _load(self) -> None:
        """Read all weights, and queue their copies: each is copied while the next is read."""
        for linears, stack in self.stacks:
            for linear, w_X in zip(linears, stack.w_NX, strict=True):
                slab = self._slab(linear.region)  # outside the stream: a live source has its own
                with self.buffers.streaming():
                    self._place(linear.region, slab, w_X.view(linear.shape))

    def _slab(self, region: Region) -> torch.Tensor:
        """The slab that a region lies in, in pinned memory."""
        held = self._slabs.get((region.key, *region.slab))
        if held is not None:
            return held
        buffer = self.buffers.host.take(slab_bytes(self.tensors[region.key], *region.slab))
        slab = self.context.source.slab(region.key, *region.slab, buffer.numpy())
        # The same memory as `slab`, but as the tensor that PyTorch knows to be pinned.
        pinned = buffer.view(slab.dtype).view(slab.shape)
        self._slabs[region.key, *region.slab] = pinned
        return pinned

    def _place(self, region: Region, slab: torch.Tensor, out_OI: torch.Tensor) -> None:
        """Queue the copy of a weight into its stack; a strided one is made contiguous there."""
        matrix = region.view(slab)
        if not matrix.is_contiguous():
            there = self._scratch[: slab.nbytes].view(slab.dtype).view(slab.shape)
            if self._in_scratch != (region.key, *region.slab):
                there.copy_(slab, non_blocking=True)
                self._in_scratch = (region.key, *region.slab)
            matrix = region.view(there)
        out_OI.copy_(matrix, non_blocking=True)

    def _amaxes(self) -> dict[str, Figures]:
        """The largest magnitude of each weight; `NonFiniteError` for NaN and Inf."""
        for _, stack in self.stacks:
            stack.find_amaxes()
        self.buffers.wait()
        figures = {}
        for linears, stack in self.stacks:
            for linear, amax in zip(linears, stack.amaxes.tolist(), strict=True):
                if not math.isfinite(amax):
                    label = label_of(linear, self.tensors[linear.region.key])
                    amax = stack.kernels.amax(self._matrix(linear), label)
                figures[linear.name] = Figures(amax)
        return figures

    def _quantize(self, scales: Mapping[str, float | None], figures: Mapping[str, Figures]) -> None:
        """Compute the parts of all weights into pinned memory, and complete their figures."""
        for linears, stack in self.stacks:
            for n, linear in enumerate(linears):
                stack.group_scales[n] = scales[linear.name] or 1.0
            stack.quantize()
        self.buffers.wait()
        for linears, stack in self.stacks:
            for n, (linear, sums) in enumerate(zip(linears, stack.figures.tolist(), strict=True)):
                if not all(map(math.isfinite, sums)):
                    w_OI, out = self._matrix(linear), stack.out(n, linear.shape)
                    sums = stack.kernels.quantize(w_OI, out, scales[linear.name], linear.name)
                figures[linear.name].sum_sq_err, figures[linear.name].sum_sq_w = sums

    def _write(self) -> None:
        for linears, stack in self.stacks:
            for n, linear in enumerate(linears):
                tensors = row_tensors(self.context, self._group_of[linear.name], linear)
                for tensor, part_NP in zip(tensors, stack.parts_NP, strict=True):
                    self.file.write(tensor.name, part_NP[n].numpy())

    def _matrix(self, linear: LinearWeight) -> torch.Tensor:
        """A weight as it lies in the host's memory."""
        return linear.region.view(self._slab(linear.region))


@dataclass(frozen=True)
class GPUKernels(CPUKernels):
    """Quantizes weights that are too large for a batch on the GPU, some rows at a time; on the CPU
    those of which the GPU finds no finite figures."""

    buffers: BufferSet
    room: int

    def amax(self, w_OI: torch.Tensor, name: str) -> float:
        largest = 0.0
        for _, stack in self._parts(w_OI):
            stack.find_amaxes()
            self.buffers.wait()
            amax = float(stack.amaxes[0])
            if not math.isfinite(amax):
                return super().amax(w_OI, name)
            largest = max(largest, amax)
        return largest

    def quantize(
        self,
        w_OI: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        group_scale: float | None,
        name: str,
    ) -> tuple[float, float]:
        error = energy = 0.0
        for rows, stack in self._parts(w_OI):
            stack.group_scales[0] = group_scale or 1.0
            stack.quantize()
            self.buffers.wait()
            for buffer, part_NP in zip(out.values(), stack.parts_NP, strict=True):
                np.copyto(buffer[rows].numpy().reshape(-1), part_NP[0].numpy())
            error, energy = error + float(stack.figures[0, 0]), energy + float(stack.figures[0, 1])
        if math.isfinite(error) and math.isfinite(energy):
            return error, energy
        return super().quantize(w_OI, out, group_scale, name)

    def _parts(self, w_OI: torch.Tensor) -> Iterator[tuple[slice, _Stack]]:
        """Yield as many rows as fit, on their way to the device; then the next ones."""
        step = rows_that_fit(self.format, self.room, w_OI.shape[1], w_OI.itemsize)
        for begin in range(0, len(w_OI), step):
            part = w_OI[begin : begin + step]
            self.buffers.begin(self.room)
            stack = _Stack(self.buffers, self, 1, part.numel(), part.dtype)
            staged = contiguous(part, self.buffers.host)
            with self.buffers.streaming():
                stack.w_NX.view(part.shape).copy_(staged, non_blocking=True)
            yield slice(begin, begin + len(part)), stack
