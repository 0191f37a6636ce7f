# SPDX-License-Identifier: Apache-2.0
"""What an evaluation says of a checkpoint, in words for its report and its model card."""

from __future__ import annotations

from fourfold.reporting.text import clipped, figure, integer
from fourfold.storage.quant_summary import EvaluationEntry


def quality_text(entry: EvaluationEntry) -> str:
    """Return what was measured, in a sentence or two."""
    rounded = ["with inputs rounded as engines round them"] if entry.simulated else []
    if entry.kv_cache is not None:
        rounded.append(f"with keys and values in {entry.kv_cache.upper()}")
    how = f", {' and '.join(rounded)}" if rounded else ", with its weights alone"
    text = (
        f"Beside its source on {integer(entry.windows)} windows of {integer(entry.length)} tokens "
        f"from {clipped(entry.text)}{how}, in float32. KL is in nats a token."
    )
    if entry.rest:
        text += (
            f" The source's {integer(entry.compared)} likeliest tokens of "
            f"{integer(entry.vocabulary)} were compared one by one and the rest, "
            f"{entry.rest:.2%} of the probability, as one, so that KL is a lower bound."
        )
    return text


def quality_rows(entry: EvaluationEntry) -> list[tuple[str, str]]:
    """Return names and values of the figures."""
    kl = figure(entry.kl, 3)
    if entry.kl_interval is not None:
        low, high = entry.kl_interval
        kl += f" (95 %: {figure(low, 3)} to {figure(high, 3)})"
    tail = (entry.kl_median, entry.kl_p90, entry.kl_p99)
    return [
        ("KL(source ‖ this model), mean", kl),
        ("median, 90th and 99th percentile", ", ".join(figure(x, 3) for x in tail)),
        ("both rank the same token first", f"{entry.top1:.1%}"),
        (
            "the source's five likeliest tokens that are among this model's five",
            f"{entry.top5:.1%}",
        ),
        ("perplexity (source)", f"{entry.perplexity:.4f} ({entry.source_perplexity:.4f})"),
    ]
