# SPDX-License-Identifier: Apache-2.0
"""How a command begins: the line that says so, the log, and the display of its progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourfold._version import __version__
from fourfold.cli.log import log
from fourfold.distributed.launcher import launch
from fourfold.storage.units import printable


@contextmanager
def begun(
    what: str,
    *,
    quiet: bool,
    log_file: Path | None,
    verbose: bool = False,
    show_data: bool = False,
) -> Iterator[dict[str, Any]]:
    """Say what begins, on a terminal at once, and show the progress of a call of the API.

    Yields the arguments for that call. Within, PyTorch can be imported, which takes a while.
    """
    if log_file is not None:
        log.open(log_file)
    heading = say_at_once(what, quiet=quiet)
    if launch().rank == 0:
        log.write(heading)
    from fourfold.cli.progress import CommandDisplay

    with CommandDisplay(heading, quiet=quiet, verbose=verbose, show_data=show_data) as display:
        yield {"progress": False, "on_event": display}


def say_at_once(what: str, *, quiet: bool) -> str:
    """Say on a terminal what begins; return the line."""
    heading = printable(f"fourfold {__version__}: {what}")
    if sys.stderr.isatty() and not quiet and launch().rank == 0:
        print(heading, file=sys.stderr, flush=True)
    return heading
