"""Temporary folders that go with the process, also where a signal ends it at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_present: set[Path] = set()


class TemporaryFolder:
    """A folder of its own under TMPDIR, until `remove`."""

    def __init__(self) -> None:
        """Raises `OSError` where none can be made."""
        self.path = Path(tempfile.mkdtemp(prefix="fourfold-"))
        _present.add(self.path)

    def remove(self) -> None:
        """Remove it with all that lies in it; nothing where it is gone."""
        shutil.rmtree(self.path, ignore_errors=True)
        _present.discard(self.path)


def remove_all() -> None:
    """Remove what is there of them: for who ends the process without ending its functions."""
    for path in list(_present):
        shutil.rmtree(path, ignore_errors=True)
