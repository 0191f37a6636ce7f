"""What a worker does with a job on the CPU: a scale group, a tensor to copy, a bias.

A scale group is loaded once: amax over all of it, then codes and scales of each weight. One that
is too large for that is read twice, in pieces. Who computes is a choice of its own: the worker's
thread, or a device that takes the pieces row by row (`device.ByRows`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fourfold.calibration.scales import ActivationScales
from fourfold.execution.buffers import Arena
from fourfold.execution.results import Figures, LinearResult, finish_group, scalar
from fourfold.formats import nvfp4
from fourfold.formats.nvfp4.tensors import ScaleAlgorithm
from fourfold.layouts import modelopt
from fourfold.models.inventory import ExpertBias, LinearWeight, RawTensor
from fourfold.planning import (
    COPY_BYTES,
    GROUP_BYTES,
    Job,
    KVScales,
    ScaleGroup,
    is_plain,
    job_bytes,
)
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.shard_file import ShardFile
from fourfold.storage.source import Source


@dataclass(frozen=True)
class Task:
    """What all workers share."""

    source: Source
    scales: ActivationScales | None
    """Of activations, and of the KV cache; None where nothing was calibrated."""
    algorithm: ScaleAlgorithm
    is_w4a4: bool
    computing: threading.Semaphore
    """Held by those that compute on the CPU."""

    @property
    def input_scales(self) -> ActivationScales | None:
        """Of activations, where they are quantized."""
        return self.scales if self.is_w4a4 else None


class Computing(Protocol):
    """Where the weights of a scale group are quantized."""

    def amax(self, matrix_OI: torch.Tensor, name: str) -> float:
        """The largest magnitude; `NonFiniteError`, naming `name`, for NaN or Inf."""

    def quantize(
        self,
        matrix_OI: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        global_scale: float,
        name: str,
    ) -> tuple[float, float]:
        """Fill `codes` and `scales`; Σ(w − q·s·S)² and Σw²."""


@dataclass(frozen=True)
class OnHost:
    """Computes on the thread that asks, once it is among those that may."""

    algorithm: ScaleAlgorithm
    computing: threading.Semaphore

    def amax(self, matrix_OI: torch.Tensor, name: str) -> float:
        with self.computing:
            return nvfp4.amax(matrix_OI, name=name)

    def quantize(
        self,
        matrix_OI: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        global_scale: float,
        name: str,
    ) -> tuple[float, float]:
        with self.computing:
            stats = nvfp4.quantize_into(
                matrix_OI,
                codes,
                scales,
                scale=self.algorithm,
                global_scale=global_scale,
                name=name,
            )
        return stats.sum_sq_err, stats.sum_sq_w


class HostWorker:
    """Does jobs one at a time, in memory of its own."""

    def __init__(self, task: Task) -> None:
        self.task, self.arena = task, Arena()

    def run(self, file: ShardFile, jobs: Sequence[Job]) -> list[LinearResult]:
        """Do some jobs, and give the figures of the linear weights that they quantize."""
        return [result for job in jobs for result in self._run(file, job)]

    def run_group(
        self, file: ShardFile, group: ScaleGroup, computing: Computing
    ) -> list[LinearResult]:
        """Quantize one scale group that the host holds, or reads in pieces."""
        self.arena.reset()
        return _Group(self.task, file, group, self.arena, computing).run()

    def rest(self) -> None:
        """Give the memory back, until there are jobs again."""
        self.arena.free()

    def _run(self, file: ShardFile, job: Job) -> list[LinearResult]:
        task = self.task
        self.arena.reset()
        match job:
            case ScaleGroup():
                return self.run_group(file, job, OnHost(task.algorithm, task.computing))
            case ExpertBias():
                slab = task.source.slab(job.region.key, *job.region.slab)
                bias = job.region.view(slab).contiguous()
                file.write(f"{job.name}.bias", bias.view(torch.uint8).numpy())
            case RawTensor():
                _copy(task.source, file, job.info.key, job.info.nbytes, self.arena)
            case KVScales():
                assert task.scales is not None
                for name, value in zip((job.k_name, job.v_name), task.scales.kv(job), strict=True):
                    file.write(name, scalar(value))
        return []


def slab_bytes(info: TensorInfo, start: int, stop: int) -> int:
    """Bytes of a range of a tensor's first dimension."""
    return info.nbytes // info.shape[0] * (stop - start)


def label_of(linear: LinearWeight, info: TensorInfo, start: int = 0) -> str:
    """How an error names a weight, or its rows from `start` on."""
    rows = f", rows from {start}" if start else ""
    return f"{linear.name} ({info.key} in {info.file.name}{rows})"


