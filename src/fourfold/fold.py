"""Carry out a plan: read, quantize, write, on as many threads as there are cores.

A job is one scale group (a few MB: an expert's gate and up), one tensor to copy, or one bias.
Workers take jobs in the order of the source's bytes; each reads its slabs into its own arena,
computes there, and writes the result to the place in the shard that the plan has fixed. There are
a few more workers than may compute at a time: while some wait for the disk, others compute, so the
slower of disk and cores sets the pace. A worker has one job in memory, so memory is a few groups
whatever the model and however slow the disk; the bytes do not depend on the order of work. A full
shard is synced and renamed by a thread of its own, while the next one is filled.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from fourfold.calibration.scales import ActivationScales
from fourfold.checkpoints import modelopt
from fourfold.checkpoints.source import Source
from fourfold.checkpoints.writer import OutputFolder, ShardFile
from fourfold.errors import PlanError
from fourfold.machine import threads_available
from fourfold.models.inventory import ExpertBias, LinearWeight, RawTensor
from fourfold.numerics import nvfp4
from fourfold.planning import (
    COPY_BYTES,
    GROUP_BYTES,
    WAITING,
    Job,
    KVScales,
    Plan,
    ScaleGroup,
    is_plain,
    job_bytes,
    slabs_of,
)

LOOKAHEAD = 16
"""How many jobs ahead of the workers the disk is told what will be read."""

WORST_ERROR = 0.35
"""Relative error of a weight that NVFP4 cannot hold; real ones have 0.1, and heavy tails 0.2."""

SMALLEST = 2.0**-10
"""Of what the smallest block scale, 2⁻⁹, leaves no code but 0 and ±0.5, in units of the global
scale. An error that small is no float32 in these units."""

UNSYNCED = 2
"""How many full shards may wait for the disk; the workers wait for it beyond that."""


@dataclass(frozen=True, slots=True)
class LinearResult:
    """What quantizing one linear weight gave."""

    name: str
    role: str
    shape: tuple[int, int]
    global_scale: float
    amax: float
    layer: int | None
    expert: int | None
    input_amax: float | None
    """The largest input that this linear weight saw; None where it saw none."""
    input_scale: float | None
    tokens: int | None
    """Tokens that were routed to an expert, or rows that a linear layer saw, in calibration."""
    sum_sq_err: float
    """Σ(w − q·s·S)²."""
    sum_sq_w: float
    """Σw²."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearResult:
        """What `asdict` gave, as a journal keeps it."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    @property
    def relative_error(self) -> float:
        """Relative Frobenius error ‖w − ŵ‖/‖w‖; 0 for an all-zero weight."""
        return math.sqrt(self.sum_sq_err / self.sum_sq_w) if self.sum_sq_w else 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A shard was finished: its unit, and how far the whole is."""

    unit: str
    shards_done: int
    shards: int
    bytes_done: int
    """Bytes of the source that were dealt with."""
    bytes_total: int


