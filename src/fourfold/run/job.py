# SPDX-License-Identifier: Apache-2.0
"""Write a plan into OUT: take the folder, observe, quantize, and make it a checkpoint.

    assign_shards ─▶ steps of the strategy ─▶ scheduler ─▶ all other files, config.json last
          │                                                       │
    an earlier run's state                     one OUT: a checkpoint · several: inputs of `merge`

A job that ends early leaves what the same job can resume, or nothing.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from fourfold.calibration.scales import ActivationScales
from fourfold.calibration.statistics import Statistics
from fourfold.calibration.store import StatisticsStore
from fourfold.distributed.ranks import RankFailedError, Ranks
from fourfold.errors import FourfoldError, SourceChangedError
from fourfold.events import OnEvent, OutputComplete, Resumed, WritingBegan, ignore
from fourfold.execution import Backend, ExecutionContext, LinearResult, Scheduler
from fourfold.planning import CopyPlan, Plan, job_bytes, keeps_codes, keys_of
from fourfold.reporting.card import draw_card
from fourfold.reporting.page import draw_report
from fourfold.reporting.summary import summarize
from fourfold.run.resume import Assignment, assign_shards, check_all_written, identity_of
from fourfold.run.strategies import Run
from fourfold.sources.folded import FoldedSource
from fourfold.storage.atomic import FileWriter
from fourfold.storage.disk import writing
from fourfold.storage.fingerprints import reading
from fourfold.storage.names import (
    CARD,
    CONFIG,
    FOLDS,
    INDEX,
    REPORT,
    SOURCE_CARD,
    STATISTICS,
    SUMMARY,
)
from fourfold.storage.non_finite import NonFinite, merge
from fourfold.storage.output import OutputFolder
from fourfold.storage.quant_summary import BudgetEntry
from fourfold.storage.run_state import OTHER_FILES
from fourfold.storage.shard_file import index_of
from fourfold.storage.source import Source
from fourfold.verification.evidence import Evidence, Prover

WriteOwnFiles = Callable[[FileWriter, list[LinearResult], list[NonFinite]], Mapping[str, Any]]
"""Writes the files that neither the source nor every checkpoint has, given the figures of all
weights and the NaN and Inf in copied tensors, and returns the contents of config.json."""


class Job:
    """Writes a plan into OUT."""

    assignment: Assignment

    def __init__(
        self,
        plan: CopyPlan,
        source: Source,
        folder: OutputFolder,
        run: Run,
        ranks: Ranks,
        backend: Backend,
        write_own_files: WriteOwnFiles,
        *,
        strict: bool = False,
        proves: bool = False,
    ) -> None:
        """Describe the job; nothing is read or written yet.

        `proves`: compare what is written with the source at once, for a verification that comes
        when the source may not be there any more.
        """
        self.plan, self.source, self.folder, self.run = plan, source, folder, run
        self.ranks, self.backend, self.write_own_files = ranks, backend, write_own_files
        self.strict, self.identity = strict, identity_of(plan, source, run)
        self.proves = proves
        self.evidence: Mapping[str, Evidence] = {}
        """What those comparisons have found, once OUT is written."""
        self.non_finite: list[NonFinite] = []
        """The NaN and Inf in the tensors that this rank copied, once it has written them."""

    @property
    def is_leader(self) -> bool:
        """True if this rank is the first of those that write into its OUT."""
        return self.assignment.is_leader(self.ranks.rank)

    @property
    def is_finisher(self) -> bool:
        """True if this rank makes OUT a checkpoint, which needs all shards in one folder."""
        return self.assignment.has_one_folder and self.is_leader

    def write(self, on_event: OnEvent = ignore) -> list[LinearResult]:
        """Do this rank's part; return the figures of all weights in this rank's OUT.

        Emits `WritingBegan`, `Resumed`, `BytesQuantized`, `ShardWritten` and `OutputComplete`.
        After an error or a signal, OUT holds what the same job can resume, or nothing of this run.
        """
        with self.source.agreeing():
            if self.run.is_writer and self.ranks.size == 1:
                self.folder.check_resumable(self.identity)
        on_event(WritingBegan(self.folder.folder))
        try:
            self._assign()
            if self.assignment.finished:
                on_event(Resumed(len(self.assignment.finished), len(self.plan.shards)))
            self._execute(on_event)
            self.ranks.gather("written")
            with self.source.agreeing():
                linears = self._finish() if self.run.is_writer else []
        except BaseException as error:
            self._stop(error)
            raise
        self.folder.state.release()
        on_event(OutputComplete(self.folder.folder))
        return linears

    def _assign(self) -> None:
        self.assignment = Assignment.of_one_rank(self.plan)
        with self.source.agreeing():
            if self.run.is_writer:
                self.assignment = assign_shards(
                    self.plan,
                    self.source,
                    self.folder,
                    self.identity,
                    self.ranks,
                    threads=self.backend.threads,
                )

        if isinstance(self.source, FoldedSource) and self.is_leader:
            self.folder.state.save_folds(self.source.factors.to_bytes())
        if self._repeats_layers:
            self.assignment = self._without_unfinished_layers()

    @property
    def _repeats_layers(self) -> bool:
        return isinstance(self.plan, Plan) and self.plan.repeats_layers

    def _without_unfinished_layers(self) -> Assignment:
        """Forget statistics from the first layer on that is not written: it must run again, to be
        quantized, and the layers behind it read what it computes. A head reads the last layer."""
        assert isinstance(self.plan, Plan)
        finished = set(self.assignment.finished)
        left = [s.layer for n, s in enumerate(self.plan.shards) if n not in finished]
        if not left:
            return self.assignment
        last = len(self.plan.inventory.layer_paths) - 1
        first = min((layer for layer in left if layer is not None), default=last)
        kept: dict[int | None, Statistics] = {}
        for layer, statistics in self.assignment.statistics.items():
            if layer is not None and layer < first:
                kept[layer] = statistics
        return replace(self.assignment, statistics=kept)

    def _execute(self, on_event: OnEvent) -> None:
        """Quantize and write the shards of this rank, as the strategy makes them available."""
        context = ExecutionContext(
            self.plan,
            self.run.source,
            self.folder,
            self.backend.threads,
            scales=self.run.scales,
            pool=self.backend.pool,
            on_event=on_event,
            check=self.ranks.check,
            strict=self.strict,
            prover=self._prover if self.proves else None,
        )
        if self.run.quantizes_ahead is not None:
            self.run.quantizes_ahead(context)
        source = self.run.source
        source.fetching.expect(source.stored_keys(self._reads()))
        finished = (self.plan.shards[number] for number in self.assignment.finished)
        before = sum(job_bytes(job) for shard in finished for job in shard.jobs)
        before //= self.ranks.size
        with (
            Scheduler(context, self.assignment.shards, bytes_before=before) as scheduler,
            closing(self.run.steps(self.assignment.statistics, self._store_statistics)) as steps,
        ):
            for shards in steps:
                with self.source.agreeing():
                    if self.run.is_writer:
                        scheduler.run(shards)
                    if self._repeats_layers:  # a run that resumes needs whole layers
                        scheduler.finish()
            with self.source.agreeing():
                scheduler.finish()

    def _reads(self) -> Iterator[str]:
        """The raw tensors that this rank will read, in order."""
        loads, layers = self.run.loads(self.assignment.statistics), dict[int | None, list[str]]()
        stored = set[str]()  # whose codes are read, and not the values that calibration holds
        for number in self.assignment.shards:
            shard = self.plan.shards[number]
            keys = layers.setdefault(shard.layer, [])
            for job in shard.jobs:
                keys += keys_of(job)
                if loads and keeps_codes(self.run.source, job):
                    stored.update(keys_of(job))
        if not loads:
            yield from chain(*layers.values())
            return
        yield from loads.pop(None, ())
        outside = layers.pop(None, [])
        for layer in sorted({*loads, *layers}, key=lambda layer: layer or 0):
            loaded = dict.fromkeys(loads.get(layer, ()))
            yield from loaded
            yield from (key for key in layers.get(layer, ()) if key in stored or key not in loaded)
        yield from outside

    def _prover(self, file: Path, keys: Iterable[str]) -> Prover:
        assert isinstance(self.plan, Plan)
        config = {**self.source.config, "quantization_config": self.plan.quantization_config}
        return Prover(file, config, self.run.source, self.plan.inventory, keys)

    def _store_statistics(self, layer: int | None, statistics: Statistics) -> None:
        if self.is_leader:
            self.folder.check_mine()
            with writing(self.folder.state.folder):
                StatisticsStore(self.folder.state.statistics).save(layer, statistics)

    def _finish(self) -> list[LinearResult]:
        """Write all other files, if this rank leads; config.json comes last."""
        if self.assignment.has_one_folder and not self.is_leader:
            return []  # the leader may have removed the state by now
        records = self.folder.state.finished_shards() if self.is_leader else {}
        self.folder.check_mine()
        if self.assignment.has_one_folder:
            check_all_written(self.folder.folder, self.plan, records)
            self._write_other_files(self.folder, records)
            self.folder.done()
        else:
            all_records = ChainMap(*self.ranks.gather(records))
            if self.ranks.rank == 0:
                files = FileWriter(self.folder.state.folder / OTHER_FILES)
                self._write_other_files(files, all_records)
        self.non_finite = non_finite_in(records)
        self.evidence = evidence_in(records)
        return results_in(records)

    def _write_other_files(self, files: FileWriter, records: Records) -> None:
        """Write all files that are not shards, config.json last."""
        for path in self.plan.side_files.copied:
            files.copy(self.source.folder, path, self.plan.name_in_output(path))
        self.source.check_unchanged()  # the side files, too, are of the source that was read
        config = self.write_own_files(files, results_in(records), non_finite_in(records))
        shards = zip(
            self.plan.shard_names, (shard.tensors for shard in self.plan.shards), strict=True
        )
        files.write_json(INDEX, index_of(shards, self.plan.nbytes_after))
        files.write_json(CONFIG, config)

    def _stop(self, error: BaseException) -> None:
        """Keep what the same job can resume, if there is anything; otherwise leave nothing."""
        self.source.fetching.interrupt()
        if not (self.run.is_writer and self.folder.state.is_mine):
            return
        self.ranks.stop_writing()
        if self.is_leader and not self.folder.is_begun:
            self.folder.release()
            return
        finished = len(self.folder.state.finished_shards())
        if self.identity is None or not finished or not getattr(error, "resumable", True):
            self.folder.discard()
            if self.folder.has_cleared:
                error.add_note(
                    f"Nothing is left in {self.folder.folder}: `overwrite=True` has removed the "
                    "checkpoint that was there."
                )
            return
        self.folder.keep_unfinished()
        if self.is_leader:
            kept = f"{self.folder.folder} keeps {finished} of {len(self.plan.shards)} shards that"
            error.add_note(f"{kept} are {self._remedy(error)}.")

    def _remedy(self, error: BaseException) -> str:
        """Return the end of the note on finished shards: how to resume, or that one cannot."""
        kind = error.kind if isinstance(error, RankFailedError) else type(error).__name__
        if kind == SourceChangedError.__name__:
            return "made of the source as it was: `overwrite=True` starts over"
        without = ", without `overwrite=True`" if self.folder.overwrite else ""
        return f"finished: the same command resumes{without}"


Records = Mapping[str, Mapping[str, Any]]
"""The records of finished shards, by the shards' names."""


