# SPDX-License-Identifier: Apache-2.0
"""Long steps of a run (calibrating, quantizing, verifying): how far each is, and how fast.

Calibration and quantization take turns, layer by layer. So the time between two events of a run is
counted for the step of the second one: each step has a rate of its own, and the time left is the
sum of what each step has left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fourfold.events import (
    BatchCalibrated,
    BytesCopied,
    BytesQuantized,
    BytesVerified,
    Event,
    LayerFolded,
    TokenGenerated,
    WindowEvaluated,
)
from fourfold.storage.units import size

LEAST_SECONDS, LEAST_PART = 0.5, 1e-3
"""A step that has taken less, or has done a smaller part of what it has to do, has no rate yet."""


@dataclass
class Stage:
    """A long step."""

    name: str
    done: int = 0
    total: int = 0
    position: str = ""
    """How far it is, for people."""
    unit: str = "B"
    """The unit of the count: bytes ("B"), or the name of a unit."""
    passes: int = 1
    """How often each is counted."""
    first: int | None = None
    """The amount that was done when this run began."""
    seconds: float = 0.0
    """The time that this run has spent on it."""

    @property
    def is_done(self) -> bool:
        """True if nothing is left."""
        return self.done >= self.total

    @property
    def rate(self) -> float | None:
        """Amount per second; None if it is not known yet."""
        is_known = self.has_moved and self.seconds >= LEAST_SECONDS
        return self.moved / self.seconds if is_known else None

    @property
    def has_moved(self) -> bool:
        """True if this run has done enough for an estimate from it."""
        return self.moved > LEAST_PART * self.total

    @property
    def moved(self) -> int:
        """The amount that this run has done."""
        return self.done - (self.first or 0)

    @property
    def text(self) -> str:
        """Position and rate, for people."""
        if self.rate is None:
            return self.position
        rate = self.rate / self.passes
        pace = f"{size(int(rate))}/s" if self.unit == "B" else f"{rate:,.3g} {self.unit}/s"
        return f"{self.position} · {pace}"


@dataclass
class Stages:
    """All long steps of a run."""

    now: float
    """The time of the last event, in seconds."""
    stages: dict[str, Stage] = field(default_factory=dict)

    def see(self, event: Event, now: float) -> Stage | None:
        """Count an event; return the step that it belongs to, if any."""
        match event:
            case BatchCalibrated(layer, layers, batch, batches, done, total):
                stage = self._stage("calibrating", done, total)
                stage.unit, stage.passes = "tokens", max(1, layers)
                where = f"layer {layer + 1}/{layers} · " if layers else ""
                stage.position = f"{where}batch {batch}/{batches}"
            case LayerFolded(layer, layers):
                stage = self._stage("folding", layer + 1, layers)
                stage.unit, stage.position = "layers", f"layer {layer + 1}/{layers}"
            case BytesQuantized(done, total):
                stage = self._stage("quantizing", done, total)
            case BytesCopied(done, total):
                stage = self._stage("copying", done, total)
            case BytesVerified(done, total):
                stage = self._stage("verifying", done, total)
            case TokenGenerated(model, done, total):
                stage = self._stage(model, done, total)
                stage.unit, stage.position = "tokens", f"token {done}/{total}"
            case WindowEvaluated(model, layer, layers, done, total):
                stage = self._stage("evaluating", done, total)
                stage.unit, stage.passes = "windows", max(1, layers)
                stage.position = f"{model} · layer {layer + 1}/{layers}"
            case _:
                return None
        if stage.unit == "B":
            stage.position = f"{size(stage.done)} of {size(stage.total)}"
        if stage.first is None:
            stage.first = stage.done
        else:
            stage.seconds += now - self.now
        self.now = now
        return stage

    def _stage(self, name: str, done: int, total: int) -> Stage:
        stage = self.stages.setdefault(name, Stage(name))
        stage.done, stage.total = done, total
        return stage

    @property
    def unfinished(self) -> list[Stage]:
        """The steps that have begun and not ended, calibration first."""
        stages = sorted(self.stages.values(), key=lambda stage: stage.name != "calibrating")
        return [stage for stage in stages if not stage.is_done]

    @property
    def seconds_left(self) -> float | None:
        """An estimate for all steps that have begun; None if it is too early for one."""
        if sum(stage.seconds for stage in self.stages.values()) < LEAST_SECONDS:
            return None
        left = 0.0
        for stage in self.unfinished:
            if not stage.has_moved:
                return None
            left += (stage.total - stage.done) * stage.seconds / stage.moved
        return left


def duration(seconds: float) -> str:
    """A time in few words: 45 s, 12 min, 3 h 20 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
