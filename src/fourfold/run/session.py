# SPDX-License-Identifier: Apache-2.0
"""The context of every call of the API: it passes events on and lets signals end a run."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from fourfold.errors import FourfoldWarning, UsageError
from fourfold.events import Event, OnEvent, WarningIssued
from fourfold.run.progress import ProgressDisplay, default_display
from fourfold.run.signals import default_guard


class Session:
    """Passes each event on to all listeners, one at a time, and keeps the warnings.

    The command line shows warnings; callers from Python get them by Python's `warnings`.
    """

    def __init__(self, listeners: Sequence[OnEvent], *, shows_warnings: bool) -> None:
        self.listeners, self.shows_warnings = listeners, shows_warnings
        self.warnings: list[str] = []
        self._lock = threading.RLock()  # a listener may raise or warn in turn

    def __call__(self, event: Event) -> None:
        listeners = self.listeners
        if isinstance(event, WarningIssued):
            self.warnings.append(event.text)
            if not self.shows_warnings:
                warnings.warn(event.text, FourfoldWarning, stacklevel=_frames_to_caller())
                listeners = [x for x in listeners if not isinstance(x, ProgressDisplay)]
        with self._lock:
            for listener in listeners:
                listener(event)

    def warn(self, text: str) -> None:
        self(WarningIssued(text))


def _frames_to_caller() -> int:
    """The number of frames between `Session.__call__` and the code that called fourfold."""
    frame, count = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("fourfold."):
        frame, count = frame.f_back, count + 1
    return count


@contextmanager
def session(progress: bool | None, on_event: OnEvent | None) -> Iterator[Session]:
    """Listen to a run, show its progress, and let signals end it cleanly.

    Args:
        progress: True shows progress on stderr, False does not; None shows it if stderr is a
            terminal, or in a notebook.
        on_event: The caller's callback.
    """
    if on_event is not None and not callable(on_event):
        raise UsageError(f"`on_event={on_event!r:.60}`: give a function that takes an event.")
    with (
        default_guard() or nullcontext() as guard,
        default_display(progress) or nullcontext() as display,
    ):
        is_command = isinstance(on_event, ProgressDisplay)
        listeners = [x for x in (guard, display, on_event) if x is not None]
        yield Session(listeners, shows_warnings=is_command)
