"""The context of every call of the API: it passes events on and lets signals end a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from fourfold.events import Event, OnEvent, WarningIssued
from fourfold.run.progress import default_display
from fourfold.run.signals import default_guard


class Session:
    """Passes each event on to all listeners, and keeps the warnings."""

    def __init__(self, listeners: Sequence[OnEvent]) -> None:
        self.listeners = listeners
        self.warnings: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, WarningIssued):
            self.warnings.append(event.text)
        for listener in self.listeners:
            listener(event)

    def warn(self, text: str) -> None:
        self(WarningIssued(text))


@contextmanager
def session(progress: bool | None, on_event: OnEvent | None) -> Iterator[Session]:
    """Listen to a run, show its progress, and let signals end it cleanly.

    Args:
        progress: True shows progress on stderr, False does not; None shows it if stderr is a
            terminal, or in a notebook.
        on_event: The caller's callback.
    """
    with (
        default_guard() or nullcontext() as guard,
        default_display(progress) or nullcontext() as display,
    ):
        yield Session([x for x in (guard, display, on_event) if x is not None])
