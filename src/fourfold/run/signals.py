# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end a run so that no unfinished output looks like a checkpoint.

While `out` is written, a signal raises `StoppedError` in the main thread: the run unwinds and
cleans up, and only then does the signal do what it would have done at once. At any other time
there is nothing to clean up, and it acts at once. (It must not raise then: an exception in the
middle of an import would leave an import lock behind that another thread waits for.)

Python drops an exception that is raised in a destructor or in the callback of a weak reference,
and a signal may arrive in one. The guard then sends the signal again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from fourfold.events import Event, OutputComplete, WritingBegan
from fourfold.storage.temporary import remove_all

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SENT_AGAIN_AFTER = 0.01
"""Seconds until a signal is sent again whose exception was dropped."""

NOTHING_WRITTEN = "nothing was written."
NOT_VERIFIED = "`out` is written, but not verified."

End = Callable[[int, str], object]
"""Ends the process for a signal's number, and a sentence on what the run has left in `out`."""


class StoppedError(BaseException):
    """A signal asked the run to end. Not a `KeyboardInterrupt`, which typer would swallow."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SignalGuard:
    """Handles both signals within a context; it must receive the events of the run."""

    def __init__(self, end: End) -> None:
        self._end = end
        self._is_writing = self._is_in_hook = False
        self._has_arrived = threading.Event()
        self._outcome = NOTHING_WRITTEN
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_hook = sys.unraisablehook

    def __call__(self, event: Event) -> None:
        match event:
            case WritingBegan():
                self._is_writing = True
            case OutputComplete():
                self._is_writing, self._outcome = False, NOT_VERIFIED

    def __enter__(self) -> SignalGuard:
        self._is_writing, self._outcome = False, NOTHING_WRITTEN
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._send_again
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._previous_hook
        self._has_arrived.set()
        if isinstance(error, StoppedError):
            notes = getattr(error, "__notes__", ())
            self._end(error.number, " ".join(notes) or self._outcome)

    def _handle(self, number: int, _: object) -> None:
        if not self._is_writing:
            self._end(number, self._outcome)
            return
        if self._is_in_hook:  # this exception would be dropped, too
            return
        self._has_arrived.set()
        for both in SIGNALS:
            signal.signal(both, signal.SIG_IGN)  # a second signal must not stop the clean-up
        raise StoppedError(number)

    def _send_again(self, dropped: sys.UnraisableHookArgs) -> None:
        """Send a signal again whose exception Python has dropped."""
        if not isinstance(dropped.exc_value, StoppedError):
            self._previous_hook(dropped)
            return
        number = dropped.exc_value.number
        self._is_in_hook = True
        signal.signal(number, self._handle)
        self._has_arrived.clear()
        threading.Thread(target=self._send, args=(number,), daemon=True).start()
        self._is_in_hook = False

    def _send(self, number: int) -> None:
        """Send a signal until its handler has raised, or the guard is left."""
        while not self._has_arrived.wait(SENT_AGAIN_AFTER):
            os.kill(os.getpid(), number)


def default_guard() -> SignalGuard | None:
    """The guard of a call from Python; None if the caller handles the signals, or on a thread.

    Only Python's default handlers are replaced, and they are restored afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    handlers = [signal.getsignal(number) for number in SIGNALS]
    if handlers != [signal.default_int_handler, signal.SIG_DFL]:
        return None
    return SignalGuard(_end_as_python_does)


def _end_as_python_does(number: int, outcome: str) -> None:
    """Raise KeyboardInterrupt for SIGINT; let SIGTERM end the process."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt(outcome)
    remove_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
