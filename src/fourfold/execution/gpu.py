"""What a worker does with scale groups on a device: many of them in one go.

    disk ─read─▶ pinned ─copy─▶ device: largest magnitudes ─▶ host: global scales
                                device: codes, scales ─copy─▶ pinned ─write─▶ shard

Everything between two waits is queued on the worker's own stream: a device works for one worker
while the others read, write and copy. A batch is written when all of it was computed, so that it
can be done again where the memory runs out. Its bytes are those of the CPU.

Shapes: N weights of one size and dtype, X elements each; C bytes of codes, B block scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from traceback import clear_frames

import numpy as np
import torch

from fourfold.execution.cpu import HostWorker, OnHost, Task, label_of, slab_bytes
from fourfold.execution.results import Figures, LinearResult, finish_group
from fourfold.execution.streams import (
    Lane,
    Lanes,
    Need,
    fill,
    is_out_of_memory,
    need_of,
    rows_that_fit,
)
from fourfold.formats import nvfp4
from fourfold.formats.nvfp4.tensors import BLOCK_SIZE, ScaleAlgorithm
from fourfold.layouts import modelopt
from fourfold.models.inventory import LinearWeight
from fourfold.models.regions import Region
from fourfold.planning import Job, ScaleGroup
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.shard_file import ShardFile
from fourfold.storage.units import size


class DeviceWorker:
    """Does scale groups in a lane of a device, and every other job as on the CPU."""

    def __init__(self, task: Task, lanes: Lanes) -> None:
        self.task, self.lanes, self.lane = task, lanes, lanes.lane()
        self.host = HostWorker(task)
        self.on_host = OnHost(task.algorithm, task.computing)

    def run(self, file: ShardFile, jobs: Sequence[Job]) -> list[LinearResult]:
        """Do some jobs; the scale groups among them in batches that fit, smaller if need be."""
        waiting = [job for job in jobs if isinstance(job, ScaleGroup)]
        results = self.host.run(file, [job for job in jobs if not isinstance(job, ScaleGroup)])
        while waiting:
            room = self.lanes.room
            batch = fill(waiting, room, self.task.source.tensors)
            made = self._try(file, batch, room)
            if made is None and self.lanes.halve(room):
                continue
            if made is None:
                self.lanes.leave_to_host(batch[0].name, "out of memory")
                made = self.host.run(file, batch)
            results += made
            del waiting[: len(batch)]
        return results

    def rest(self) -> None:
        """Give the memory back, until there are jobs again."""
        self.host.rest()
        self.lane.free()

    def _try(
        self, file: ShardFile, batch: Sequence[ScaleGroup], room: int
    ) -> list[LinearResult] | None:
        """Do a batch; None where the memory ran out, and all that the batch had was given back."""
        try:
            return self._do(file, batch, room)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            clear_frames(error.__traceback__)  # they hold buffers, and may be in a cycle
        self.lane.free()
        return None

    def _do(self, file: ShardFile, batch: Sequence[ScaleGroup], room: int) -> list[LinearResult]:
        tensors = self.task.source.tensors
        need = sum((need_of(group, tensors) for group in batch), Need())
        if need.room <= room:
            self.lane.begin(room)
            return _Batch(self.task, file, batch, self.lane, self.on_host, need).run()
        (group,) = batch  # one that does not fit is alone
        for linear in group.linears:
            itemsize = tensors[linear.region.key].torch_dtype.itemsize
            if not rows_that_fit(room, linear.shape[1], itemsize):
                little = f"{size(self.lanes.nbytes)} of its memory are too little"
                self.lanes.leave_to_host(linear.name, little)
                return self.host.run(file, batch)
        return self.host.run_group(file, group, ByRows(self.lane, room, self.on_host))


class _Stack:
    """Weights of one size and dtype: on the device, and what is made of them, there and here."""

    def __init__(self, lane: Lane, count: int, numel: int, dtype: torch.dtype) -> None:
        self.lane = lane
        sizes = (numel // 2, numel // BLOCK_SIZE)
        onboard, host = lane.onboard, lane.host
        self.w_NX = onboard.take(count * numel * dtype.itemsize).view(dtype).view(count, numel)
        self._made = [onboard.take(count * each).view(count, each) for each in sizes]
        self._global_scales = onboard.take(4 * count).view(torch.float32)
        self._workspace = onboard.take(nvfp4.workspace_bytes(count, numel))
        self.codes_NC, self.scales_NB = (host.take(count * x).view(count, x) for x in sizes)
        self.global_scales = host.take(4 * count).view(torch.float32)
        self.amaxes = host.take(4 * count).view(torch.float32)
        self.figures = host.take(16 * count).view(torch.float64).view(count, 2)

    def find_amaxes(self) -> None:
        """Queue the search for the largest magnitudes: in `amaxes`, after a wait."""
        with self.lane.stream.current():
            self.amaxes.copy_(nvfp4.amaxes(self.w_NX), non_blocking=True)

    def quantize(self, algorithm: ScaleAlgorithm) -> None:
        """Queue the quantization with `global_scales`: codes, scales, figures, after a wait."""
        with self.lane.stream.current():
            self._global_scales.copy_(self.global_scales, non_blocking=True)
            figures = nvfp4.quantize_batch_into(
                self.w_NX,
                *self._made,
                scale=algorithm,
                global_scales=self._global_scales,
                workspace=self._workspace,
            )
            for host, made in zip((self.codes_NC, self.scales_NB), self._made, strict=True):
                host.copy_(made, non_blocking=True)
            self.figures.copy_(figures, non_blocking=True)


class _Batch:
    """Some scale groups, quantized in one go."""

    def __init__(
        self,
        task: Task,
        file: ShardFile,
        groups: Sequence[ScaleGroup],
        lane: Lane,
        on_host: OnHost,
        need: Need,
    ) -> None:
        self.task, self.file, self.groups, self.lane = task, file, groups, lane
        self.on_host = on_host
        self.tensors = task.source.tensors
        self._scratch = lane.onboard.take(need.scratch)
        self._in_scratch: tuple[str, int, int] | None = None
        self._slabs: dict[tuple[str, int, int], torch.Tensor] = {}
        self.stacks = list(_stacked(groups, self.tensors, lane))

    def run(self) -> list[LinearResult]:
        self._load()
        found = self._amaxes()
        global_scales = {
            linear.name: nvfp4.global_scale(max(found[x.name].amax for x in group.linears))
            for group in self.groups
            for linear in group.linears
        }
        self._quantize(global_scales, found)
        self._write()
        scales = self.task.input_scales
        return [
            result
            for group in self.groups
            for result in finish_group(
                self.file, scales, group.linears, global_scales[group.linears[0].name], found
            )
        ]

    def _load(self) -> None:
        """Read all weights, and queue their copies: each is on its way while the next is read."""
        for linears, stack in self.stacks:
            for linear, w_X in zip(linears, stack.w_NX, strict=True):
                slab = self._slab(linear.region)  # of a live model: not on this lane's stream
                with self.lane.stream.current():
                    self._place(linear.region, slab, w_X.view(linear.shape))

    def _slab(self, region: Region) -> torch.Tensor:
        """What a region lies in, in pinned memory."""
        found = self._slabs.get((region.key, *region.slab))
        if found is not None:
            return found
        buffer = self.lane.host.take(slab_bytes(self.tensors[region.key], *region.slab))
        slab = self.task.source.slab(region.key, *region.slab, buffer.numpy())
        self._slabs[region.key, *region.slab] = slab
        return slab

    def _place(self, region: Region, slab: torch.Tensor, out_OI: torch.Tensor) -> None:
        """Queue a weight's way into its stack; what is strided is made contiguous up there."""
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
        self.lane.stream.wait()
        found = {}
        for linears, stack in self.stacks:
            for linear, amax in zip(linears, stack.amaxes.tolist(), strict=True):
                if not math.isfinite(amax):
                    label = label_of(linear, self.tensors[linear.region.key])
                    amax = self.on_host.amax(self._matrix(linear), label)
                found[linear.name] = Figures(amax)
        return found

    def _quantize(self, global_scales: Mapping[str, float], found: Mapping[str, Figures]) -> None:
        """Codes and scales of all weights into pinned memory, figures into `found`."""
        for linears, stack in self.stacks:
            for n, linear in enumerate(linears):
                stack.global_scales[n] = global_scales[linear.name]
            stack.quantize(self.task.algorithm)
        self.lane.stream.wait()
        for linears, stack in self.stacks:
            for n, (linear, figures) in enumerate(
                zip(linears, stack.figures.tolist(), strict=True)
            ):
                if not all(map(math.isfinite, figures)):
                    rows = linear.shape[0]
                    figures = self.on_host.quantize(
                        self._matrix(linear),
                        stack.codes_NC[n].view(rows, -1),
                        stack.scales_NB[n].view(rows, -1),
                        global_scales[linear.name],
                        linear.name,
                    )
                found[linear.name].sum_sq_err, found[linear.name].sum_sq_w = figures

    def _write(self) -> None:
        for linears, stack in self.stacks:
            for n, linear in enumerate(linears):
                self.file.write(f"{linear.name}.{modelopt.CODES}", stack.codes_NC[n].numpy())
                self.file.write(f"{linear.name}.{modelopt.BLOCK_SCALE}", stack.scales_NB[n].numpy())

    def _matrix(self, linear: LinearWeight) -> torch.Tensor:
        """A weight as it lies in the host's memory."""
        return linear.region.view(self._slab(linear.region))


def _stacked(
    groups: Sequence[ScaleGroup], tensors: Mapping[str, TensorInfo], lane: Lane
) -> Iterator[tuple[list[LinearWeight], _Stack]]:
    """The groups' weights, those of one size and dtype together, in their order."""
    alike: dict[tuple[int, torch.dtype], list[LinearWeight]] = {}
    for group in groups:
        for linear in group.linears:
            kind = math.prod(linear.shape), tensors[linear.region.key].torch_dtype
            alike.setdefault(kind, []).append(linear)
    for (numel, dtype), linears in alike.items():
        yield linears, _Stack(lane, len(linears), numel, dtype)


class ByRows:
    """Computes weights that are too large for a lane there all the same, some rows at a time."""

    def __init__(self, lane: Lane, room: int, on_host: OnHost) -> None:
        """on_host: for what the device finds no figures of; it says what is wrong with it."""
        self.lane, self.room, self.on_host = lane, room, on_host

    def amax(self, matrix_OI: torch.Tensor, name: str) -> float:
        largest = 0.0
        for _, stack in self._parts(matrix_OI):
            stack.find_amaxes()
            self.lane.stream.wait()
            amax = float(stack.amaxes[0])
            if not math.isfinite(amax):
                return self.on_host.amax(matrix_OI, name)
            largest = max(largest, amax)
        return largest

    def quantize(
        self,
        matrix_OI: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        global_scale: float,
        name: str,
    ) -> tuple[float, float]:
        error = energy = 0.0
        for rows, stack in self._parts(matrix_OI):
            stack.global_scales[0] = global_scale
            stack.quantize(self.on_host.algorithm)
            self.lane.stream.wait()
            np.copyto(codes[rows].numpy().reshape(-1), stack.codes_NC[0].numpy())
            np.copyto(scales[rows].numpy().reshape(-1), stack.scales_NB[0].numpy())
            error, energy = error + float(stack.figures[0, 0]), energy + float(stack.figures[0, 1])
        if math.isfinite(error) and math.isfinite(energy):
            return error, energy
        return self.on_host.quantize(matrix_OI, codes, scales, global_scale, name)

    def _parts(self, matrix_OI: torch.Tensor) -> Iterator[tuple[slice, _Stack]]:
        """As many rows as fit, on their way to the device; and the next when these were dealt
        with."""
        rows, width = matrix_OI.shape
        step = rows_that_fit(self.room, width, matrix_OI.itemsize)
        for begin in range(0, rows, step):
            part = matrix_OI[begin : begin + step]
            self.lane.begin(self.room)
            stack = _Stack(self.lane, 1, part.numel(), part.dtype)
            staged = self.lane.host.take(part.nbytes).view(part.dtype).view(part.shape)
            words = {2: torch.int16, 4: torch.int32}[part.itemsize]
            np.copyto(staged.view(words).numpy(), part.view(words).numpy())
            with self.lane.stream.current():
                stack.w_NX.view(part.shape).copy_(staged, non_blocking=True)
            yield slice(begin, begin + len(part)), stack
