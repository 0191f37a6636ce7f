# SPDX-License-Identifier: Apache-2.0
"""A model on the hub as a source: planned without its weights, which come when they are read.

Config, index and the other small files are fetched into the hub's cache, and of the shards only
their headers. The commit is that of the moment when the source is opened. Shards come whole:

    kept       into the hub's cache, where they stay            all of them have room beside OUT
    streamed   into OUT/.fourfold/source/COMMIT, and are         otherwise, or as the user wants
               deleted once their tensors are done

A shard that the cache holds already is read from there, and never deleted.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

from fourfold.errors import ResourceError, SourceError
from fourfold.sources.hub.repository import CONNECTIONS, Repository, UnreachableError
from fourfold.sources.hub.transfer import Transfers, flat
from fourfold.sources.hub.window import Window
from fourfold.sources.safetensors import (
    SafetensorsFolder,
    join,
    read_index,
    single_file,
    some,
)
from fourfold.storage.disk import check_disk, free_bytes
from fourfold.storage.fetching import Fetching
from fourfold.storage.fingerprints import FileStamp, Stamps
from fourfold.storage.names import INDEX, SINGLE
from fourfold.storage.run_state import RUN, STATE
from fourfold.storage.safetensors_header import TensorInfo, header_in, read_header
from fourfold.storage.source_files import SourceFiles
from fourfold.storage.units import size

WINDOW = 3
"""Shards of a streamed source that lie on the disk at a time."""

PATIENCE = 2.0
"""Seconds to wait, when a run ends, for a transfer to notice."""

FETCHED = "source"
"""The folder in a run's state that holds the shards of a streamed source."""


def open_hub(name: str, *, hint: str = "") -> SafetensorsFolder:
    """Open ORG/NAME or ORG/NAME@REVISION; if the hub does not answer, what its cache has of it.

    Args:
        name: The model's name on the hub.
        hint: The end of the message if there is no such model.

    Raises:
        SourceError: There is no such model or revision, it may not be read, or is none to quantize.
    """
    model, _, revision = name.partition("@")
    try:
        repository = Repository.find(model, revision or None)
    except UnreachableError as error:
        cached = _cached_snapshot(model, revision or None)
        if cached is None:
            why = str(error).removeprefix(f"{model}: ")
            raise SourceError(f"{name}: no such folder, and {why}.{hint}") from error
        return SafetensorsFolder(cached)
    except SourceError as error:
        raise type(error)(f"{error}{hint}") from error
    return HubSource(repository)


