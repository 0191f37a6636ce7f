# SPDX-License-Identifier: Apache-2.0
"""Printing results and errors, and the frame around every command.

Importing it does not import rich; see `cli.app`.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any, NoReturn, cast

from fourfold.cli.log import log
from fourfold.cli.options import as_options
from fourfold.cli.signals import error_document, guard
from fourfold.errors import FourfoldError
from fourfold.storage.units import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fourfold.run.merge import Merged
    from fourfold.run.result import Result

LONGEST_MESSAGE = 2000

UNLIMITED = 10_000
"""The width of a file or a pipe: nothing is wrapped there."""


def run(app: Callable[..., object]) -> None:
    """Run a command: signals, exit codes and errors as documented; tracebacks with --debug."""
    _mend_streams()
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with guard, closing(log):
        try:
            code = app(standalone_mode=False)
        except FourfoldError as error:
            _fail(_with_notes(str(error), error), error, error.exit_code, debug)
        except Exception as error:
            if hasattr(error, "format_message"):  # an error in the arguments, of typer's
                _fail_parsing(error)
            text = str(error) or type(error).__name__
            text = f"{text} (a defect of fourfold: run again with --debug and report it)"
            _fail(_with_notes(text, error), error, 1, debug)
        if code:
            sys.exit(cast(int, code))


def show(result: Any, as_json: bool, draw: Callable[[Any], RenderableType]) -> None:
    """Print a result on stdout: as one JSON document, or as `draw` lays it out."""
    log.write(str(result))
    if as_json:
        print_json(result.to_dict())
        return
    from rich.text import Text

    drawn = draw(result)
    console().print(drawn, soft_wrap=isinstance(drawn, Text))


def show_result(result: Result | Merged, as_json: bool) -> None:
    """Print the result of a job, after its verification."""
    from fourfold.cli.tables import generation_table, report_text, result_text

    if result.report is not None and not as_json:
        show(result.report, as_json, report_text)
    preview = getattr(result, "preview", None)
    if preview is not None and not as_json:
        show(preview, as_json, generation_table)
    show(result, as_json, result_text)


def console() -> Console:
    """The console for results, on stdout."""
    from rich.console import Console

    return Console(width=None if has_width() else UNLIMITED, highlight=False)


def has_width() -> bool:
    """True if stdout is a terminal. COLUMNS alone means nothing: readline leaves it to children."""
    return sys.stdout.isatty()


def print_json(value: object) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _with_notes(text: str, error: BaseException) -> str:
    """A message with the notes of its error, which say what is left in OUT."""
    return "\n".join([text, *getattr(error, "__notes__", ())])


def _mend_streams() -> None:
    """Make printing work whatever the terminal's encoding, and with a closed stream."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail_parsing(error: Any) -> NoReturn:
    """End with an error that typer found in the arguments, and shows itself."""
    error.show()
    print(error_document("UsageError", error.format_message(), error.exit_code), end="")
    sys.exit(error.exit_code)


def _fail(message: str, error: Exception, code: int, debug: bool) -> NoReturn:
    message = printable(as_options(message), keep="\n")
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} […] {message[-LONGEST_MESSAGE // 2 :]}"
    if debug:
        import traceback

        traceback.print_exc()
    log.write(f"error: {message}")
    print(f"error: {message}", file=sys.stderr)
    print(error_document(type(error).__name__, message, code), end="")
    sys.exit(code)
