"""How a test's ranks end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn


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
