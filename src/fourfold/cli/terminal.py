"""What a terminal sees: progress, results, errors, and how a signal ends the process."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fourfold.distributed.launcher import launch
from fourfold.errors import FourfoldError
from fourfold.events import (
    BackendChosen,
    BytesCopied,
    BytesVerified,
    DataLoaded,
    Event,
    LayerCalibrated,
    OutputComplete,
    PlanMade,
    Resumed,
    ShardWritten,
    TokenGenerated,
    WarningIssued,
    WritingBegan,
)
from fourfold.storage.temporary import remove_all

if TYPE_CHECKING:
    from fourfold.api import Result
    from fourfold.run.merge import Merged

LONGEST_MESSAGE = 2000


class Display:
    """Progress on stderr where that is a terminal, silent elsewhere."""

    def __init__(self, *, quiet: bool, verbose: bool = False) -> None:
        self.verbose = verbose and launch().rank == 0
        quiet = quiet or launch().rank > 0
        self.console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[rate]:>9} · {task.fields[rss]} resident"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, Any] = {}
        self.begun: dict[str, float] = {}

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        global _outcome, _is_writing
        match event:
            case PlanMade(plan):
                self._print(plan)
            case BackendChosen():
                self._show_backend(event)
            case WarningIssued(text):
                rank = launch().rank
                self._say(f"warning: {f'rank {rank}: ' if rank else ''}{text}")
            case DataLoaded():
                self._show_data(event)
            case WritingBegan():
                _is_writing = True
                self.begun["quantizing"] = time.perf_counter()
            case Resumed(finished, shards):
                self._print(
                    f"going on with an unfinished run: {finished:,} of {shards:,} shards are "
                    "finished"
                )
            case LayerCalibrated(layer, layers):
                self._count("calibrating", layer + 1, layers, "layer")
            case ShardWritten():
                self._show_shard(event)
            case BytesCopied(done, total):
                self._update("copying", done, total)
            case OutputComplete():
                _outcome, _is_writing = "OUT is written, but not verified", False
            case BytesVerified(done, total):
                self._update("verifying", done, total)
            case TokenGenerated(model, done, total):
                self._count(model, done, total, "token")

    def _print(self, value: object) -> None:
        """On stdout, above the progress bars."""
        if not self.quiet:
            console().print(value)

    def _say(self, text: str) -> None:
        """A line on stderr: above the progress bars, where there are any."""
        if self.console.quiet:
            print(text, file=sys.stderr)
        else:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show_backend(self, event: BackendChosen) -> None:
        """With --verbose; a fallback is a warning, too, which says the same."""
        if self.verbose:
            if not event.is_fallback:
                self._say(event.backend)
            self._say(event.where)

    def _show_data(self, event: DataLoaded) -> None:
        if self.quiet:
            return
        own = " (--calib gives it your own)" if event.is_embedded else ""
        console().print(
            f"calibrating on {event.samples:,} samples of {event.seq:,} tokens from "
            f"{event.origin}{own}",
            markup=False,
        )
        beginning = " ".join(event.beginning.split())[:100]
        console().print(f"the first begins: {beginning} …", markup=False, style="dim")

    def _show_shard(self, event: ShardWritten) -> None:
        self._update("quantizing", event.bytes_done, event.bytes_total)
        rate, rss = self._rate("quantizing", event.bytes_done), _resident()
        self.console.print(
            f"  {event.unit}: shard {event.shards_done}/{event.shards} · {rate} · {rss} resident",
            style="dim",
            highlight=False,
        )

    def _count(self, name: str, done: int, total: int, what: str) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, rate="", rss="")
        self.progress.update(
            self.tasks[name], completed=done, rate=f"{what} {done}/{total}", rss=_resident()
        )

    def _update(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.begun.setdefault(name, time.perf_counter())
            self.tasks[name] = self.progress.add_task(name, total=total, rate="", rss="")
        self.progress.update(
            self.tasks[name],
            completed=done,
            total=total,
            rate=self._rate(name, done),
            rss=_resident(),
        )

    def _rate(self, name: str, done: int) -> str:
        from fourfold.storage.units import size

        seconds = time.perf_counter() - self.begun[name]
        return f"{size(int(done / seconds))}/s" if seconds > 0.2 else ""


def _resident() -> str:
    from fourfold.distributed.machine import resident
    from fourfold.storage.units import size

    return size(resident())


def print_result(result: Result | Merged) -> None:
    """The closing lines of a job."""
    if result.report is not None:
        console().print(result.report)
    console().print(str(result), style="bold", soft_wrap=True, markup=False)


def console() -> Console:
    """Where results are printed."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(width=width, highlight=False)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


_outcome = "nothing was written"
"""What a signal leaves behind, for its message."""

_is_writing = False
"""Whether a signal must clean up. Where not, the process ends at once: an exception raised in the
middle of an import would leave a lock behind that another thread waits for."""


class _StoppedError(BaseException):
    """A signal asked the process to end. Not a `KeyboardInterrupt`, which typer would keep."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # one is enough: what was begun is cleaned up
    if not _is_writing:
        _end(number)
    raise _StoppedError(number)


def _end(number: int, notes: Sequence[str] = ()) -> NoReturn:
    """notes: what is left, of an error that was on its way when the signal came."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    outcome = " ".join(notes) or f"{_outcome}."
    text = f"{show_cursor}error: stopped by {signal.Signals(number).name}; {outcome}\n"
    remove_all()
    os.write(2, text.encode())
    os._exit(128 + number)


def run(app: Callable[[], object]) -> None:
    """Run a command: exit codes and errors as documented, tracebacks only with --debug."""
    _mend_streams()
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except FourfoldError as error:
        _fail("\n".join([str(error), *_notes(error)]), error.exit_code, debug)
    except _StoppedError as stopped:
        _end(stopped.number, _notes(stopped))
    except Exception as error:
        text = str(error) or type(error).__name__
        text = f"{text} (a defect of fourfold: run again with --debug and report it)"
        _fail("\n".join([text, *_notes(error)]), 1, debug)


def _notes(error: BaseException) -> Sequence[str]:
    """What was said of an error on its way: what it has left behind."""
    return getattr(error, "__notes__", ())


def _mend_streams() -> None:
    """Print whatever the terminal's encoding; print nowhere where a stream is closed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int, debug: bool) -> None:
    message = "".join(x if x.isprintable() or x in "\n×→·…" else repr(x)[1:-1] for x in message)
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} […] {message[-LONGEST_MESSAGE // 2 :]}"
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
