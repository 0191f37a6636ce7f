# SPDX-License-Identifier: Apache-2.0
"""The state of an unfinished run, which lies in OUT until the checkpoint is whole.

    OUT/.fourfold/run.json                identity of the run, and the files that it writes
    OUT/.fourfold/shards/NAME.json        digest and figures of a finished shard
    OUT/.fourfold/statistics/…            statistics of observed layers
    OUT/.fourfold/activations/…           outputs of the last observed layer
    OUT/.fourfold/folds                   the factors that the source is folded with
    OUT/.fourfold/rank-00000.lock         locked by rank 0 while it is alive; every rank has one
    OUT/.fourfold/rank-00000.json         the process of rank 0

A record is written after what it describes was flushed to the disk, under a temporary name, and
renamed: there are no half records. Without `run.json` there is no run, and without any record of a
shard there is nothing to resume.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fourfold.errors import OutputError
from fourfold.storage.atomic import replacing, sync

STATE = ".fourfold"
"""The state's folder inside OUT."""

RUN = "run.json"

OTHER_FILES = "rest"
"""A folder inside it with the config and side files, if the shards lie in several OUTs."""


class RunState:
    """The state of an unfinished run, as one rank sees it."""

    def __init__(self, out: Path, rank: int = 0) -> None:
        self.out, self.folder, self.rank = out, out / STATE, rank
        self.shards = self.folder / "shards"
        self.statistics = self.folder / "statistics"
        self.activations = self.folder / "activations"
        self.folds = self.folder / "folds"
        self._lock = FileLock(self.folder / f"rank-{rank:05d}.lock", thread_local=False)
        self._token: str | None = None

    @property
    def run(self) -> dict[str, Any] | None:
        """The contents of run.json; None if there is no unfinished run, or no readable one."""
        return read_record(self.folder / RUN)

    @property
    def identity(self) -> dict[str, Any] | None:
        """The identity of the unfinished run; None if there is none, or if it cannot be resumed."""
        identity = (self.run or {}).get("identity")
        return identity if isinstance(identity, dict) else None

    @property
    def has_finished_shards(self) -> bool:
        """True if there is anything to resume from."""
        return bool(self._records())

    def check_free(self) -> None:
        """Raise `OutputError` if a living process writes here."""
        for path in sorted(self.folder.glob("rank-*.lock")):
            try:
                with FileLock(path, blocking=False):
                    pass
            except Timeout:
                raise OutputError(self._held_by(path)) from None
            except OSError:  # on a medium that can only be read
                pass

    def lock(self, token: str) -> None:
        """Make the folder and take this rank's lock, until `release`.

        Other ranks see by `token`, a word of this run's own, that they share the folder.
        """
        path = Path(self._lock.lock_file)
        while self._token is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
                holder = {"token": token, "pid": os.getpid(), "host": socket.gethostname()}
                path.with_suffix(".json").write_text(json.dumps(holder))
                self._token = token
            except Timeout:
                raise OutputError(self._held_by(path)) from None
            except FileNotFoundError:  # a run that has just ended removed the folder
                self._lock.release()

    @property
    def is_mine(self) -> bool:
        """True if this process has locked the folder, and it was not removed or replaced since."""
        return self._token is not None and self.token_of(self.rank) == self._token

    def token_of(self, rank: int) -> str | None:
        """The token that a rank gave when it took its lock."""
        return (read_record(self.folder / f"rank-{rank:05d}.json") or {}).get("token")

    def begin(self, run: Mapping[str, Any]) -> None:
        """Record the identity of the run, and remove the records of an earlier one."""
        for folder in (self.shards, self.statistics, self.activations, self.folder / OTHER_FILES):
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)
        self.folds.unlink(missing_ok=True)
        self.shards.mkdir()
        self.statistics.mkdir()
        self._write(self.folder / RUN, run)
        sync(self.folder)

    def save_folds(self, data: bytes) -> None:
        """Store the factors that the source is folded with."""
        with replacing(self.folds) as handle:
            handle.write(data)

    def add_shard(self, name: str, record: Mapping[str, Any]) -> None:
        """Record that the shard `name` is finished."""
        self._write(self.shards / f"{name}.json", record)

    def finished_shards(self) -> dict[str, dict[str, Any]]:
        """Return the records of finished shards, by name. Unreadable ones count as missing."""
        records = {path.stem: read_record(path) for path in self._records()}
        return {name: record for name, record in records.items() if record is not None}

    def _records(self) -> list[Path]:
        try:
            names = sorted(os.listdir(self.shards))
        except FileNotFoundError:  # no run, or another rank is removing it
            return []
        return [self.shards / name for name in names if name.endswith(".json")]

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        with replacing(path) as handle:
            handle.write(json.dumps(record).encode())

    def release(self) -> None:
        """Give the lock back."""
        self._token = None
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder, `run.json` first, and give the lock back.

        The lock file goes last: from then on another process may take the folder, which then is
        not empty, and that process's to remove. Ranks that share the folder may all remove it at
        once.
        """
        (self.folder / RUN).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another rank has removed all of it
            for path in list(self.folder.iterdir()):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path != Path(self._lock.lock_file):
                    path.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self.release()
        with suppress(OSError):
            self.folder.rmdir()

    def _held_by(self, lock: Path) -> str:
        holder = read_record(lock.with_suffix(".json"))
        who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "a process"
        return f"{self.out}: {who} is writing it. Wait for it, stop it, or choose another folder."


def read_record(file: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is none that can be read."""
    try:
        value = json.loads(file.read_bytes()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Yield what changed between two records, as `recipe.weights.scale: mse → max`."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{path}: {_short(before)} → {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def names_in(record: Any) -> list[str]:
    """Return the file names that a record lists under `files`, without those that leave OUT."""
    files = record.get("files") if isinstance(record, Mapping) else None
    return [name for name in files if is_inside(name)] if isinstance(files, list) else []


def is_inside(name: object) -> bool:
    """True if a file name from a record stays in the folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts
