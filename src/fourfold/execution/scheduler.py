# SPDX-License-Identifier: Apache-2.0
"""The scheduler: hands jobs to workers, and opens, syncs and records the shards they fill.

A job is one scale group (a few MB: an expert's gate and up), one tensor to copy, or one bias.
Workers take jobs in the order of the source's bytes; each reads its slabs into its own arena,
computes there, and writes the result to the place in the shard that the plan has fixed. There are
a few more workers than may compute at a time: while some wait for the disk, others compute, so the
slower of disk and cores sets the pace. A worker has one job in memory, so memory is a few groups
whatever the model and however slow the disk; the bytes do not depend on the order of work. A full
shard is synced and renamed by a thread of its own, while the next one is filled.

On a GPU, a worker takes as many scale groups at a time as fit into its buffers there, or into a
stack.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np
import torch

from fourfold.algorithms.base import RowwiseAlgorithm, algorithm_of
from fourfold.errors import NonFiniteError
from fourfold.events import BytesCopied, BytesQuantized, ShardWritten
from fourfold.execution.buffers import Arena
from fourfold.execution.context import ExecutionContext
from fourfold.execution.cpu import CPUBackend
from fourfold.execution.gpu import GPUBackend
from fourfold.execution.results import LinearResult
from fourfold.execution.streams import Need, can_batch, can_stack, need_of, stack_bytes
from fourfold.execution.threads import one_thread_each
from fourfold.models.inventory import ExpertBias, RawTensor
from fourfold.models.roles import Role
from fourfold.planning import Job, KVScales, Plan, ScaleGroup, job_bytes, keys_of, slabs_of
from fourfold.storage.atomic import partial_of
from fourfold.storage.non_finite import Bytes, NonFinite, find_non_finite, merge
from fourfold.storage.shard_file import ShardFile
from fourfold.verification.evidence import Evidence, Prover


class Scheduler:
    """Executes a plan, or some of its shards. A context manager: shards that are not finished at
    its end keep their temporary names."""

    def __init__(
        self,
        context: ExecutionContext,
        shards: Iterable[int] | None = None,
        *,
        bytes_before: int = 0,
    ) -> None:
        """Create the workers; nothing is written yet.

        Args:
            context: The plan and everything that is needed to execute it.
            shards: Numbers of the shards that are written here; all by default.
            bytes_before: Bytes of the source that an earlier run has quantized, for the progress.
        """
        self.context, self.plan, self.source = context, context.plan, context.source
        self.limits = context.plan.limits
        self._workers = [_Worker(context, self._advance) for _ in range(context.workers)]
        self._unsynced = threading.Semaphore(self.limits.unsynced)
        self._jobs: Iterator[tuple[_OpenShard, Job]] = iter(())
        self._ahead: deque[tuple[_OpenShard, Job]] = deque()
        self._lock = threading.Lock()
        self._stopped = False
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: list[Future[None]] = []
        self._open: list[_OpenShard] = []
        self.shards = tuple(range(len(self.plan.shards)) if shards is None else shards)
        self._shards_done = self._bytes_done = 0
        jobs = (job for number in self.shards for job in self.plan.shards[number].jobs)
        self._bytes_total = sum(map(job_bytes, jobs))
        self._bytes_before, self._bytes_moved = bytes_before, 0
        self._counting = threading.Lock()
        self._advance(0)

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncer.shutdown(wait=True)
        for shard in self._open:
            shard.close()

    def run(self, shards: Iterable[int] | None = None) -> None:
        """Fill some shards.

        Args:
            shards: Numbers of shards, of which those are filled that are written here; all by
                default.

        Raises:
            FourfoldError: What the first worker that failed raised, after all workers have ended.
        """
        wanted = self.shards if shards is None else sorted(set(self.shards).intersection(shards))
        self._jobs = self._jobs_of(wanted)
        threads = one_thread_each() if self._has_whole_groups else nullcontext()
        workers = ThreadPoolExecutor(len(self._workers), thread_name_prefix="quantize")
        with threads, workers as pool:
            futures = [pool.submit(self._work, worker) for worker in self._workers]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                with self._lock:
                    self._stopped = True
                self.source.fetching.interrupt()
                raise
        for future in self._syncing:
            if future.done():
                future.result()

    @property
    def _has_whole_groups(self) -> bool:
        """True if an algorithm computes with whole groups, by PyTorch's matrix products."""
        groups = self.plan.groups if isinstance(self.plan, Plan) else ()
        schemes = {group.scheme for group in groups}
        return any(not isinstance(algorithm_of(x), RowwiseAlgorithm) for x in schemes)

    def finish(self) -> None:
        """Wait until every shard is on the disk. Raises what went wrong there."""
        for future in self._syncing:
            future.result()

    def _advance(self, nbytes: int) -> None:
        """Count bytes of the source that a worker has quantized or copied."""
        with self._counting:
            self._bytes_moved += nbytes
            done, total = self._bytes_moved, self._bytes_total
            before = self._bytes_before
            event = BytesQuantized if isinstance(self.plan, Plan) else BytesCopied
            self.context.on_event(event(before + done, before + total))

    def _jobs_of(self, shards: Iterable[int]) -> Iterator[tuple[_OpenShard, Job]]:
        for number in shards:
            shard = self.plan.shards[number]
            file = self.context.out.shard(self.plan.shard_names[number], shard.tensors)
            nbytes = sum(map(job_bytes, shard.jobs))
            prover = None
            if self.context.prover is not None:
                keys = {key for job in shard.jobs for key in keys_of(job)}
                prover = self.context.prover(partial_of(file.path), keys)
            opened = _OpenShard(file, shard.unit, len(shard.jobs), nbytes, prover)
            self._open.append(opened)
            for job in shard.jobs:
                yield opened, job

    def _next(self) -> tuple[_OpenShard, list[Job]] | None:
        """The next job; or the next scale groups of one shard, as many as a GPU takes together."""
        with self._lock:
            item = self._peek()
            if item is None:
                return None
            shard, jobs = item[0], [self._ahead.popleft()[1]]
            pool, need = self.context.pool, self._need_of(jobs[0])
            while pool and need and (item := self._peek()) is not None and item[0] is shard:
                more = self._need_of(item[1])
                if more is None or not pool.has_room(need + more):
                    break
                need += more
                jobs.append(self._ahead.popleft()[1])
            return shard, jobs

    def _need_of(self, job: Job) -> Need | None:
        """The room that a job needs on a GPU; None if it cannot be part of a batch or a stack."""
        if not self.context.pool or not isinstance(job, ScaleGroup):
            return None
        if can_batch(job):
            return need_of(job, self.source.tensors)
        assert isinstance(self.plan, Plan)
        return Need(stack=stack_bytes(job)) if can_stack(self.plan, job) else None

    def _peek(self) -> tuple[_OpenShard, Job] | None:
        """The job that comes next. The system is asked to read ahead for those that follow."""
        while len(self._ahead) < self.limits.lookahead and not self._stopped:
            item = next(self._jobs, None)
            if item is None:
                break
            if job_bytes(item[1]) <= self.limits.group_bytes:  # a larger one is read twice
                for key, start, stop in slabs_of(item[1]):
                    self.source.will_need(key, start, stop)
            self._ahead.append(item)
        return None if self._stopped or not self._ahead else self._ahead[0]

    def _work(self, worker: _Worker) -> None:
        """Do jobs until there are none, or something failed."""
        try:
            while (item := self._next()) is not None:
                if self.context.check is not None:
                    self.context.check()
                shard, jobs = item
                results = worker.run(shard.file, jobs)
                evidence = self._prove(shard, jobs)
                for job in jobs:
                    self.source.fetching.done_with(self.source.stored_keys(keys_of(job)))
                with self._lock:
                    shard.results += results
                    shard.evidence |= evidence
                    shard.non_finite += worker.take_non_finite()
                    shard.jobs_left -= len(jobs)
                    is_full = not shard.jobs_left
                if is_full:
                    self._unsynced.acquire()
                    self._syncing.append(self._syncer.submit(self._finish, shard))
        except BaseException:
            self._stopped = True
            raise
        finally:
            worker.backend.free()

    def _prove(self, shard: _OpenShard, jobs: Sequence[Job]) -> dict[str, Evidence]:
        """Compare what some jobs have written with the source, while it is at hand."""
        evidence: dict[str, Evidence] = {}
        if shard.prover is not None:
            for job in jobs:
                with self.context.computing:
                    evidence |= shard.prover.prove(*_written_by(job))
        return evidence

    def _finish(self, shard: _OpenShard) -> None:
        try:
            self.source.check_unchanged()
            linears = [asdict(result) for result in shard.results]
            non_finite = [*map(asdict, merge(shard.non_finite))]
            if self.context.strict:
                self._check_finite(shard.non_finite)
            record: dict[str, Any] = {"linears": linears}
            if non_finite:
                record["non_finite"] = non_finite
            if shard.prover is not None:
                shard.prover.close()
                record["evidence"] = {name: astuple(x) for name, x in shard.evidence.items()}
            self.context.out.finish_shard(shard.file, record)
            self._open.remove(shard)
            self._shards_done += 1
            self._bytes_done += shard.source_bytes
            done, total = self._shards_done, len(self.shards)
            progress = shard.unit, done, total, self._bytes_done, self._bytes_total
            self.context.on_event(ShardWritten(*progress))
        except BaseException:
            self._stopped = True
            raise
        finally:
            self._unsynced.release()

    def _check_finite(self, non_finite: Iterable[NonFinite]) -> None:
        """Raise for a tensor with NaN or Inf, other than an embedding: it may have unused rows."""
        for entry in non_finite:
            raw = self.plan.inventory.tensors.get(entry.name)
            if raw is None or raw.role is not Role.EMBEDDING:
                raise NonFiniteError(
                    f"{entry.name}: {entry}. It would be copied as it is in the source; mend that. "
                    "(An error because of `strict=True`.)"
                )


