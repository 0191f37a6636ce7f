"""Print a command's progress: one `match` over the events of the run."""

from __future__ import annotations

import sys

from rich.console import Console

from fourfold.cli.options import as_options
from fourfold.cli.signals import guard
from fourfold.cli.tables import plan_text
from fourfold.cli.terminal import console
from fourfold.distributed.launcher import launch
from fourfold.events import (
    BackendChosen,
    DataLoaded,
    Event,
    PlanMade,
    Resumed,
    WarningIssued,
)
from fourfold.run.progress import ProgressDisplay, sentence


class CommandDisplay(ProgressDisplay):
    """The plan and other facts on stdout, warnings on stderr, progress where that is a terminal."""

    def __init__(self, *, quiet: bool, verbose: bool = False, show_data: bool = False) -> None:
        """Show the progress of one command.

        Args:
            quiet: For --json, which has stdout for itself.
            verbose: Show the backend.
            show_data: Show how the calibration data begins, also where it is the user's.
        """
        self.rank = launch().rank
        self.quiet = quiet or self.rank > 0
        self.verbose = verbose and self.rank == 0
        self.show_data = show_data
        self.has_bars = not self.quiet and sys.stderr.isatty()
        super().__init__(Console(stderr=True, quiet=not self.has_bars))

    def __call__(self, event: Event) -> None:
        """Show an event."""
        guard(event)
        match event:
            case PlanMade(plan):
                self._print(plan_text(plan))
            case BackendChosen(backend, where, is_fallback):
                if self.verbose:
                    self._say(where if is_fallback else f"{backend}\n{where}")
            case WarningIssued(text):
                rank = f"rank {self.rank}: " if self.rank else ""
                self._say(f"warning: {rank}{as_options(text)}")
            case Resumed():
                self._print(sentence(event))
            case DataLoaded(is_embedded=is_embedded, beginning=beginning):
                self._print(as_options(sentence(event)))
                if self.show_data or is_embedded:
                    shown = " ".join(beginning.split())[:100]
                    self._print(f"the first begins: {shown} …", style="dim")
            case _:
                super().__call__(event)

    def _print(self, value: object, style: str | None = None) -> None:
        """Print on stdout, above the progress bars."""
        if not self.quiet:
            console().print(value, style=style, markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        """Print on stderr: above the progress bars, if there are any."""
        if self.has_bars:
            self.say(text)
        else:
            print(text, file=sys.stderr)
