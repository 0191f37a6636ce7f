# SPDX-License-Identifier: Apache-2.0
"""Scale groups quantized on the CPU.

A group is loaded once: the largest magnitude over all of it first, then codes and scales of each
weight. A group that is too large to be held is read twice, in pieces, if its algorithm works row
by row. Who computes the pieces is a choice of its own: the worker's thread (`CPUKernels`), or a
GPU that takes some rows at a time (`gpu.GPUKernels`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from fourfold.algorithms.base import Figures, RowwiseAlgorithm, Weight, algorithm_of
from fourfold.execution.buffers import Arena
from fourfold.execution.context import ExecutionContext
from fourfold.execution.results import LinearResult, finish_group, row_tensors
from fourfold.formats.base import FORMATS, WeightFormat
from fourfold.models.inventory import LinearWeight
from fourfold.models.regions import as_slice
from fourfold.planning import ScaleGroup, is_fp8, is_mxfp4, job_bytes, mxfp4_scale
from fourfold.storage.safetensors_header import TensorInfo, nbytes_of
from fourfold.storage.shard_file import ShardFile

QuantizeGroups = Callable[[list[list[Weight]]], Sequence[tuple[float | None, list[Figures]]]]
"""Fills the buffers of the weights of some scale groups; returns what an algorithm does of each."""

Fill = Callable[[Mapping[str, torch.Tensor]], None]
"""Fills the buffers of row parts."""


@dataclass(frozen=True)
class CPUKernels:
    """Quantizes rows of weights on the calling thread, once it is among those that may compute."""

    format: WeightFormat
    scale: str
    computing: threading.Semaphore

    def amax(self, w_OI: torch.Tensor, name: str) -> float:
        """Return the largest magnitude. Raises `NonFiniteError`, naming `name`."""
        with self.computing:
            return self.format.amax(w_OI, name=name)

    def quantize(
        self,
        w_OI: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        group_scale: float | None,
        name: str,
    ) -> tuple[float, float]:
        """Fill the buffers of the row parts; return Σ(w − ŵ)² and Σw²."""
        with self.computing:
            return self.format.quantize(
                w_OI, out, scale=self.scale, group_scale=group_scale, name=name
            )


def cpu_kernels(context: ExecutionContext, group: ScaleGroup) -> CPUKernels:
    """Return the kernels of the CPU for a group whose algorithm works row by row."""
    algorithm = algorithm_of(group.scheme)
    assert isinstance(algorithm, RowwiseAlgorithm)
    return CPUKernels(FORMATS[group.scheme.weights], algorithm.scale, context.computing)


class CPUBackend:
    """Quantizes scale groups one at a time, in memory that is used again for the next."""

    def __init__(self, context: ExecutionContext, arena: Arena) -> None:
        self.context, self.arena = context, arena

    def run(self, file: ShardFile, groups: Sequence[ScaleGroup]) -> list[LinearResult]:
        """Quantize some groups of a shard."""
        return [result for group in groups for result in self.quantize(file, group)]

    def quantize(
        self, file: ShardFile, group: ScaleGroup, kernels: CPUKernels | None = None
    ) -> list[LinearResult]:
        """Quantize one group; `kernels` compute its rows, by default those of the CPU."""
        self.arena.reset()
        return _Group(self.context, file, group, self.arena).run(kernels)

    def quantize_together(
        self, file: ShardFile, groups: Sequence[ScaleGroup], quantize: QuantizeGroups
    ) -> list[LinearResult]:
        """Load some groups whole, let `quantize` quantize all of them, and write them."""
        self.arena.reset()
        loaded = [_Group(self.context, file, group, self.arena) for group in groups]
        weights = [group.weights() for group in loaded]
        results = []
        for group, of_group, (group_scale, figures) in zip(
            loaded, weights, quantize(weights), strict=True
        ):
            results += group.finish(of_group, group_scale, figures)
        return results

    def cast(self, file: ShardFile, group: ScaleGroup) -> list[LinearResult] | None:
        """Write the source's own codes of a group in MXFP4 or FP8; None unless that is exact."""
        self.arena.reset()
        if is_mxfp4(self.context.source, group):
            return _Group(self.context, file, group, self.arena).cast()
        if is_fp8(self.context.source, group):
            return _Group(self.context, file, group, self.arena).keep_fp8()
        return None

    def free(self) -> None:
        """Give the memory back."""
        self.arena.free()


def slab_bytes(info: TensorInfo, start: int, stop: int) -> int:
    """Return the bytes of a range of a tensor's first dimension."""
    return info.nbytes // info.shape[0] * (stop - start)


