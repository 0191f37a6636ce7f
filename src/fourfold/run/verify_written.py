# SPDX-License-Identifier: Apache-2.0
"""Verify what a job has written, and balance it against the plan."""

from __future__ import annotations

from pathlib import Path

from fourfold.distributed.machine import threads_available
from fourfold.errors import FourfoldError
from fourfold.events import OnEvent
from fourfold.execution import LinearResult
from fourfold.planning import KVScales, Plan, ScaleGroup
from fourfold.reporting.card import note_verification
from fourfold.reporting.page import note_in_report
from fourfold.run.job import Job
from fourfold.sources.folded import FoldedSource
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source
from fourfold.verification import Report, verify


def verify_written(
    job: Job,
    plan: Plan,
    linears: list[LinearResult],
    on_event: OnEvent,
    reference: str | Path | None = None,
) -> Report | None:
    """Read the output of `job` back and compare it with the source, tensor by tensor.

    Returns None on a rank that has no whole output to verify. A source that is sharded over ranks
    cannot be read by one of them, so its output is verified by itself.

    Raises:
        FourfoldError: Planned, written and verified weights differ in number.
    """
    if not (job.run.is_writer and job.is_finisher):
        return None
    is_readable, threads = not job.source.is_sharded, job.backend.threads
    if job.ranks.local_size > 1:  # the other ranks have finished
        threads = min(threads * job.ranks.local_size, threads_available())
    report = verify(
        job.folder.folder,
        source=_original(job.source) if is_readable else None,
        reference=reference,
        trust_remote_code=job.source.trust_remote_code,
        threads=threads,
        evidence=job.evidence,
        on_event=on_event,
    )
    if is_readable:
        check_ledger(plan, linears, report, job.folder)
    note_verification(job.folder.folder, report)
    note_in_report(job.folder.folder, report)
    return report


def _original(source: Source) -> Source:
    """The source as it was given: `verify` folds it again, by the file in OUT."""
    return source.source if isinstance(source, FoldedSource) else source


def check_ledger(
    plan: Plan, linears: list[LinearResult], report: Report, folder: OutputFolder
) -> None:
    """Raise unless as many weights were verified as were planned and written."""
    copies = sum(
        not isinstance(job, ScaleGroup | KVScales) for shard in plan.shards for job in shard.jobs
    )
    verified = report.counts.compared_linears, report.counts.copied_tensors
    if report.clean and verified != (len(plan.linears), copies):
        folder.remove(plan.files)
        raise FourfoldError(
            f"{report.folder}: {len(plan.linears)} linear weights and {copies} copied tensors "
            f"planned, {len(linears)} weights written, {verified[0]} and {verified[1]} verified. "
            "The checkpoint was removed. This is a defect of fourfold; please report it."
        )
