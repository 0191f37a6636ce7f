# SPDX-License-Identifier: Apache-2.0
"""Signals end a command with one line on stderr and exit code 130 or 143."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

from fourfold.cli.log import log
from fourfold.cli.options import as_options
from fourfold.distributed.launcher import launch
from fourfold.run.signals import SignalGuard
from fourfold.storage.temporary import remove_all


def error_document(kind: str, message: str, code: int) -> str:
    """Return what --json prints of an error, an `ErrorDocument`; without --json, nothing.

    A signal may need it in the middle of an import, so it imports nothing.
    """
    if "--json" not in sys.argv[1:] or launch().rank > 0:
        return ""
    values = {"type": kind, "message": message, "exit_code": code}
    document = {"schema_version": 1, "kind": "error", **values}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def end_process(number: int, outcome: str) -> NoReturn:
    """End at once; `outcome` is a sentence on what is left in OUT."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    message = f"stopped by {signal.Signals(number).name}; {as_options(outcome)}"
    text = f"error: {message}"
    remove_all()
    log.write(text)
    os.write(2, f"{show_cursor}{text}\n".encode())
    os.write(1, error_document("StoppedError", message, 128 + number).encode())
    os._exit(128 + number)


guard = SignalGuard(end_process)
"""Of the process. `terminal.run` enters it, and the display of a command passes events on to it."""