def label_of(linear: LinearWeight, info: TensorInfo, start: int = 0) -> str:
    """Return how an error names a weight, or its rows from `start` on."""
    rows = f", rows from {start}" if start else ""
    return f"{linear.name} ({info.key} in {info.file.name}{rows})"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a linear weight from `start` on, read from rows `slab` of its raw tensor."""

    linear: LinearWeight
    start: int
    slab: tuple[int, int]


class _Group:
    """One scale group while it is quantized."""

    def __init__(
        self, context: ExecutionContext, file: ShardFile, group: ScaleGroup, arena: Arena
    ) -> None:
        self.context, self.source = context, context.source
        self.file, self.group, self.arena = file, group, arena
        self.format = FORMATS[group.scheme.weights]
        self.algorithm = algorithm_of(group.scheme)
        self.slabs: dict[tuple[str, int, int], torch.Tensor] = {}
        is_rowwise = isinstance(self.algorithm, RowwiseAlgorithm)
        self.is_held = not is_rowwise or job_bytes(group) <= context.plan.limits.group_bytes

    def run(self, kernels: CPUKernels | None) -> list[LinearResult]:
        if isinstance(self.algorithm, RowwiseAlgorithm):
            group_scale, figures = self._by_rows(kernels or cpu_kernels(self.context, self.group))
            return finish_group(self.context, self.file, self.group, group_scale, figures)
        weights = self.weights()
        with self.context.computing:
            group_scale, of_weights = self.algorithm.quantize(weights, self.format)
        return self.finish(weights, group_scale, of_weights)

    def cast(self) -> list[LinearResult] | None:
        """Write the codes that the source has, if the format holds the whole group exactly."""
        group_scale = mxfp4_scale(self.source, self.group)
        if group_scale is None:
            return None
        scale = group_scale

        def fill(piece: _Piece) -> tuple[int, Fill]:
            region = piece.linear.region
            stored = self.source.mxfp4(region.key)
            assert stored is not None
            rows = region.outputs if piece.slab == region.slab else range(*piece.slab)
            codes, exponents = (of(region.expert, rows) for of in (stored.codes, stored.exponents))
            return len(codes), lambda out: self.format.from_mxfp4(codes, exponents, scale, out)

        return self._kept(fill, group_scale)

    def keep_fp8(self) -> list[LinearResult] | None:
        """Write the FP8 codes and scales that the source has, if the format allows it."""
        stored = {x.name: self.source.fp8(x.region.key) for x in self.group.linears}
        weights = {name: weight for name, weight in stored.items() if weight is not None}
        scales = [weights[x.name].scales(0, x.shape[0]).flatten() for x in self.group.linears]
        numbers = torch.cat(scales)
        if not self.format.holds_fp8(numbers):
            return None
        group_scale = None
        if self.format.group_part is not None:
            if numbers.min() != numbers.max():
                return None  # engines take one scale for what they fuse
            group_scale = float(numbers[0])

        def fill(piece: _Piece) -> tuple[int, Fill]:
            weight, (start, stop) = weights[piece.linear.name], piece.slab
            codes, of_rows = weight.codes(start, stop), weight.scales(start, stop)
            return stop - start, lambda out: self.format.from_fp8(codes, of_rows, out)

        return self._kept(fill, group_scale)

    def _kept(
        self,
        fill: Callable[[_Piece], tuple[int, Fill]],
        group_scale: float | None,
    ) -> list[LinearResult]:
        """Write the source's own codes; `fill` returns a piece's rows, and what fills buffers."""
        figures = {linear.name: Figures() for linear in self.group.linears}
        for piece in [piece for linear in self.group.linears for piece in self._pieces(linear)]:
            of_weight, name = figures[piece.linear.name], piece.linear.name
            with self._one_at_a_time():
                rows, fill_buffers = fill(piece)
                shape = (rows, piece.linear.shape[1])
                out = self._buffers(shape)
                w_OI = self.arena.take(4 * math.prod(shape)).view(torch.float32).view(shape)
                with self.context.computing:
                    fill_buffers(out)
                    self.format.dequantize(out, group_scale, w_OI)
                    of_weight.amax = max(of_weight.amax, self.format.amax(w_OI, name=name))
                    of_weight.sum_sq_w += self.format.error(w_OI, out, group_scale)[1]
                self._write(piece, out)
        return finish_group(self.context, self.file, self.group, group_scale, figures, exact=True)

    def weights(self) -> list[Weight]:
        """The whole group, for an algorithm that needs to see it at once."""
        scales = self.context.scales
        assert scales or not self.algorithm.needs, "such an algorithm needs calibration"
        return [
            Weight(
                linear.name,
                self._load(_Piece(linear, 0, linear.region.slab)),
                self._buffers(linear.shape),
                scales.statistics_of(linear) if scales and self.algorithm.needs else {},
                scales.asymmetry_of(linear) if scales else 0.0,
            )
            for linear in self.group.linears
        ]

    def finish(
        self, weights: Sequence[Weight], group_scale: float | None, figures: Sequence[Figures]
    ) -> list[LinearResult]:
        """Write the whole group, once an algorithm has filled the buffers of its weights."""
        linears = self.group.linears
        for weight, linear in zip(weights, linears, strict=True):
            self._write(_Piece(linear, 0, linear.region.slab), weight.out)
        by_name = dict(zip((x.name for x in linears), figures, strict=True))
        return finish_group(self.context, self.file, self.group, group_scale, by_name)

    def _by_rows(self, kernels: CPUKernels) -> tuple[float | None, dict[str, Figures]]:
        pieces = [piece for linear in self.group.linears for piece in self._pieces(linear)]
        figures = {linear.name: Figures() for linear in self.group.linears}
        for piece in pieces:
            info = self.source.tensors[piece.linear.region.key]
            with self._one_at_a_time():
                amax = kernels.amax(self._load(piece), label_of(piece.linear, info, piece.start))
            of_weight = figures[piece.linear.name]
            of_weight.amax = max(of_weight.amax, amax)
        group_scale = self.format.group_scale(max(x.amax for x in figures.values()))
        for piece in pieces:
            with self._one_at_a_time():
                w_OI = self._load(piece)
                out = self._buffers((w_OI.shape[0], w_OI.shape[1]))
                error, energy = kernels.quantize(w_OI, out, group_scale, piece.linear.name)
                self._write(piece, out)
            figures[piece.linear.name].sum_sq_err += error
            figures[piece.linear.name].sum_sq_w += energy
        return group_scale, figures

    def _one_at_a_time(self) -> AbstractContextManager[None]:
        """If the group is not held, give the memory of each piece back after it."""
        return nullcontext() if self.is_held else self.arena.lent()

    def _pieces(self, linear: LinearWeight) -> Sequence[_Piece]:
        region, rows = linear.region, linear.shape[0]
        if self.is_held or not region.is_plain:
            return [_Piece(linear, 0, region.slab)]
        row_bytes = slab_bytes(self.source.tensors[region.key], 0, 1)
        block = self.format.row_block
        step = max(1, self.context.plan.limits.group_bytes // 4 // (row_bytes * block)) * block
        first = region.rows.start
        return [
            _Piece(linear, at, (first + at, first + min(at + step, rows)))
            for at in range(0, rows, step)
        ]

    def _load(self, piece: _Piece) -> torch.Tensor:
        """The piece's rows `[out, in]`, contiguous along `in`."""
        region = piece.linear.region
        slab = self._slab(region.key, *piece.slab)
        if piece.slab == region.slab:
            w_OI = region.view(slab)
        else:
            assert region.cols is not None
            w_OI = slab[:, as_slice(region.cols)]
        return w_OI if w_OI.stride(1) == 1 else contiguous(w_OI, self.arena)

    def _slab(self, key: str, start: int, stop: int) -> torch.Tensor:
        held = self.slabs.get((key, start, stop))
        if held is not None:
            return held
        buffer = self.arena.take(slab_bytes(self.source.tensors[key], start, stop))
        slab = self.source.slab(key, start, stop, buffer.numpy())
        if self.is_held:
            self.slabs[key, start, stop] = slab
        return slab

    def _buffers(self, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Buffers for the row parts of some rows `[rows, in]`."""
        return {
            part: self.arena.take(nbytes_of(*spec)).view(spec[1][0], -1)
            for part, spec in self.format.row_parts(shape).items()
        }

    def _write(self, piece: _Piece, out: Mapping[str, torch.Tensor]) -> None:
        tensors = row_tensors(self.context, self.group, piece.linear)
        before = self.format.row_parts((piece.start, piece.linear.shape[1])).values()
        for tensor, buffer, spec in zip(tensors, out.values(), before, strict=True):
            self.file.write(tensor.name, buffer.numpy(), nbytes_of(*spec))


def contiguous(w_OI: torch.Tensor, arena: Arena) -> torch.Tensor:
    """Return a copy with contiguous rows, made on this thread alone."""
    words = {2: torch.uint16, 4: torch.uint32}[w_OI.itemsize]
    copy = arena.take(w_OI.nbytes).view(words).view(w_OI.shape)
    np.copyto(copy.numpy(), w_OI.view(words).numpy())
    return copy.view(w_OI.dtype)