class _Worker:
    """Copies tensors itself, and hands scale groups to the backend that quantizes."""

    def __init__(self, context: ExecutionContext, advance: Callable[[int], None]) -> None:
        self.context, self.arena, self.advance = context, Arena(), advance
        self.non_finite: list[NonFinite] = []
        self.cpu = CPUBackend(context, self.arena)
        self.backend: CPUBackend | GPUBackend = self.cpu
        if context.pool is not None:
            self.backend = GPUBackend(context, context.pool, self.cpu)

    def run(self, file: ShardFile, jobs: Sequence[Job]) -> list[LinearResult]:
        """Do some jobs of a shard; return the results of the linear weights among them."""
        for job in jobs:
            self._write(file, job)
        groups = [job for job in jobs if isinstance(job, ScaleGroup)]
        results, inexact = [], []
        for group in groups:
            ahead = self.context.ahead
            done = None if ahead is None else ahead.write(file, group)
            if done is None:
                done = self.cpu.cast(file, group)
            if done is None:
                inexact.append(group)
            else:
                results += done
        results += self.backend.run(file, inexact)
        self.advance(sum(map(job_bytes, groups)))
        return results

    def take_non_finite(self) -> list[NonFinite]:
        """Return the NaN and Inf that were copied since the last call."""
        taken, self.non_finite = self.non_finite, []
        return taken

    def _write(self, file: ShardFile, job: Job) -> None:
        match job:
            case ExpertBias():
                slab = self.context.source.slab(job.region.key, *job.region.slab)
                bias = job.region.view(slab).contiguous()
                data = bias.view(torch.uint8).numpy()
                self._note_non_finite(f"{job.name}.bias", data, job.dtype, len(data))
                file.write(f"{job.name}.bias", data)
                self.advance(job_bytes(job))
            case RawTensor():
                self._copy(file, job)
            case KVScales():
                values = (1.0, 1.0)
                if job.is_calibrated:
                    assert self.context.scales is not None
                    values = self.context.scales.kv(job)
                for name, value in zip((job.k_name, job.v_name), values, strict=True):
                    file.write(name, np.array([value], dtype=np.float32))

    def _copy(self, file: ShardFile, job: RawTensor) -> None:
        key, nbytes = job.info.key, job.info.nbytes
        self.arena.reset()
        step = self.context.plan.limits.copy_bytes
        buffer = self.arena.take(min(nbytes, step)).numpy()
        for begin in range(0, nbytes, step):
            piece = buffer[: min(step, nbytes - begin)]
            self.context.source.read_bytes(key, begin, piece)
            self._note_non_finite(key, piece, job.info.dtype, job.info.row_bytes, begin)
            file.write(key, piece, begin)
            self.advance(len(piece))

    def _note_non_finite(
        self, name: str, data: Bytes, dtype: str, row_bytes: int, start: int = 0
    ) -> None:
        non_finite = find_non_finite(name, data, dtype, row_bytes, start)
        if non_finite is not None:
            self.non_finite.append(non_finite)


@dataclass
class _OpenShard:
    file: ShardFile
    unit: str
    jobs_left: int
    source_bytes: int
    prover: Prover | None = None
    results: list[LinearResult] = field(default_factory=list)
    non_finite: list[NonFinite] = field(default_factory=list)
    evidence: dict[str, Evidence] = field(default_factory=dict)

    def close(self) -> None:
        """Close the file; if it is not finished, it keeps its temporary name."""
        self.file.close()
        if self.prover is not None:
            self.prover.close()


def _written_by(job: Job) -> tuple[Sequence[str], Sequence[str]]:
    """The quantized linears and the copied tensors that a job writes."""
    match job:
        case ScaleGroup():
            return [linear.name for linear in job.linears], ()
        case ExpertBias():
            return (), [f"{job.name}.bias"]
        case RawTensor():
            return (), [job.info.key]
    return (), ()
