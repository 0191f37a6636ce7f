# SPDX-License-Identifier: Apache-2.0
"""The state that all workers share while a plan is executed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.calibration.scales import ActivationScales
from fourfold.events import OnEvent, ignore
from fourfold.planning import CopyPlan
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source

if TYPE_CHECKING:
    from fourfold.execution.ahead import GroupsAhead
    from fourfold.execution.streams import BufferPool
    from fourfold.verification.evidence import Prover


@dataclass
class ExecutionContext:
    """A plan, and everything that is needed to execute it."""

    plan: CopyPlan
    source: Source
    out: OutputFolder
    threads: int
    """The number of threads that compute at a time."""
    scales: ActivationScales | None = None
    """The scales that calibration measured, or None. They are complete for a layer before its
    shards are written."""
    pool: BufferPool | None = None
    """The buffers of the GPU that quantizes; None if the CPU does."""
    on_event: OnEvent = ignore
    check: Callable[[], None] | None = None
    """Called before each job; an error that it raises ends the work."""
    strict: bool = False
    """True if a weight or an input that would be repaired is an error."""
    prover: Callable[[Path, Iterable[str]], Prover] | None = None
    """Makes what compares each tensor with the source as soon as it is written, given a shard under
    its temporary name and the raw tensors that it is made from; None if that can wait."""
    ahead: GroupsAhead | None = None
    """The groups that are quantized before their shard is written; None if there are none."""
    computing: threading.Semaphore = field(init=False)
    """Held by threads while they compute on the CPU."""

    def __post_init__(self) -> None:
        self.computing = threading.Semaphore(self.threads)

    @property
    def workers(self) -> int:
        """The number of workers: one for each set of GPU buffers, or a few more than `threads`, so
        that some can wait for the disk while the others compute."""
        if self.pool is not None:
            return self.pool.count
        return self.threads + self.plan.limits.waiting