def _copy(source: Source, file: ShardFile, key: str, nbytes: int, arena: Arena) -> None:
    buffer = arena.take(min(nbytes, COPY_BYTES)).numpy()
    for begin in range(0, nbytes, COPY_BYTES):
        piece = buffer[: min(COPY_BYTES, nbytes - begin)]
        source.read_bytes(key, begin, piece)
        file.write(key, piece, begin)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `start:stop` of a linear weight, read from rows `slab` of its raw tensor."""

    linear: LinearWeight
    start: int
    stop: int
    slab: tuple[int, int]


class _Group:
    """Quantizes one scale group: amax over all of it, then codes and scales of each weight."""

    def __init__(
        self, task: Task, file: ShardFile, group: ScaleGroup, arena: Arena, computing: Computing
    ) -> None:
        self.task, self.source, self.computing = task, task.source, computing
        self.file, self.group, self.arena = file, group, arena
        self.slabs: dict[tuple[str, int, int], torch.Tensor] = {}
        self.is_held = job_bytes(group) <= GROUP_BYTES

    def run(self) -> list[LinearResult]:
        pieces = [piece for linear in self.group.linears for piece in self._pieces(linear)]
        found = {linear.name: Figures() for linear in self.group.linears}
        for piece in pieces:
            with self._passing():
                amax = self.computing.amax(self._load(piece), self._label(piece))
            figures = found[piece.linear.name]
            figures.amax = max(figures.amax, amax)
        global_scale = nvfp4.global_scale(max(each.amax for each in found.values()))
        for piece in pieces:
            with self._passing():
                error, energy = self._quantize(piece, global_scale)
            found[piece.linear.name].sum_sq_err += error
            found[piece.linear.name].sum_sq_w += energy
        scales = self.task.input_scales
        return finish_group(self.file, scales, self.group.linears, global_scale, found)

    def _passing(self) -> AbstractContextManager[None]:
        """Of a group that is not held, memory holds one piece at a time."""
        return nullcontext() if self.is_held else self.arena.lent()

    def _pieces(self, linear: LinearWeight) -> Sequence[_Piece]:
        region, rows = linear.region, linear.shape[0]
        if self.is_held or not is_plain(region):
            return [_Piece(linear, 0, rows, region.slab)]
        step = max(1, GROUP_BYTES // 4 // slab_bytes(self.source.tensors[region.key], 0, 1))
        first = region.rows.start
        return [
            _Piece(linear, at, min(at + step, rows), (first + at, first + min(at + step, rows)))
            for at in range(0, rows, step)
        ]

    def _load(self, piece: _Piece) -> torch.Tensor:
        """The piece's rows `[out, in]`, contiguous along `in`."""
        region = piece.linear.region
        slab = self._slab(region.key, *piece.slab)
        if piece.slab == region.slab:
            matrix = region.view(slab)
        else:
            assert region.cols is not None
            matrix = slab[:, region.cols.slice]
        return matrix if matrix.stride(1) == 1 else _contiguous(matrix, self.arena)

    def _slab(self, key: str, start: int, stop: int) -> torch.Tensor:
        found = self.slabs.get((key, start, stop))
        if found is not None:
            return found
        buffer = self.arena.take(slab_bytes(self.source.tensors[key], start, stop))
        slab = self.source.slab(key, start, stop, buffer.numpy())
        if self.is_held:
            self.slabs[key, start, stop] = slab
        return slab

    def _label(self, piece: _Piece) -> str:
        info = self.source.tensors[piece.linear.region.key]
        return label_of(piece.linear, info, piece.start)

    def _quantize(self, piece: _Piece, global_scale: float) -> tuple[float, float]:
        matrix, name = self._load(piece), piece.linear.name
        rows, width = matrix.shape
        codes = self.arena.take(rows * width // 2).view(rows, width // 2)
        scales = self.arena.take(rows * width // 16).view(rows, width // 16)
        found = self.computing.quantize(matrix, codes, scales, global_scale, name)
        at = piece.start * width
        self.file.write(f"{name}.{modelopt.CODES}", codes.numpy(), at // 2)
        self.file.write(f"{name}.{modelopt.BLOCK_SCALE}", scales.numpy(), at // 16)
        return found


def _contiguous(matrix: torch.Tensor, arena: Arena) -> torch.Tensor:
    """A copy with contiguous rows, on this thread alone."""
    size = matrix.element_size()
    words = {2: torch.uint16, 4: torch.uint32}[size]
    copy = arena.take(matrix.numel() * size).view(words).view(matrix.shape)
    np.copyto(copy.numpy(), matrix.view(words).numpy())
    return copy.view(matrix.dtype)
