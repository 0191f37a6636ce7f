# SPDX-License-Identifier: Apache-2.0
"""The command: `python -m fourfold`, and the script that is installed.

A signal ends it with one line from its first moment on, also while it is imported.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command."""
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    from fourfold.cli.app import main as run  # takes a while

    for number, handler in previous.items():
        signal.signal(number, handler)
    run()


def _stop(number: int, _: FrameType | None) -> None:
    os.write(2, f"error: stopped by {signal.Signals(number).name}; nothing was written.\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
