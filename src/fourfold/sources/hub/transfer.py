# SPDX-License-Identifier: Apache-2.0
"""Fetch shards from the hub: into its cache, or into a folder of this run that processes share.

    FOLDER/shard.safetensors          a shard that has arrived whole, with the digest it should have
    FOLDER/shard.safetensors.part     one that is on its way; a later run continues it
    FOLDER/shard.safetensors.lock     locked, shared, by every process that needs the shard

A transfer that breaks is continued where it broke, after a pause that grows. It fails once it
breaks `ATTEMPTS` times in a row without bringing a byte.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.sources.hub.repository import BROKEN_DISK, Repository, explained, is_transient
from fourfold.storage.disk import writing

ATTEMPTS = 5
"""Attempts in a row that bring nothing, after which a transfer fails."""

PAUSE = 0.5
"""Seconds before the second attempt; each further pause is twice as long."""

POLL = 0.1
"""Seconds between attempts to lock a shard that another process fetches."""


class StoppedError(SourceError):
    """A transfer was stopped because the run has ended."""


class Transfers:
    """Fetches shards of a repository. Safe for many threads."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.stopped = threading.Event()
        self._locks: dict[Path, int] = {}

    def to_cache(self, file: str) -> Path:
        """Return a shard in the hub's cache, to which it is fetched if it is not there."""
        return self._retried(file, lambda: self.repository.download(file, tqdm_class=self._bar()))

    def to_folder(self, file: str, folder: Path) -> Path:
        """Return a shard in `folder`; it stays there until this and every other process `drop` it.

        Raises:
            SourceError: It cannot be fetched, or arrives damaged again and again.
            StoppedError: `stopped` was set.
        """
        path = folder / flat(file)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = self._open_lock(path)
        try:
            self._fetch_locked(file, path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._locks[path] = descriptor
        return path

    def _fetch_locked(self, file: str, path: Path, descriptor: int) -> None:
        """Fetch a shard unless it is there, and lock it with others that need it."""
        while True:
            if _lock(descriptor, fcntl.LOCK_EX):  # nobody else has it, or fetches it
                if not path.exists():
                    shutil.rmtree(_xet_folder(path), ignore_errors=True)
                    self._retried(file, lambda: self._transfer(file, path), partial_of(path))
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if path.exists():  # it may have been dropped between the two locks
                    return
            elif _lock(descriptor, fcntl.LOCK_SH):
                if path.exists():
                    return
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            if self.stopped.wait(POLL):
                raise StoppedError("the run has ended")

    def drop(self, path: Path) -> None:
        """Delete a shard that `to_folder` returned, unless another process needs it."""
        descriptor = self._locks.pop(path)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        self._delete(path, descriptor)
        os.close(descriptor)

    def _delete(self, path: Path, lock: int) -> None:
        """Delete a shard unless a process has locked it; the last one to drop it will delete it."""
        if _lock(lock, fcntl.LOCK_EX):
            path.unlink(missing_ok=True)

    def clean(self, folder: Path, needed: Collection[str]) -> None:
        """Remove what earlier runs left in `folder` and nobody needs, and folders beside it."""
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        names = {flat(file) for file in needed}
        for path in folder.glob("*"):
            shard = path.with_name(path.name.removesuffix(".part"))
            if path.suffix != ".lock" and path.is_file() and shard.name not in names:
                descriptor = self._open_lock(shard)
                self._delete(path, descriptor)
                os.close(descriptor)

    def close(self) -> None:
        """Stop everything, and release all locks; shards that have arrived stay."""
        self.stopped.set()
        for descriptor in self._locks.values():
            os.close(descriptor)
        self._locks.clear()

    def _open_lock(self, path: Path) -> int:
        return os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _retried(self, file: str, fetch: Callable[[], Path], partial: Path | None = None) -> Path:
        """Call `fetch` until it succeeds. An attempt that brings bytes begins the count anew."""
        failures = 0
        while True:
            before = _size_of(partial)
            try:
                return fetch()
            except Exception as error:
                if self.stopped.is_set():
                    raise StoppedError("the run has ended") from error
                if isinstance(error, OSError) and error.errno in BROKEN_DISK:
                    with writing(partial or Path(file)):
                        raise
                if not is_transient(error):
                    name, commit = self.repository.name, self.repository.commit
                    raise explained(error, name, commit, file) from error
                failures = 1 if _size_of(partial) > before else failures + 1
                if failures == ATTEMPTS:
                    cause = " ".join(str(error).split())[:200] or type(error).__name__
                    raise SourceError(
                        f"{self.repository.name}: {file}: cannot be fetched, after {ATTEMPTS} "
                        f"attempts in a row: {cause}. The same command resumes."
                    ) from error
                self.stopped.wait(PAUSE * 2 ** (failures - 1))

    def _transfer(self, file: str, path: Path) -> Path:
        """Fetch a shard, or what is missing of it, and give it its name if it is what it should."""
        partial, expected = partial_of(path), self.repository.files[file]
        if _size_of(partial) > expected.size:
            partial.unlink()
        if not self._by_xet(file, partial):
            self._by_http(file, partial, expected.size)
        with partial.open("rb") as handle:
            if expected.is_large and file_digest(handle, "sha256").hexdigest() != expected.digest:
                partial.unlink()
                raise ConnectionError("it arrives damaged: its SHA-256 is not the hub's")
            os.fsync(handle.fileno())
        return partial.replace(path)

    def _by_http(self, file: str, partial: Path, size: int) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository.name, file, revision=self.repository.commit)
        with partial.open("ab") as handle:
            http_get(
                url,
                handle,
                resume_size=handle.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                tqdm_class=self._bar(),
            )

    def _by_xet(self, file: str, partial: Path) -> bool:
        """Fetch a shard as huggingface_hub does, if the hub stores it with Xet."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.file_download import is_xet_available

        repository = self.repository
        url = hf_hub_url(repository.name, file, revision=repository.commit)
        if partial.exists() or not is_xet_available():
            return False
        if get_hf_file_metadata(url).xet_file_data is None:
            return False
        inner = _xet_folder(partial.with_suffix(""))
        path = hf_hub_download(
            repository.name,
            file,
            revision=repository.commit,
            local_dir=inner,
            tqdm_class=self._bar(),
        )
        Path(path).replace(partial)
        shutil.rmtree(inner, ignore_errors=True)
        return True

    def _bar(self) -> Any:
        """A progress bar that shows nothing, and ends the transfer once `stopped` is set."""
        from huggingface_hub.utils import tqdm

        stopped = self.stopped

        class Silent(tqdm):  # type: ignore[misc]  # Any
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                if stopped.is_set():
                    raise StoppedError("the run has ended")
                return None

        return Silent


def _lock(descriptor: int, kind: int) -> bool:
    """Lock a file, alone or with others; False if that is not possible now."""
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    return False


def flat(file: str) -> str:
    """The name of a shard in the run's folder, which has no folders inside."""
    return file.replace("/", "--")


def _xet_folder(path: Path) -> Path:
    """Where huggingface_hub fetches a shard with Xet; what a killed process left there is lost."""
    return path.with_name(f"{path.name}.xet")


def partial_of(path: Path) -> Path:
    """The name of a shard that is on its way."""
    return path.with_name(f"{path.name}.part")


def _size_of(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0
