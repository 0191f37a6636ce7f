"""Jobs are handed to workers, and shards are opened, filled, synced and noted.

A job is one scale group (a few MB: an expert's gate and up), one tensor to copy, or one bias.
Workers take jobs in the order of the source's bytes; each reads its slabs into its own arena,
computes there, and writes the result to the place in the shard that the plan has fixed. There are
a few more workers than may compute at a time: while some wait for the disk, others compute, so the
slower of disk and cores sets the pace. A worker has one job in memory, so memory is a few groups
whatever the model and however slow the disk; the bytes do not depend on the order of work. A full
shard is synced and renamed by a thread of its own, while the next one is filled.

On a device, a worker is handed as many scale groups at a time as its lane there takes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from fourfold.calibration.scales import ActivationScales
from fourfold.distributed.machine import threads_available
from fourfold.events import OnEvent, ShardWritten, ignore
from fourfold.execution.cpu import HostWorker, Task
from fourfold.execution.gpu import DeviceWorker
from fourfold.execution.results import LinearResult
from fourfold.execution.streams import Filling, Lanes
from fourfold.formats.nvfp4.tensors import ScaleAlgorithm
from fourfold.planning import GROUP_BYTES, WAITING, Job, Plan, job_bytes, slabs_of
from fourfold.storage.output import OutputFolder
from fourfold.storage.shard_file import ShardFile
from fourfold.storage.source import Source

LOOKAHEAD = 16
"""How many jobs ahead of the workers the disk is told what will be read."""

UNSYNCED = 2
"""How many full shards may wait for the disk; the workers wait for it beyond that."""


@contextmanager
def folding(
    plan: Plan,
    source: Source,
    out: OutputFolder,
    *,
    scales: ActivationScales | None = None,
    shards: Iterable[int] | None = None,
    threads: int | None = None,
    lanes: Lanes | None = None,
    on_event: OnEvent = ignore,
    check: Callable[[], None] | None = None,
) -> Iterator[Folding]:
    """Write shards of `plan` into `out`, all at once or unit by unit.

    scales: of activations, for a plan that needs them; a unit's must be known when it is folded.
    shards: numbers of those that are written here, all by default.
    lanes: on the device that quantizes; the CPU does where there are none.
    check: called before each job; what it raises ends the work.
    Shards that are not finished at the end keep their temporary names.
    """
    mine = range(len(plan.shards)) if shards is None else shards
    count = threads or threads_available()
    work = Folding(plan, source, out, scales, mine, count, lanes, on_event, check)
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
        lanes: Lanes | None,
        on_event: OnEvent,
        check: Callable[[], None] | None,
    ) -> None:
        self.plan, self.source, self.out, self.on_event = plan, source, out, on_event
        self.lanes, self.check = lanes, check
        algorithm = ScaleAlgorithm(plan.recipe.weights.scale)
        task = Task(
            source, scales, algorithm, plan.recipe.is_w4a4, computing=threading.Semaphore(threads)
        )
        self._workers = [
            HostWorker(task) if lanes is None else DeviceWorker(task, lanes)
            for _ in range(threads + WAITING if lanes is None else lanes.count)
        ]
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
        with ThreadPoolExecutor(len(self._workers), thread_name_prefix="fold") as pool:
            futures = [pool.submit(self._work, worker) for worker in self._workers]
            try:
                for future in futures:
                    future.result()
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

    def _next(self) -> tuple[_OpenShard, list[Job]] | None:
        """A job, or scale groups of one shard that a lane takes together."""
        with self._lock:
            first = self._ahead_of()
            if first is None:
                return None
            shard, jobs = first[0], [first[1]]
            self._ahead.popleft()
            if self.lanes is None:
                return shard, jobs
            batch = Filling(self.lanes.room, self.source.tensors)
            is_open = batch.takes(jobs[0])
            while is_open and (item := self._ahead_of()) is not None:
                is_open = item[0] is shard and batch.takes(item[1])
                if is_open:
                    jobs.append(self._ahead.popleft()[1])
            return shard, jobs

    def _ahead_of(self) -> tuple[_OpenShard, Job] | None:
        """The job that comes next; the disk is told of those after it."""
        while len(self._ahead) < LOOKAHEAD and not self._stopped:
            item = next(self._jobs, None)
            if item is None:
                break
            if job_bytes(item[1]) <= GROUP_BYTES:  # what is larger is read twice, in pieces
                for key, start, stop in slabs_of(item[1]):
                    self.source.will_need(key, start, stop)
            self._ahead.append(item)
        return None if self._stopped or not self._ahead else self._ahead[0]

    def _work(self, worker: HostWorker | DeviceWorker) -> None:
        """What a worker does: jobs, until there are none or something failed."""
        try:
            while (item := self._next()) is not None:
                if self.check is not None:
                    self.check()
                shard, jobs = item
                results = worker.run(shard.file, jobs)
                with self._lock:
                    shard.results += results
                    shard.jobs_left -= len(jobs)
                    is_full = not shard.jobs_left
                if is_full:
                    self._unsynced.acquire()
                    self._syncing.append(self._syncer.submit(self._finish, shard))
        except BaseException:
            self._stopped = True
            raise
        finally:
            worker.rest()

    def _finish(self, shard: _OpenShard) -> None:
        try:
            self.source.check_unchanged()
            linears = [asdict(result) for result in shard.results]
            self.out.finish_shard(shard.file, {"linears": linears})
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
        shards_done, bytes_done = self._done
        self.on_event(
            ShardWritten(shard.unit, shards_done, len(self.shards), bytes_done, self._total)
        )

    def _stop(self) -> None:
        """Let no worker take another job."""
        with self._lock:
            self._stopped = True

    def close(self) -> None:
        """Wait for the shards that are being synced; close those that will never be full."""
        self._syncer.shutdown(wait=True)
        for shard in self._open:
            shard.file.close()

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