@contextmanager
def folding(
    plan: Plan,
    source: Source,
    out: OutputFolder,
    *,
    scales: ActivationScales | None = None,
    shards: Iterable[int] | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[Folding]:
    """Write shards of `plan` into `out`, all at once or unit by unit.

    scales: of activations, for a plan that needs them; a unit's must be known when it is folded.
    shards: numbers of those that are written here, all by default.
    check: called before each job; what it raises ends the work.
    Shards that are not finished at the end are removed.
    """
    mine = range(len(plan.shards)) if shards is None else shards
    work = Folding(plan, source, out, scales, mine, threads or threads_available(), progress, check)
    try:
        yield work
    finally:
        work.close()


class Folding:
    """The jobs of a plan, handed to workers, and the shards that they fill."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        out: OutputFolder,
        scales: ActivationScales | None,
        shards: Iterable[int],
        threads: int,
        progress: Callable[[Progress], None] | None,
        check: Callable[[], None] | None,
    ) -> None:
        self.plan, self.source, self.out, self.progress = plan, source, out, progress
        self.scales, self.threads, self.check = scales, threads, check
        self.computing = threading.Semaphore(threads)
        """Held by those that compute."""
        self._unsynced = threading.Semaphore(UNSYNCED)
        self._jobs: Iterator[tuple[_OpenShard, Job]] = iter(())
        self._ahead: deque[tuple[_OpenShard, Job]] = deque()
        self._lock = threading.Lock()
        self._stopped = False
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: list[Future[None]] = []
        self._open: list[_OpenShard] = []
        self.shards = tuple(shards)
        self._done = [0, 0]
        self._total = sum(job_bytes(job) for x in self.shards for job in plan.shards[x].jobs)

    def run(self, shards: Iterable[int] | None = None) -> None:
        """Fill these shards of the plan, those of them that are written here; all by default.

        Raises what the first failing worker raised, after all of them have ended.
        """
        wanted = self.shards if shards is None else sorted(set(self.shards).intersection(shards))
        self._jobs = self._jobs_of(wanted)
        count = self.threads + WAITING
        with ThreadPoolExecutor(count, thread_name_prefix="fold") as pool:
            workers = [pool.submit(self._work) for _ in range(count)]
            try:
                for worker in workers:
                    worker.result()
            except BaseException:
                self._stop()
                raise
        for future in self._syncing:
            if future.done():
                future.result()

    def _jobs_of(self, shards: Iterable[int]) -> Iterator[tuple[_OpenShard, Job]]:
        for number in shards:
            name, shard = self.plan.shard_names[number], self.plan.shards[number]
            file = self.out.shard(name, shard.tensors)
            opened = _OpenShard(
                number, file, shard.unit, len(shard.jobs), sum(map(job_bytes, shard.jobs))
            )
            self._open.append(opened)
            for job in shard.jobs:
                yield opened, job

    def _next(self) -> tuple[_OpenShard, Job] | None:
        with self._lock:
            while len(self._ahead) < LOOKAHEAD and not self._stopped:
                item = next(self._jobs, None)
                if item is None:
                    break
                if job_bytes(item[1]) <= GROUP_BYTES:
                    for key, start, stop in slabs_of(item[1]):
                        self.source.will_need(key, start, stop)
                self._ahead.append(item)
            return None if self._stopped or not self._ahead else self._ahead.popleft()

    def _work(self) -> None:
        """What a worker does: jobs, until there are none or something failed."""
        arena = Arena()
        try:
            while (item := self._next()) is not None:
                if self.check is not None:
                    self.check()
                shard, job = item
                results = run_job(self, shard.file, job, arena)
                with self._lock:
                    shard.results += results
                    shard.jobs_left -= 1
                    is_full = not shard.jobs_left
                if is_full:
                    self._unsynced.acquire()
                    self._syncing.append(self._syncer.submit(self._finish, shard))
        except BaseException:
            self._stopped = True
            raise

    def _finish(self, shard: _OpenShard) -> None:
        try:
            digest = shard.file.finish()
            self.source.check_unchanged()
            self.out.add_to_journal(
                {
                    "shard": self.plan.shard_names[shard.number],
                    "nbytes": shard.file.nbytes,
                    "digest": digest,
                    "linears": [asdict(result) for result in shard.results],
                }
            )
            self._open.remove(shard)
            self._tell(shard)
        except BaseException:
            self._stopped = True
            raise
        finally:
            self._unsynced.release()

    def _tell(self, shard: _OpenShard) -> None:
        self._done[0] += 1
        self._done[1] += shard.source_bytes
        if self.progress is not None:
            done = Progress(shard.unit, self._done[0], len(self.shards), self._done[1], self._total)
            self.progress(done)

    def _stop(self) -> None:
        """Let no worker take another job."""
        with self._lock:
            self._stopped = True

    def close(self) -> None:
        """Wait for the shards that are being synced; remove those that will never be full."""
        self._syncer.shutdown(wait=True)
        for shard in self._open:
            shard.file.abandon()

    def finish(self) -> None:
        """Wait until every shard is on the disk. Raises what went wrong there."""
        for future in self._syncing:
            future.result()


@dataclass
class _OpenShard:
    number: int
    file: ShardFile
    unit: str
    jobs_left: int
    source_bytes: int
    results: list[LinearResult] = field(default_factory=list)


class Arena:
    """Memory for one job at a time, used again by the next: no page is touched first twice."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)
        self._used = 0
        self._wanted = 0

    def reset(self) -> None:
        """Forget what was taken. Grows the buffer to what the last job wanted."""
        if self._wanted > len(self._buffer):
            self._buffer = np.empty(self._wanted, dtype=np.uint8)
        self._used = self._wanted = 0

    def take(self, nbytes: int) -> np.ndarray[Any, Any]:
        """`nbytes` bytes, aligned to 64; not cleared."""
        size = -(-nbytes // 64) * 64
        self._wanted += size
        if self._used + size > len(self._buffer):
            return np.empty(nbytes, dtype=np.uint8)
        begin, self._used = self._used, self._used + size
        return self._buffer[begin : begin + nbytes]


def run_job(work: Folding, file: ShardFile, job: Job, arena: Arena) -> list[LinearResult]:
    """Do one job, and give the figures of the linear weights that it quantized."""
    arena.reset()
    source = work.source
    match job:
        case ScaleGroup():
            return _Group(work, file, job, arena).run()
        case ExpertBias():
            slab = source.slab(job.region.key, *job.region.slab)
            bias = job.region.view(slab).contiguous()
            file.write(f"{job.name}.bias", bias.view(torch.uint8).numpy())
        case RawTensor():
            _copy(source, file, job.info.key, job.info.nbytes, arena)
        case KVScales():
            assert work.scales is not None
            for name, value in zip((job.k_name, job.v_name), work.scales.kv(job), strict=True):
                file.write(name, _scalar(value))
    return []


def _scalar(value: float) -> np.ndarray[Any, Any]:
    return np.array([value], dtype=np.float32)


def _copy(source: Source, file: ShardFile, key: str, nbytes: int, arena: Arena) -> None:
    buffer = arena.take(min(nbytes, COPY_BYTES))
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

    def __init__(self, work: Folding, file: ShardFile, group: ScaleGroup, arena: Arena) -> None:
        self.algorithm = work.plan.recipe.weights.scale
        self.scales = work.scales if work.plan.recipe.is_w4a4 else None
        self.source, self.file, self.group, self.arena = work.source, file, group, arena
        self.computing = work.computing
        self.slabs: dict[tuple[str, int, int], torch.Tensor] = {}
        self.is_held = job_bytes(group) <= GROUP_BYTES

    def run(self) -> list[LinearResult]:
        pieces = [piece for linear in self.group.linears for piece in self._pieces(linear)]
        amaxes = dict.fromkeys((linear.name for linear in self.group.linears), 0.0)
        for piece in pieces:
            matrix = self._load(piece)
            with self.computing:
                amax = nvfp4.amax(matrix, name=self._label(piece))
            amaxes[piece.linear.name] = max(amaxes[piece.linear.name], amax)
        global_scale = nvfp4.global_scale(max(amaxes.values()))
        totals = {name: [0.0, 0.0] for name in amaxes}
        for piece in pieces:
            error, energy = self._quantize(piece, global_scale)
            totals[piece.linear.name][0] += error
            totals[piece.linear.name][1] += energy
        results = [
            self._finish(linear, global_scale, amaxes[linear.name], *totals[linear.name])
            for linear in self.group.linears
        ]
        self._check_errors(results)
        return results

    def _check_errors(self, results: Sequence[LinearResult]) -> None:
        """Refuse weights that no block scale serves: next to others of their scale group they are
        so small that hardly a code differs from 0."""
        for result in results:
            is_lost = 0 < result.amax < result.global_scale * SMALLEST
            if is_lost or result.relative_error > WORST_ERROR:
                largest = max(results, key=lambda result: result.amax)
                raise PlanError(
                    f"{result.name}: lost in NVFP4: its weights reach {result.amax:.3g}, those of "
                    f"{largest.name}, which share its global scale, {largest.amax:.3g}. "
                    "Is the checkpoint damaged? If not, name it under keep."
                )

    def _pieces(self, linear: LinearWeight) -> Sequence[_Piece]:
        region, rows = linear.region, linear.shape[0]
        if self.is_held or not is_plain(region):
            return [_Piece(linear, 0, rows, region.slab)]
        row_bytes = (
            self.source.tensors[region.key].nbytes // self.source.tensors[region.key].shape[0]
        )
        step = max(1, GROUP_BYTES // 4 // row_bytes)
        first = region.rows.start
        return [
            _Piece(linear, at, min(at + step, rows), (first + at, first + min(at + step, rows)))
            for at in range(0, rows, step)
        ]

    def _load(self, piece: _Piece) -> torch.Tensor:
        """The piece's rows `[out, in]`, contiguous along `in`."""
        if not self.is_held:
            self.arena.reset()  # of a large group, one piece at a time
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
        info = self.source.tensors[key]
        nbytes = info.nbytes // info.shape[0] * (stop - start)
        if self.is_held:
            slab = self.source.slab(key, start, stop, self.arena.take(nbytes))
            self.slabs[key, start, stop] = slab
            return slab
        return self.source.slab(key, start, stop)

    def _label(self, piece: _Piece) -> str:
        info = self.source.tensors[piece.linear.region.key]
        rows = f", rows from {piece.start}" if piece.start else ""
        return f"{piece.linear.name} ({info.key} in {info.file.name}{rows})"

    def _quantize(self, piece: _Piece, global_scale: float) -> tuple[float, float]:
        matrix, name = self._load(piece), piece.linear.name
        rows, width = matrix.shape
        codes = self.arena.take(rows * width // 2).reshape(rows, width // 2)
        scales = self.arena.take(rows * width // 16).reshape(rows, width // 16)
        with self.computing:
            stats = nvfp4.quantize_into(
                matrix, codes, scales, scale=self.algorithm, global_scale=global_scale, name=name
            )
        self.file.write(f"{name}.{modelopt.CODES}", codes, piece.start * width // 2)
        self.file.write(f"{name}.{modelopt.BLOCK_SCALE}", scales, piece.start * width // 16)
        return stats.sum_sq_err, stats.sum_sq_w

    def _finish(
        self, linear: LinearWeight, global_scale: float, amax: float, error: float, energy: float
    ) -> LinearResult:
        self.file.write(f"{linear.name}.{modelopt.GLOBAL_SCALE}", _scalar(global_scale))
        input_amax = input_scale = tokens = None
        if self.scales is not None:
            input_scale = self.scales.input_scale(linear.input_site)
            input_amax, tokens = self.scales.own_amax(linear), self.scales.tokens(linear)
            self.file.write(f"{linear.name}.{modelopt.INPUT_SCALE}", _scalar(input_scale))
        return LinearResult(
            name=linear.name,
            role=linear.role.value,
            shape=linear.shape,
            global_scale=global_scale,
            amax=amax,
            layer=linear.layer,
            expert=linear.expert,
            input_amax=input_amax,
            input_scale=input_scale,
            tokens=tokens,
            sum_sq_err=error,
            sum_sq_w=energy,
        )


def _contiguous(matrix: torch.Tensor, arena: Arena) -> torch.Tensor:
    """A copy with contiguous rows, on this thread alone."""
    size = matrix.element_size()
    word = {2: np.uint16, 4: np.uint32}[size]
    words = matrix.view({2: torch.uint16, 4: torch.uint32}[size]).numpy()
    copy = arena.take(matrix.numel() * size).view(word).reshape(matrix.shape)
    np.copyto(copy, words)
    return torch.from_numpy(copy).view(matrix.dtype)
