# SPDX-License-Identifier: Apache-2.0
"""Show what the output writes beside what its source writes, once a run is done."""

from __future__ import annotations

from fourfold.calibration.data import load_calibration
from fourfold.config import CalibrationConfig
from fourfold.errors import FourfoldError, UsageError
from fourfold.evaluation.continuation import Prompt, Sampling
from fourfold.evaluation.generation import Generation, generate
from fourfold.models.internals import one_line
from fourfold.models.tokenizer import load_tokenizer
from fourfold.planning import Plan
from fourfold.run.job import Job
from fourfold.run.session import Session
from fourfold.storage.source import Source

PROMPT_TOKENS = 64
"""Tokens of a calibration sample that are the prompt."""

NEW_TOKENS, STREAMED_TOKENS = 64, 8
"""Tokens that each model writes; for each of them, a model that is streamed is read once."""


def check_preview(wanted: bool | str, source: Source) -> None:
    """Raise before a run for a preview that is not possible.

    Raises:
        UsageError: No single process has the source's model.
        SourceError: There is a prompt, but no tokenizer.
    """
    if not wanted:
        return
    if source.is_sharded or (source.model is None and source.stamps() is None):
        raise UsageError(
            "`preview`: not for a model in memory that is sharded, or Megatron's. Leave it out, "
            "and use `fourfold generate` afterwards."
        )
    if isinstance(wanted, str):
        if source.tokenizer_hint is not None:
            raise UsageError(f"`preview`: {source.tokenizer_hint}")
        load_tokenizer(source.folder, trust_remote_code=source.trust_remote_code)


def preview(
    wanted: bool | str, job: Job, plan: Plan, device: str, session: Session
) -> Generation | None:
    """Let the source and the output of `job` continue a prompt, or the beginning of a sample.

    The output is complete by now, so whatever fails is a warning. Returns None then, and on ranks
    that have no whole output.
    """
    if not wanted or not job.is_leader:
        return None
    if not job.is_finisher:
        session.warn("no preview: OUT is one of several parts. Join them with `fourfold merge`.")
        return None
    try:
        sample = job.run.sample[:PROMPT_TOKENS]
        return generate(
            job.folder.folder,
            wanted if isinstance(wanted, str) else sample or _embedded(job.source, plan),
            Sampling(NEW_TOKENS),
            source=job.source,
            streamed_tokens=STREAMED_TOKENS,
            device=device,
            trust_remote_code=job.source.trust_remote_code,
            on_event=session,
        )
    except Exception as error:  # transformers raises many kinds, and the output is complete
        session.warn(
            f"no preview: {error if isinstance(error, FourfoldError) else one_line(error)}"
        )
        return None


def _embedded(source: Source, plan: Plan) -> Prompt:
    """Return the beginning of the text that comes with fourfold."""
    data = load_calibration(
        source.folder,
        CalibrationConfig(calib_size=1, calib_seq=PROMPT_TOKENS),
        vocab_size=plan.inventory.vocab_size,
        trust_remote_code=source.trust_remote_code,
        tokenizer_hint=source.tokenizer_hint,
    )
    return data.first
