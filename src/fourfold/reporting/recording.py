# SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation in the files of a checkpoint.

`note_evaluation` puts them into a finished checkpoint: its summary, from which the report is
drawn again, and its card, beside what else stands there. Each file is replaced as a whole. Weights
are not touched.
"""

from __future__ import annotations

import re
from pathlib import Path

from fourfold.evaluation.evaluated import Evaluation, ModelFigures
from fourfold.events import OnEvent, WarningIssued
from fourfold.reporting.page import redraw_report
from fourfold.reporting.quality import quality_rows, quality_text
from fourfold.storage.atomic import FileWriter
from fourfold.storage.names import CARD, SUMMARY, storable
from fourfold.storage.quant_summary import EvaluationEntry, read_summary
from fourfold.storage.units import printable

_BEGIN, _END = "<!-- fourfold: evaluation -->\n", "<!-- fourfold: end -->\n\n"

_BEFORE = "## Serve it\n"
"""The heading of a card before which the figures stand."""

_NOT_MEASURED = re.compile(r",\s+which\s+was\s+not\s+measured\s+on\s+this\s+model")


def entry_of(evaluation: Evaluation, figures: ModelFigures) -> EvaluationEntry:
    """Return the figures of one checkpoint as its summary holds them."""
    return EvaluationEntry(
        source=storable(Path(evaluation.source).name),
        text=evaluation.text,
        text_digest=evaluation.text_digest,
        windows=evaluation.windows,
        length=evaluation.length,
        compared=evaluation.compared,
        vocabulary=evaluation.vocabulary,
        rest=evaluation.rest,
        source_perplexity=evaluation.perplexity,
        simulated=figures.simulated,
        kv_cache=figures.kv_cache,
        kl=figures.kl,
        kl_interval=figures.kl_interval,
        kl_median=figures.kl_median,
        kl_p90=figures.kl_p90,
        kl_p99=figures.kl_p99,
        top1=figures.top1,
        top5=figures.top5,
        perplexity=figures.perplexity,
    )


def note_evaluation(folder: Path, entry: EvaluationEntry, on_event: OnEvent) -> None:
    """Write the figures into the summary, report and card in `folder`.

    A report or card that is missing, or that somebody has rewritten, is left as it is; for the
    card, with a warning.

    Raises:
        SourceError: The folder has no summary.
        OutputError: A file cannot be written.
    """
    summary = read_summary(folder).model_copy(update={"evaluation": entry})
    FileWriter(folder).write_text(SUMMARY, summary.to_json())
    redraw_report(folder, summary)
    try:
        card = (folder / CARD).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    noted = _with_figures(card, entry)
    if noted is None:
        on_event(
            WarningIssued(f"{folder / CARD}: has no place for the figures. Write them by hand.")
        )
    else:
        FileWriter(folder).write_text(CARD, noted)


def _with_figures(card: str, entry: EvaluationEntry) -> str | None:
    """The card with these figures in place of earlier ones; None if it has no place for them."""
    before, begin, rest = card.partition(_BEGIN)
    after = rest.partition(_END)[2]
    if not begin:
        before, heading, rest = card.partition(_BEFORE)
        after = heading + rest
        if not heading:
            return None
    rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in quality_rows(entry))
    text = f"## Quality\n\n{_cell(quality_text(entry))}\n\n| | |\n|---|---|\n{rows}"
    return f"{before}{_BEGIN}{text}{_END}{_NOT_MEASURED.sub('', after)}"


def _cell(text: str) -> str:
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", printable(text))
