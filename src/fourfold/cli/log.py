# SPDX-License-Identifier: Apache-2.0
"""`--log-file`: a copy of what a command says, with times."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from fourfold.errors import UsageError


class Log:
    """A file that lines are appended to; until it is opened, nothing is written."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    @property
    def is_open(self) -> bool:
        """True if the command has a log file."""
        return self._file is not None

    def open(self, path: Path) -> None:
        """Append to the file from now on. Raises `UsageError`."""
        try:
            self._file = path.expanduser().open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UsageError(
                f"--log-file {path}: cannot be written: {error.strerror}. Give another file."
            ) from error

    def write(self, text: str) -> None:
        """Append each line of a text, with the time. A full disk must not end the run."""
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        with suppress(OSError):
            self._file.writelines(f"{now} {line}\n" for line in text.splitlines())
            self._file.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


log = Log()
"""Of the process."""
