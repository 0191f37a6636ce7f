"""A worker: does the jobs of a shard one after another, in memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fourfold.execution.buffers import Arena
from fourfold.execution.context import ExecutionContext
from fourfold.execution.cpu import CPUBackend
from fourfold.execution.gpu import GPUBackend
from fourfold.execution.results import LinearResult
from fourfold.models.inventory import ExpertBias, RawTensor
from fourfold.planning import Job, KVScales, ScaleGroup
from fourfold.storage.shard_file import ShardFile


class Worker:
    """Copies tensors itself, and hands scale groups to the backend that quantizes."""

    def __init__(self, context: ExecutionContext) -> None:
        self.context, self.arena = context, Arena()
        self.backend: CPUBackend | GPUBackend = CPUBackend(context, self.arena)
        if context.pool is not None:
            self.backend = GPUBackend(context, context.pool, self.backend)

    def run(self, file: ShardFile, jobs: Sequence[Job]) -> list[LinearResult]:
        """Do some jobs of a shard.

        Returns:
            The figures of the linear weights that were quantized.
        """
        groups = []
        for job in jobs:
            if isinstance(job, ScaleGroup):
                groups.append(job)
            else:
                self._write(file, job)
        return self.backend.run(file, groups)

    def free(self) -> None:
        """Give the memory back, until there are jobs again."""
        self.backend.free()

    def _write(self, file: ShardFile, job: ExpertBias | RawTensor | KVScales) -> None:
        match job:
            case ExpertBias():
                slab = self.context.source.slab(job.region.key, *job.region.slab)
                bias = job.region.view(slab).contiguous()
                file.write(f"{job.name}.bias", bias.view(torch.uint8).numpy())
            case RawTensor():
                self._copy(file, job.info.key, job.info.nbytes)
            case KVScales():
                assert self.context.scales is not None
                values = self.context.scales.kv(job)
                for name, value in zip((job.k_name, job.v_name), values, strict=True):
                    file.write(name, np.array([value], dtype=np.float32))

    def _copy(self, file: ShardFile, key: str, nbytes: int) -> None:
        self.arena.reset()
        step = self.context.plan.limits.copy_bytes
        buffer = self.arena.take(min(nbytes, step)).numpy()
        for begin in range(0, nbytes, step):
            piece = buffer[: min(step, nbytes - begin)]
            self.context.source.read_bytes(key, begin, piece)
            file.write(key, piece, begin)
