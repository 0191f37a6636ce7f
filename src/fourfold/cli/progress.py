# SPDX-License-Identifier: Apache-2.0
"""Print a command's progress: one `match` over the events of the run."""

from __future__ import annotations

import sys
import time

from rich.console import Console

from fourfold.cli.log import log
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
from fourfold.run.progress import Clock, ProgressDisplay, sentence


class CommandDisplay(ProgressDisplay):
    """The plan and other facts on stdout; warnings and progress on stderr."""

    def __init__(
        self,
        heading: str,
        *,
        quiet: bool,
        verbose: bool = False,
        show_data: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        """Create a display.

        Args:
            heading: The line before the first line of progress, where there is no terminal: a run
                that is over soon leaves nothing there.
            quiet: Show warnings alone, as for --json.
            verbose: Show the backend.
            show_data: Show how the calibration data begins, also where it is the user's.
            clock: The time in seconds.
        """
        self.rank = launch().rank
        self.quiet = quiet or self.rank > 0
        self.verbose = verbose and self.rank == 0
        self.show_data = show_data
        stderr = Console(stderr=True, quiet=self.quiet)
        has_lines = not self.quiet and not stderr.is_terminal
        to_log = [log.write] if self.rank == 0 else []
        lines_to = [self._say_progress] if has_lines else to_log
        super().__init__(stderr, clock=clock, lines_to=lines_to)
        self._heading = heading

    def __call__(self, event: Event) -> None:
        """Show an event."""
        guard(event)
        match event:
            case PlanMade(plan):
                self._print(plan_text(plan), as_options(str(plan)))
            case BackendChosen(backend, where, is_fallback):
                if self.verbose:
                    self.say(where if is_fallback else f"{backend}\n{where}")
            case WarningIssued(text):
                rank = f"rank {self.rank}: " if self.rank else ""
                self.say(f"warning: {rank}{as_options(text)}")
            case Resumed():
                self._print(sentence(event))
            case DataLoaded(is_embedded=is_embedded, beginning=beginning):
                self._print(as_options(sentence(event)))
                if self.show_data or is_embedded:
                    shown = " ".join(beginning.split())[:100]
                    self._print(f"the first begins: {shown} …", style="dim")
            case _:
                super().__call__(event)

    def say(self, text: str) -> None:
        """Print on stderr, above the progress bars if there are any."""
        log.write(text)
        if self.console.quiet:
            print(text, file=sys.stderr)
        else:
            super().say(text)

    def _say_progress(self, line: str) -> None:
        if self._heading:
            super().say(self._heading)  # the log has it already
            self._heading = ""
        self.say(line)

    def _print(self, value: object, text: str | None = None, style: str | None = None) -> None:
        """Print on stdout, above the progress bars. `text` is what the log says."""
        if self.rank == 0:
            log.write(str(value) if text is None else text)
        if not self.quiet:
            console().print(value, style=style, markup=False, soft_wrap=True)
