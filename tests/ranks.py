# SPDX-License-Identifier: Apache-2.0
"""How a test's ranks begin and end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jobs import processes, settle_threads


def run_on_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` on each of several ranks, which are processes."""
    ranks = [
        processes().Process(target=_on_rank, args=(function, rank, *arguments), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
    assert [process.exitcode for process in ranks] == [0] * size


def _on_rank(function: Callable[..., None], rank: int, *arguments: Any) -> None:
    settle_threads()
    function(rank, *arguments)


def leave_together(size: int, folder: Path) -> NoReturn:
    """End this process when every rank has written its file `rank<number>`.

    Who leaves early breaks the others' connections; and torch 2.13 aborts now and then while it
    tears down a gloo group that FSDP has used, with nothing but torch in the process.
    """
    end = time.monotonic() + 120
    while len(list(folder.glob("rank?"))) < size and time.monotonic() < end:
        time.sleep(0.05)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
