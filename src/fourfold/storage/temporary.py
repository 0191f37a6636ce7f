# SPDX-License-Identifier: Apache-2.0
"""Temporary folders that are removed with the process, also if a signal ends it at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_present: set[Path] = set()


class TemporaryFolder:
    """A new folder under TMPDIR, or under `parent`, until `remove`."""

    def __init__(self, parent: Path | None = None) -> None:
        """Raises `OSError` if it cannot be made."""
        self.path = Path(tempfile.mkdtemp(prefix="fourfold-", dir=parent))
        _present.add(self.path)

    def remove(self) -> None:
        """Remove the folder and everything in it, if it is still there."""
        shutil.rmtree(self.path, ignore_errors=True)
        _present.discard(self.path)


def remove_all() -> None:
    """Remove all of them, before the process ends without unwinding its functions."""
    for path in list(_present):
        shutil.rmtree(path, ignore_errors=True)
