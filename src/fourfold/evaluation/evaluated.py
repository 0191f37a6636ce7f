# SPDX-License-Identifier: Apache-2.0
"""The result of `fourfold eval`: the figures of every checkpoint, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fourfold.documents import Shown, document
from fourfold.evaluation.figures import Interval
from fourfold.formats.kv_cache import KVFormat
from fourfold.storage.units import aligned, printable, size


@dataclass(frozen=True)
class ModelFigures:
    """One quantized checkpoint beside the source. KL in nats a token; shares from 0 to 1."""

    model: str
    """The checkpoint's folder."""
    simulated: bool
    """True if the inputs of its linear layers were rounded."""
    kv_cache: KVFormat | None
    """The format that its keys and values were rounded to."""
    kl: float
    """Mean over all positions."""
    kl_interval: Interval | None
    """Its 95 % interval; None for a single window."""
    kl_median: float
    kl_p90: float
    kl_p99: float
    top1: float
    """Share of positions where both rank the same token first."""
    top5: float
    """Share of the source's five likeliest tokens that are among the model's."""
    perplexity: float
    ratio: float | None
    """KL divided by that of the first checkpoint; None for the first itself."""
    ratio_interval: Interval | None


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """The figures of all checkpoints. Printing it gives what the command prints."""

    source: str
    text: str
    """The name of the file or dataset."""
    text_digest: str
    """SHA-256 of the windows' token ids."""
    windows: int
    length: int
    """Tokens of a window."""
    compared: int
    """How many of the source's likeliest tokens were compared one by one at each position."""
    vocabulary: int
    rest: float
    """The mean probability of all other tokens, which were compared as one."""
    perplexity: float
    """Of the source."""
    models: tuple[ModelFigures, ...]
    cache: str | None
    """The file that keeps the source's predictions; None if none was kept."""
    cache_bytes: int
    from_cache: bool
    """True if an earlier run wrote it, so that the source was not run."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        models = [dict(vars(model)) for model in self.models]
        return document("evaluation", **{**vars(self), "models": models})

    @property
    def headline(self) -> str:
        """The text, and the source."""
        return (
            f"{printable(self.source)}: perplexity {self.perplexity:.4f} on {self.windows:,} "
            f"windows of {self.length:,} tokens from {printable(self.text)}"
        )

    @property
    def remarks(self) -> list[str]:
        """What the figures mean, and where the source's predictions are."""
        lines = ["KL in nats a token, with 95 % intervals over windows"]
        if self.rest:
            lines[0] += (
                f"; the source's {self.compared:,} likeliest of {self.vocabulary:,} tokens one by "
                f"one, the rest ({self.rest:.2%} of the probability) as one: a lower bound"
            )
        if self.cache is not None:
            how = "read from" if self.from_cache else "kept in"
            lines.append(
                f"the source's predictions were {how} {self.cache} ({size(self.cache_bytes)})"
            )
        return lines

    def rows(self) -> list[list[str]]:
        """The table: a row for each figure, a column for each checkpoint, headings first."""
        columns = [_column(model) for model in self.models]
        heads = list(_HEADS)
        if len(columns) == 1:
            heads = heads[:-2]
        perplexity = heads.index("perplexity")
        heads[perplexity] += f" (source {self.perplexity:.4f})"
        return [list(row) for row in zip(heads, *columns, strict=False)]

    def __str__(self) -> str:
        return "\n".join([self.headline, *aligned(self.rows(), left=1), *self.remarks])


_HEADS = (
    *("", "activations", "KL", "  95 %", "  median", "  90th percentile", "  99th percentile"),
    *("top-1 agreement", "top-5 agreement", "perplexity", "KL / first", "  95 %"),
)


def _column(model: ModelFigures) -> list[str]:
    rounded = ["rounded"] if model.simulated else []
    rounded += [f"{model.kv_cache.upper()} KV cache"] if model.kv_cache is not None else []
    return [
        printable(model.model),
        ", ".join(rounded) or "exact",
        f"{model.kl:.3e}",
        _ends(model.kl_interval, ".2e"),
        *(f"{value:.2e}" for value in (model.kl_median, model.kl_p90, model.kl_p99)),
        f"{model.top1:.2%}",
        f"{model.top5:.2%}",
        f"{model.perplexity:.4f}",
        "" if model.ratio is None else f"{model.ratio:.3f}",
        _ends(model.ratio_interval, ".3f"),
    ]


def _ends(ends: Interval | None, spec: str) -> str:
    return "" if ends is None else f"{ends[0]:{spec}} to {ends[1]:{spec}}"
