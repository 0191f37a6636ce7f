"""The progress of a run on a terminal or in a notebook: one `match` over its events.

It lies below `api`, and not in the command line, because Python callers get it by default.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fourfold.distributed.launcher import launch
from fourfold.events import (
    BytesCopied,
    BytesVerified,
    DataLoaded,
    Event,
    LayerCalibrated,
    Resumed,
    ShardWritten,
    TokenGenerated,
    WarningIssued,
    WritingBegan,
)
from fourfold.storage.units import size


class ProgressDisplay:
    """Progress bars for long steps, and lines for warnings and other messages."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[rate]:>9} · {task.fields[rss]} resident"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._begun: dict[str, float] = {}

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case WarningIssued(text):
                self.say(f"warning: {text}")
            case DataLoaded() | Resumed():
                self.say(sentence(event))
            case WritingBegan():
                self._begun["quantizing"] = time.perf_counter()
            case LayerCalibrated(layer, layers):
                self._show_count("calibrating", layer + 1, layers, "layer")
            case ShardWritten():
                self._show_shard(event)
            case BytesCopied(done, total):
                self._show_bytes("copying", done, total)
            case BytesVerified(done, total):
                self._show_bytes("verifying", done, total)
            case TokenGenerated(model, done, total):
                self._show_count(model, done, total, "token")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line above the bars."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _show_shard(self, event: ShardWritten) -> None:
        self._show_bytes("quantizing", event.bytes_done, event.bytes_total)
        rate = self._rate("quantizing", event.bytes_done)
        self.say(
            f"  {event.unit}: shard {event.shards_done}/{event.shards} · {rate} · "
            f"{_resident()} resident",
            style="dim",
        )

    def _show_count(self, name: str, done: int, total: int, unit: str) -> None:
        self._update(name, done, total, f"{unit} {done}/{total}")

    def _show_bytes(self, name: str, done: int, total: int) -> None:
        self._begun.setdefault(name, time.perf_counter())
        self._update(name, done, total, self._rate(name, done))

    def _update(self, name: str, done: int, total: int, rate: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, rate="", rss="")
        self._bars.update(
            self._tasks[name], completed=done, total=total, rate=rate, rss=_resident()
        )

    def _rate(self, name: str, done: int) -> str:
        seconds = time.perf_counter() - self._begun[name]
        return f"{size(int(done / seconds))}/s" if seconds > 0.2 else ""


def _resident() -> str:
    from fourfold.distributed.machine import resident  # psutil would slow down `--help`

    return size(resident())


def sentence(event: DataLoaded | Resumed) -> str:
    """An event as a line for people."""
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
