"""Write a plan into OUT: take the folder, observe, fold, and make it a checkpoint.

    take_share ─▶ steps of the run ─▶ fold ─▶ everything that is no shard, config.json last
        │                                        │
    an earlier run's journal               one OUT: a checkpoint · several: parts, for `merge`

A job that ends early leaves what the same job goes on from, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from fourfold.calibration.scales import ActivationScales
from fourfold.calibration.statistics import Statistics
from fourfold.calibration.store import StatisticsStore
from fourfold.distributed.ranks import RankFailedError, Ranks
from fourfold.errors import FourfoldError, SourceChangedError
from fourfold.events import OnEvent, OutputComplete, Resumed, WritingBegan, ignore
from fourfold.execution import Backend, ExecutionContext, LinearResult, Scheduler
from fourfold.planning import Plan
from fourfold.reporting.page import draw_report
from fourfold.reporting.summary import summarize
from fourfold.run.resume import Share, check_whole, identity_of, take_share
from fourfold.run.strategies import Kept, Run
from fourfold.storage.atomic import FileWriter
from fourfold.storage.names import CONFIG, INDEX, REPORT, STATISTICS, SUMMARY
from fourfold.storage.output import OutputFolder
from fourfold.storage.run_state import REST
from fourfold.storage.shard_file import index_of
from fourfold.storage.source import Source

WriteRest = Callable[[Plan, Source, FileWriter, list[LinearResult], ActivationScales | None], None]


class Job:
    """What is written into OUT: observe, fold, and make it a checkpoint."""

    share: Share

    def __init__(
        self,
        work: Plan,
        source: Source,
        folder: OutputFolder,
        run: Run,
        ranks: Ranks,
        backend: Backend,
        rest: WriteRest,
    ) -> None:
        """rest: writes everything that is not a shard, config.json last."""
        self.work, self.source, self.folder, self.run = work, source, folder, run
        self.ranks, self.backend, self.write_rest = ranks, backend, rest
        self.identity = identity_of(work, source, run)

    @property
    def is_finisher(self) -> bool:
        """Whether this rank makes OUT a checkpoint, which it is only where all ranks share it."""
        return self.share.is_whole and self.share.is_leader(self.ranks.rank)

    def write(self, overwrite: bool, on_event: OnEvent = ignore) -> list[LinearResult]:
        """Do this rank's share; the figures of all weights that are in this rank's OUT.

        Emits `WritingBegan`, `Resumed`, `ShardWritten` and `OutputComplete`.
        After an error or a signal nothing is left, or what the same job goes on from.
        """
        with self.source.agreeing():
            if self.run.is_writer and self.ranks.size == 1:
                self.folder.check_continues(self.identity, overwrite=overwrite)
        on_event(WritingBegan(self.folder.folder))
        try:
            self.share = Share.of_all(self.work)
            with self.source.agreeing():
                if self.run.is_writer:
                    self.share = take_share(
                        self.work,
                        self.source,
                        self.folder,
                        self.identity,
                        self.ranks,
                        overwrite=overwrite,
                        threads=self.backend.threads,
                    )
            if self.share.finished:
                on_event(Resumed(self.share.finished, len(self.work.shards)))
            self._execute(on_event)
            self.ranks.gather("written")
            with self.source.agreeing():
                linears = self._finish() if self.run.is_writer else []
        except BaseException as error:
            self._stop(error, overwrite)
            raise
        self.folder.close()
        on_event(OutputComplete(self.folder.folder))
        return linears

    def _execute(self, on_event: OnEvent) -> None:
        kept = Kept(self.share.kept, self._note_observed)
        context = ExecutionContext(
            self.work,
            self.run.source,
            self.folder,
            self.backend.threads,
            scales=self.run.scales,
            pool=self.backend.pool,
            on_event=on_event,
            check=self.ranks.check,
        )
        with (
            Scheduler(context, self.share.shards) as scheduler,
            closing(self.run.steps(kept)) as steps,
        ):
            for shards in steps:
                with self.source.agreeing():
                    if self.run.is_writer:
                        scheduler.run(shards)
            with self.source.agreeing():
                scheduler.finish()

    def _note_observed(self, layer: int | None, found: Statistics) -> None:
        if self.share.is_leader(self.ranks.rank):
            with self.folder.recording():
                StatisticsStore(self.folder.state.statistics).save(layer, found)

    def _finish(self) -> list[LinearResult]:
        """Everything that is not a shard, by the leaders; what makes it a checkpoint comes last."""
        is_leader = self.share.is_leader(self.ranks.rank)
        if self.share.is_whole and not is_leader:
            return []  # and look at nothing: the leader may have taken the state away by now
        mine = self.folder.state.finished_shards() if is_leader else {}
        self.folder.check_mine()
        if self.share.is_whole:
            linears = linears_of(mine)
            check_whole(self.folder.folder, self.work, mine)
            self.write_rest(self.work, self.source, self.folder, linears, self.run.scales)
            self.folder.done()
            return linears
        everything: dict[str, Any] = {}
        for each in self.ranks.gather(mine):
            everything |= each
        if self.ranks.rank == 0:
            linears, files = linears_of(everything), FileWriter(self.folder.state.folder / REST)
            self.write_rest(self.work, self.source, files, linears, self.run.scales)
        return linears_of(mine)

    def _stop(self, error: BaseException, overwrite: bool) -> None:
        """Leave what the same job can go on from, where there is anything, or nothing at all."""
        if not (self.run.is_writer and self.folder.state.is_mine):
            return
        self.ranks.stop_writing()
        is_leader = self.share.is_leader(self.ranks.rank)
        if is_leader and not self.folder.is_begun:
            self.folder.release()
            return
        finished = self.folder.state.finished_shards()
        kind = error.kind if isinstance(error, RankFailedError) else type(error).__name__
        if self.identity is None or not finished or not getattr(error, "resumable", True):
            self.folder.discard()
            if self.folder.has_cleared:
                error.add_note(
                    f"Nothing is left in {self.folder.folder}: `overwrite=True` has removed the "
                    "checkpoint that was there."
                )
            return
        self.folder.keep_unfinished()
        if not is_leader:
            return
        if kind == SourceChangedError.__name__:
            how = "made of the source as it was: `overwrite=True` starts over"
        else:
            how = "finished: the same command goes on from there"
        without = ", without `overwrite=True`" if overwrite and "same" in how else ""
        error.add_note(
            f"{self.folder.folder} keeps {len(finished)} of {len(self.work.shards)} shards that "
            f"are {how}{without}."
        )


def linears_of(entries: Mapping[str, Mapping[str, Any]]) -> list[LinearResult]:
    """The figures of the weights in some shards, by name."""
    found = [
        LinearResult.from_dict(each) for entry in entries.values() for each in entry["linears"]
    ]
    return sorted(found, key=lambda result: result.name)


def write_rest(
    work: Plan,
    source: Source,
    folder: FileWriter,
    linears: list[LinearResult],
    scales: ActivationScales | None,
    *,
    warn: Callable[[str], None],
) -> None:
    """Write everything that is not a shard; what makes it a checkpoint comes last.

    warn: is called if the report cannot be drawn.
    """
    if len(linears) != len(work.linears):
        raise FourfoldError(
            f"{folder.folder}: {len(work.linears)} linear weights planned, {len(linears)} written. "
            "This is a defect of fourfold; please report it."
        )
    for path in work.side_files:
        folder.copy(source.folder, path)
    source.check_unchanged()  # what was copied is of the same source, too
    if scales is not None and work.needs_calibration:
        folder.write_bytes(STATISTICS, scales.statistics.to_bytes())
    summary = summarize(work, linears, scales)
    folder.write_text(SUMMARY, summary.to_json())
    if (report := draw_report(summary, warn)) is not None:
        folder.write_text(REPORT, report)
    for name, contents in work.config_files.items():
        folder.write_json(name, contents)
    shards = [
        (name, shard.tensors) for name, shard in zip(work.shard_names, work.shards, strict=True)
    ]
    folder.write_json(INDEX, index_of(shards, work.nbytes_after))
    config = dict(source.config) | {"quantization_config": work.quantization_config}
    folder.write_json(CONFIG, config)
