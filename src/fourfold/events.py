# SPDX-License-Identifier: Apache-2.0
"""Everything that a caller can observe while fourfold works.

    def on_event(event: fourfold.Event) -> None:
        match event:
            case ShardWritten(shards_done=done, shards=count):
                print(f"{done} of {count} shards")

    fourfold.quantize(model, out, recipe, on_event=on_event)

The order in `quantize`: `BudgetSpent` where the recipe has a budget, after `WindowEvaluated`;
`PlanMade`, `BackendChosen`, `DataLoaded` where the recipe calibrates, `WritingBegan`, `Resumed`
where an earlier run has finished some shards, then `BatchCalibrated`, `LayerCalibrated`,
`BytesQuantized` and `ShardWritten` until `OutputComplete`, and `BytesVerified` after it. A
`WarningIssued` can come at any time. `BytesQuantized` and `ShardWritten` come from worker threads.
Events come one at a time.

Amounts that are done are those of the whole job: a run that resumes begins where the earlier one
ended, and its first event says so before anything is done.

This module lies below all others, so events carry plain values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class PlanMade(Event):
    """The plan is made, and disk and memory suffice for it."""

    plan: Any
    """The `fourfold.Plan`."""


@dataclass(frozen=True)
class BackendChosen(Event):
    """It is known which backend will quantize the weights."""

    backend: str
    """The backend, and why this one."""
    where: str
    """The device or the threads, and how much memory they take."""
    is_fallback: bool
    """True if a faster backend exists for this device but cannot be used."""


@dataclass(frozen=True)
class WarningIssued(Event):
    """Something goes otherwise than it was meant; each warning is issued once."""

    text: str


@dataclass(frozen=True)
class DataLoaded(Event):
    """The calibration data is read and cut into samples."""

    samples: int
    seq: int
    """Tokens of a sample, at most."""
    tokens: int
    """Tokens of all samples, without padding."""
    origin: str
    """Names of the files or datasets that the text comes from."""
    is_embedded: bool
    """True if it is the text that comes with fourfold."""
    beginning: str
    """The beginning of the first sample."""


@dataclass(frozen=True)
class BudgetSpent(Event):
    """It is chosen which components of the model are stored otherwise than the recipe's rules
    say."""

    moved: int
    components: int
    """The number of all components."""
    bits_before: float
    """Bits for each weight, by the rules alone."""
    bits: float
    kl_before: float
    """KL to the source on calibration text, nats a token, by the rules alone."""
    kl: float


@dataclass(frozen=True)
class WritingBegan(Event):
    """From now on `out` holds an unfinished run, which must be cleaned up if the run ends early."""

    out: Path


@dataclass(frozen=True)
class Resumed(Event):
    """An earlier run has finished some of the shards; this run does the others."""

    finished: int
    shards: int
    """The number of all shards."""


@dataclass(frozen=True)
class BatchCalibrated(Event):
    """A batch of calibration data has passed a decoder layer, or begins to (`batches_done` is 0).

    For a model in memory, that it has passed the whole model; `layer` and `layers` are 0 then.
    """

    layer: int
    """From 0."""
    layers: int
    batches_done: int
    """Of this rank, through this layer."""
    batches: int
    tokens_done: int
    """Of this rank, each counted once for each layer that it has passed."""
    tokens_total: int


@dataclass(frozen=True)
class LayerCalibrated(Event):
    """All calibration data has passed a decoder layer."""

    layer: int
    """From 0."""
    layers: int


@dataclass(frozen=True)
class LayerFolded(Event):
    """The factors that are folded into a decoder layer are chosen."""

    layer: int
    """From 0."""
    layers: int


@dataclass(frozen=True)
class BytesQuantized(Event):
    """Some tensors were quantized or copied, and handed to the disk."""

    bytes_done: int
    """Bytes of the source. Of several ranks, this rank's share."""
    bytes_total: int


@dataclass(frozen=True)
class ShardWritten(Event):
    """A shard is on the disk."""

    unit: str
    """The part of the model that it belongs to: "layer 3", for instance."""
    shards_done: int
    """By this run and rank."""
    shards: int
    bytes_done: int
    """Bytes of the source."""
    bytes_total: int


@dataclass(frozen=True)
class BytesCopied(Event):
    """Tensors were copied into a checkpoint that is merged or converted."""

    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class OutputComplete(Event):
    """`out` is a whole checkpoint; what follows only reads it."""

    out: Path


@dataclass(frozen=True)
class BytesVerified(Event):
    """Some of the output was verified."""

    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class TokenGenerated(Event):
    """A model has generated a token."""

    model: Literal["source", "quantized"]
    tokens_done: int
    tokens: int
    """The largest number of tokens that it may generate."""


@dataclass(frozen=True)
class WindowEvaluated(Event):
    """A window of text has passed a decoder layer of a model that is measured."""

    model: str
    """"source", or the name of the checkpoint's folder."""
    layer: int
    """From 0."""
    layers: int
    windows_done: int
    """Of all models, each counted once for each layer that it has passed."""
    windows_total: int


OnEvent = Callable[[Event], None]
"""A callback that receives every event."""


def ignore(event: Event) -> None:
    """Do nothing: the callback if the caller gives none."""
