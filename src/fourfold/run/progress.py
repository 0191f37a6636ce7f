# SPDX-License-Identifier: Apache-2.0
"""The progress of a run: bars on a terminal or in a notebook, lines of text anywhere else.

    calibrating ━━━━━━━───────  layer 3/48 · batch 5/16 · 109 tokens/s
    quantizing  ━━────────────  12.3 GB of 230 GB · 1.2 GB/s
    3 min · about 12 min left · 3.2 GB of memory

It lies below `api`, and not in the command line, because Python callers get it by default.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from fourfold.distributed.launcher import launch
from fourfold.events import BudgetSpent, DataLoaded, Event, Resumed, WarningIssued
from fourfold.run.stages import Stage, Stages, duration
from fourfold.storage.units import size

NAMES, WIDEST_BAR, NARROWEST_BAR = 12, 40, 4
"""Characters of a step's name, and of its bar."""

PACE, SLOWEST = 10.0, 300.0
"""Seconds between two lines of text, at first and at most."""

Clock = Callable[[], float]
Write = Callable[[str], None]


class Lines:
    """Lines of text, every ten seconds at first, and the rarer the longer the run takes."""

    def __init__(self, write: Write, stages: Stages) -> None:
        self.write, self.stages = write, stages
        self.began = self.last = -1.0
        """When the first step began, and when a line was written."""
        self._has_line: set[str] = set()
        """The steps that a line was written of."""

    def __call__(self, stage: Stage) -> None:
        """Write a line, if it is time for one, or if a step of which there are some has ended."""
        now = self.stages.now
        if self.last < 0:
            self.began = self.last = now
        wait = min(SLOWEST, max(PACE, (now - self.began) / 20))
        has_ended = stage.is_done and stage.name in self._has_line
        if now - self.last >= wait or has_ended:
            self.last = now
            self._has_line.add(stage.name)
            self.write(f"{stage.name}: {stage.text} · {_figures(self.stages)}")
        if stage.is_done:
            self._has_line.discard(stage.name)


class ProgressDisplay:
    """Shows the progress of a run, and lines for warnings and other messages."""

    def __init__(
        self,
        console: Console,
        *,
        clock: Clock = time.monotonic,
        lines_to: Sequence[Write] | None = None,
    ) -> None:
        """Create a display.

        Args:
            console: Where it is shown: with bars, if that is a terminal or a notebook.
            clock: The time in seconds.
            lines_to: Who gets the lines of text; by default the console, if it has no bars.
        """
        self.console, self._clock = console, clock
        has_bars = (console.is_terminal or console.is_jupyter) and not console.quiet
        if lines_to is None:
            lines_to = () if has_bars else (self.say,)
        self.stages = Stages(clock())
        self._began = self.stages.now
        self._lines = [Lines(write, self.stages) for write in lines_to]
        self._live: Live | None = None
        if has_bars:
            # Without this, what a command prints into a file would land on the terminal.
            is_shared = sys.stdout is not None and sys.stdout.isatty()
            self._live = Live(
                self,
                console=console,
                transient=True,
                refresh_per_second=4,
                redirect_stdout=is_shared or console.is_jupyter,
            )

    def __enter__(self) -> ProgressDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case WarningIssued(text):
                self.say(f"warning: {text}")
            case DataLoaded() | Resumed() | BudgetSpent():
                self.say(sentence(event))
        stage = self.stages.see(event, self._clock())
        if stage is not None:
            for line in self._lines:
                line(stage)

    def say(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        width, stages = options.max_width, self.stages.unfinished
        for stage in stages:
            yield _bar(stage, width)
        if stages:
            text = f"{duration(self._clock() - self._began)} · {_figures(self.stages)}"
            yield Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _bar(stage: Stage, width: int) -> Text:
    """The line of a step: its name, a bar if there is room for one, position and rate."""
    line = Text(stage.name.ljust(NAMES), no_wrap=True, overflow="ellipsis")
    room = min(WIDEST_BAR, width - len(line) - len(stage.text) - 2)
    if room >= NARROWEST_BAR:
        filled = room * stage.done // max(1, stage.total)
        line.append("━" * filled, "green").append("─" * (room - filled), "dim").append("  ")
    return line.append(stage.text)


def _figures(stages: Stages) -> str:
    """The time left, if it is known, and the memory that the process takes."""
    from fourfold.distributed.machine import resident  # psutil would slow down `--help`

    left, memory = stages.seconds_left, f"{size(resident())} of memory"
    return f"about {duration(left)} left · {memory}" if left else memory


def sentence(event: DataLoaded | Resumed | BudgetSpent) -> str:
    """An event as a line for people."""
    if isinstance(event, BudgetSpent):
        return (
            f"budget: {event.moved:,} of {event.components:,} components are stored otherwise, "
            f"{event.bits_before:.2f} → {event.bits:.2f} bits a weight, KL {event.kl_before:.2e} → "
            f"{event.kl:.2e} on calibration text"
        )
    if isinstance(event, Resumed):
        return (
            f"resuming an unfinished run: {event.finished:,} of {event.shards:,} shards are "
            "finished"
        )
    hint = " (`calib` gives it your own)" if event.is_embedded else ""
    return (
        f"calibrating on {event.samples:,} samples of {event.seq:,} tokens from "
        f"{event.origin}{hint}"
    )


def default_display(progress: bool | None) -> ProgressDisplay | None:
    """The display of a call from Python; None if there is nothing to show it on, or no wish to.

    Args:
        progress: True always shows it; None only if stderr is a terminal, or in a notebook. Under
            a launcher, the first rank alone shows it.
    """
    if progress is False or launch().rank > 0:
        return None
    console = Console(stderr=True)
    is_seen = console.is_jupyter or (sys.stderr is not None and sys.stderr.isatty())
    return ProgressDisplay(console) if progress or is_seen else None