def non_finite_in(records: Records) -> list[NonFinite]:
    """Return the NaN and Inf in the copied tensors of some shards, by the tensors' names."""
    entries = (entry for record in records.values() for entry in record.get("non_finite", ()))
    return merge(NonFinite(**entry) for entry in entries)


def evidence_in(records: Records) -> dict[str, Evidence]:
    """Return what comparisons with the source have found, by linears and copied tensors."""
    entries = (record.get("evidence", {}).items() for record in records.values())
    return {name: Evidence(*values) for name, values in chain.from_iterable(entries)}


def results_in(records: Records) -> list[LinearResult]:
    """Return the figures of the weights in some shards, by the weights' names."""
    linears = (linear for record in records.values() for linear in record["linears"])
    return sorted(map(LinearResult.from_dict, linears), key=lambda result: result.name)


def write_own_files(
    files: FileWriter,
    results: list[LinearResult],
    non_finite: list[NonFinite],
    *,
    plan: Plan,
    source: Source,
    scales: ActivationScales | None,
    warn: Callable[[str], None],
    budget: BudgetEntry | None = None,
) -> dict[str, Any]:
    """Write statistics, summary, report, card and configuration files of a quantized checkpoint.

    Returns the contents of config.json. Raises `FourfoldError` if planned weights lack figures.
    """
    if len(results) != len(plan.linears):
        raise FourfoldError(
            f"{files.folder}: {len(plan.linears)} linear weights planned, {len(results)} written. "
            "This is a defect of fourfold; please report it."
        )
    if scales is not None and plan.needs_calibration:
        files.write_bytes(STATISTICS, scales.statistics.to_bytes())
    factors = source.factors if isinstance(source, FoldedSource) else None
    if factors is not None:
        files.write_bytes(FOLDS, factors.to_bytes())
    summary = summarize(plan, results, scales, non_finite, budget, factors)
    files.write_text(SUMMARY, summary.to_json())
    if (report := draw_report(summary, warn)) is not None:
        files.write_text(REPORT, report)
    if (card := draw_card(summary, plan.base_model, _card_of(source, plan), warn)) is not None:
        files.write_text(CARD, card)
    for name, contents in plan.config_files.items():
        files.write_json(name, contents)
    return dict(source.config) | {"quantization_config": plan.quantization_config}


def _card_of(source: Source, plan: Plan) -> str:
    """The source's own model card; empty if it has none."""
    for name in (CARD, SOURCE_CARD):
        if Path(name) in plan.side_files.copied:
            file = source.folder / name
            with reading(file):
                return file.read_text("utf-8", "replace")
    return ""
