"""Signals end a command with one line on stderr and exit code 130 or 143."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from fourfold.cli.log import log
from fourfold.cli.options import as_options
from fourfold.run.signals import SignalGuard
from fourfold.storage.temporary import remove_all


def end_process(number: int, outcome: str) -> NoReturn:
    """End at once; `outcome` is a sentence on what is left in OUT."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    text = f"error: stopped by {signal.Signals(number).name}; {as_options(outcome)}"
    remove_all()
    log.write(text)
    os.write(2, f"{show_cursor}{text}\n".encode())
    os._exit(128 + number)


guard = SignalGuard(end_process)
"""Of the process. `terminal.run` enters it, and the display of a command passes events on to it."""