def _cached_snapshot(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


class HubSource(SafetensorsFolder):
    """A model on the hub at one commit. Safe for many threads."""

    def __init__(self, repository: Repository) -> None:
        """Fetch everything but the weights, and the headers of those.

        Raises:
            SourceError: A file is missing on the hub, cannot be read, or contradicts another.
        """
        self.repository = repository
        super().__init__(repository.snapshot())

    @property
    def fetching(self) -> HubFetching:
        return self._fetching

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, f"read from the hub at commit {self.repository.commit}")

    def stamps(self) -> Mapping[str, FileStamp]:
        names = [*self._stamps.relative_to(self.folder), *self._shards]
        files = ((name, self.repository.files[name]) for name in sorted(set(names)))
        return {name: FileStamp(file.size, 0, file.digest) for name, file in files}

    def rename(self, names: Mapping[str, str]) -> None:
        super().rename(names)
        self._fetching.rename(names)

    def close(self) -> None:
        self._fetching.close()
        super().close()

    def _read_tensors(self) -> dict[str, TensorInfo]:
        weight_map = None
        names = [SINGLE]
        if INDEX in self.repository.files:
            weight_map = read_index(self.folder, self._stamps)
            names = sorted(set(weight_map.values()))
        elif SINGLE not in self.repository.files:
            top = [self.folder / name for name in self.repository.files if "/" not in name]
            names = [single_file(self.folder, top).name]
        for name in names:
            if name not in self.repository.files:
                raise SourceError(
                    f"{self.repository.name}: {INDEX} names {name}, which is missing on the hub at "
                    f"{self.repository.commit}. Give another revision (ORG/NAME@REVISION), or tell "
                    "the model's owner."
                )
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            headers = dict(zip(names, pool.map(self._header, names), strict=True))
        self._shards = headers
        if weight_map is None:
            return some(self.folder, headers[names[0]])
        return join(self.folder, weight_map, headers.items())

    def _open_files(self) -> SourceFiles:
        self._fetching = HubFetching(self.repository, self.folder, self._shards)
        return self._fetching.files

    def _header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a shard, without fetching it."""
        path = self.folder / name
        if path.exists():
            return read_header(path)
        beginning = BytesIO(self.repository.beginning(name))
        return header_in(path, beginning, self.repository.files[name].size)[1]


class HubFetching(Fetching):
    """Fetches the shards of a `HubSource` to where the run wants them."""

    def __init__(
        self, repository: Repository, folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]]
    ) -> None:
        """Describe the shards of a repository whose snapshot in the hub's cache is `folder`."""
        self.repository, self.folder, self.shards = repository, folder, shards
        self.revision = repository.revision
        self.transfers = Transfers(repository)
        self.window = Window(self._fetch, self._drop)
        self.window.kept = {name for name in shards if (folder / name).exists()}
        self.is_here = self.window.kept >= shards.keys()
        self.files = HubFiles(self)
        self.shard_of = {key: name for name, infos in shards.items() for key in infos}
        self._scratch: Path | None = None
        self._peeking = threading.local()

    @property
    def missing(self) -> int:
        """Bytes of the shards that the hub's cache does not hold."""
        missing = self.shards.keys() - self.window.kept
        return sum(self.repository.files[name].size for name in missing)

    def settle(self, out: Path, needed: int, keep: bool | None, *, ranks: int = 1) -> Sequence[str]:
        from huggingface_hub.constants import HF_HUB_CACHE

        self.window.clear()
        self.is_transient, self.window.most, self.scratch_bytes = False, None, 0
        self._scratch = None
        count, cached = len(self.shards), len(self.window.kept)
        if not self.missing:
            return ("all of its shards lie in the hub's cache already, and stay there",)
        cache = Path(HF_HUB_CACHE)
        if keep is None:
            keep = self._fit(cache, out, needed)
        there = f", {cached} of them there already" if cached else ""
        if keep:
            if _device(cache) != _device(out):
                needed = 0
            check_disk(cache, self.missing + needed)
            return (f"its {count} shards are kept in the hub's cache{there}",)
        self.is_transient, self.window.most = True, WINDOW
        self._scratch = out / STATE / FETCHED / self.repository.commit
        self._check_scratch(out, needed, ranks)
        return (
            f"its {count} shards are deleted once they are quantized, up to {WINDOW} at a time lie "
            "in OUT, and what is written is compared with them while they are there"
            + (f"; {cached} lie in the hub's cache, and stay there" if cached else ""),
        )

    def expect(self, keys: Iterable[str]) -> None:
        reads = [(key, self.shard_of[key]) for key in keys]
        if self._scratch is not None:
            self.transfers.clean(self._scratch, {shard for _, shard in reads})
        self.window.expect(reads)

    def expect_all(self) -> None:
        """Fetch ahead in the order of the files, if nobody has said what will be read."""
        if not self.window.is_expecting and not self.is_transient:
            self.window.expect((shard, shard) for shard in self.shards)

    def done_with(self, keys: Iterable[str]) -> None:
        self.window.done_with(keys)

    def rename(self, names: Mapping[str, str]) -> None:
        """Follow `Source.rename`."""
        self.shard_of = {names.get(key, key): name for key, name in self.shard_of.items()}

    def interrupt(self) -> None:
        self.transfers.stopped.set()
        self.window.close()
        self.window.join(PATIENCE)

    @contextmanager
    def peeking(self) -> Iterator[None]:
        self._peeking.is_on = True
        try:
            yield
        finally:
            self._peeking.is_on = False

    @property
    def is_peeking(self) -> bool:
        """True in a thread that is within `peeking`."""
        return getattr(self._peeking, "is_on", False)

    def close(self) -> None:
        """Stop all transfers. What lies in OUT stays for a run that is not finished."""
        self.interrupt()
        self.transfers.close()
        if self._scratch is None:
            return
        state = self._scratch.parent.parent
        if not (state / RUN).exists():
            shutil.rmtree(self._scratch.parent, ignore_errors=True)
            with suppress(OSError):  # there is none, or another process uses it
                state.rmdir()

    def _fit(self, cache: Path, out: Path, needed: int) -> bool:
        """True if the hub's cache has room for all shards, and OUT for what is written."""
        if _device(cache) == _device(out):
            return self.missing + needed <= free_bytes(out)
        return self.missing <= free_bytes(cache)

    def _check_scratch(self, out: Path, needed: int, ranks: int) -> None:
        missing = self.shards.keys() - self.window.kept
        sizes = sorted((self.repository.files[name].size for name in missing), reverse=True)
        here = [self._scratch / flat(name) for name in missing] if self._scratch else []
        present = sum(path.stat().st_size for path in here if path.exists())
        shards = self.scratch_bytes = sum(sizes[: WINDOW * ranks])
        if needed + max(0, shards - present) > (free := free_bytes(out)):
            raise ResourceError(
                f"{out}: {size(needed + shards)} are needed, {size(shards)} of them for shards of "
                f"the source; {size(free)} are free on that disk. Free some room, or write to "
                "another one."
            )

    def _fetch(self, name: str) -> Path:
        """Bring a shard to this machine, and check that it is the one that was planned."""
        if name in self.window.kept:
            path = self.folder / name
        elif self._scratch is not None:
            path = self.transfers.to_folder(name, self._scratch)
        else:
            path = self.transfers.to_cache(name)
            self.window.kept.add(name)
        try:
            self._check_planned(name, path)
        except SourceError:
            if name not in self.window.kept:  # an earlier run's: let the next one fetch it again
                self._drop(name, path)
            raise
        return path

    def _check_planned(self, name: str, path: Path) -> None:
        header = read_header(path, self.files.stamps)
        planned = {key: (x.dtype, x.shape, x.start) for key, x in self.shards[name].items()}
        if {key: (x.dtype, x.shape, x.start) for key, x in header.items()} != planned:
            raise SourceError(
                f"{path}: holds other tensors than the hub has. Remove it, and start again."
            )

    def _drop(self, name: str, path: Path) -> None:
        self.files.forget(path)
        self.transfers.drop(path)


class HubFiles(SourceFiles):
    """The shards of a `HubSource`, by their paths in the hub's cache, wherever they lie."""

    def __init__(self, fetching: HubFetching) -> None:
        self.stamps = Stamps()
        super().__init__(self.stamps)
        self._fetching = fetching

    def read(self, file: Path, position: int, out: memoryview, name: str) -> None:
        """Fill `out` as `SourceFiles.read` does, once the shard is here."""
        fetching, shard = self._fetching, self._name(file)
        if fetching.is_peeking and shard not in fetching.window.kept:
            stop = position + len(out)
            out[:] = fetching.repository.read(shard, position, stop)
            return
        fetching.expect_all()
        with fetching.window.reading(shard) as path:
            super().read(path, position, out, name)

    def will_need(self, file: Path, start: int, stop: int) -> None:
        shard, window = self._name(file), self._fetching.window
        path = window.path_of(shard)
        if path is not None and shard in window.kept:  # another may be deleted meanwhile
            super().will_need(path, start, stop)

    def _name(self, file: Path) -> str:
        return file.relative_to(self._fetching.folder).as_posix()


def _device(path: Path) -> int:
    """The file system in which a folder lies or will lie."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return os.stat(path).st_dev
