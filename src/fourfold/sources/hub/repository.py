# SPDX-License-Identifier: Apache-2.0
"""A model on the hub at one commit: its files, and the errors that the hub answers with.

Everything goes through `huggingface_hub`, which knows endpoint, token, cache and proxies from the
environment. It is imported when it is needed.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from fourfold.errors import SourceError
from fourfold.storage.json_files import plain_name
from fourfold.storage.names import CONFIG, WEIGHT_SUFFIXES
from fourfold.storage.safetensors_header import MAX_HEADER_BYTES
from fourfold.storage.side_files import may_be_copied

ORIGINAL = "original"
"""The folder of a repository that holds the weights in the model maker's own format."""

CONNECTIONS = 16
"""Small requests that are under way at a time."""

HEADER_BYTES = 100_000
"""Bytes that are asked for to read a header, which most headers fit into."""

ATTEMPTS = 3
PAUSE = 0.5
"""Seconds before a small request is made again, and twice as long before the next."""

Answer = TypeVar("Answer")

BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)


class UnreachableError(SourceError):
    """The hub does not answer, or must not be asked (HF_HUB_OFFLINE)."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    size: int
    digest: str
    """Its SHA-256, if it is a large one (LFS, Xet); otherwise git's digest of its contents."""
    is_large: bool


@dataclass(frozen=True)
class Repository:
    """A model's files at one commit."""

    name: str
    commit: str
    files: Mapping[str, HubFile]
    """By the path in the repository."""
    requested: str | None = None
    """The revision that was requested, if any."""

    @classmethod
    def find(cls, name: str, revision: str | None) -> Repository:
        """Ask the hub for a model, and for the commit that `revision` is now.

        Raises:
            SourceError: There is no such model or revision, or it may not be read.
            UnreachableError: The hub does not answer.
        """
        from huggingface_hub import HfApi

        info = asked(
            lambda: HfApi().model_info(name, revision=revision, files_metadata=True),
            name,
            revision,
        )
        files = {
            x.rfilename: HubFile(
                x.size or 0, x.lfs.sha256 if x.lfs else x.blob_id or "", x.lfs is not None
            )
            for x in info.siblings or ()
        }
        return cls(name, str(info.sha), files, revision)

    @property
    def revision(self) -> str:
        """The name that stands for exactly these files."""
        return f"{self.name}@{self.commit}"

    def snapshot(self) -> Path:
        """Fetch everything beside the weights into the hub's cache; return the folder there."""
        if CONFIG not in self.files:
            kinds = {PurePosixPath(name).suffix for name in self.files}
            gguf = " It holds GGUF files, which are quantized already." if ".gguf" in kinds else ""
            raise SourceError(
                f"{self.name}: has no {CONFIG} on the hub.{gguf} Give the name of a checkpoint "
                "for transformers."
            )
        names = list(self._beside())
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            paths = list(pool.map(self._beside_here, names))
        self._note_revision()
        return paths[names.index(CONFIG)].parent

    def _note_revision(self) -> None:
        """Let the cache know the commit of the revision, for whoever asks it without a network."""
        from huggingface_hub import hf_hub_download

        with suppress(SourceError):  # nothing else depends on it
            self._asked(CONFIG, lambda: hf_hub_download(self.name, CONFIG, revision=self.requested))

    def download(self, file: str, **options: Any) -> Path:
        """Return a file in the hub's cache, to which it is fetched if it is not there.

        Errors are the client's own.
        """
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.name, file, revision=self.commit, **options))

    def beginning(self, file: str) -> bytes:
        """Return the beginning of a safetensors file, up to the end of its header at least."""
        first = self.read(file, 0, min(HEADER_BYTES, self.files[file].size))
        end = 8 + int.from_bytes(first[:8], "little")
        is_enough = end <= len(first) or end > min(self.files[file].size, MAX_HEADER_BYTES)
        return first if is_enough else first + self.read(file, len(first), end)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Return bytes of a file by a request for them alone."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.name, file, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}

        def get() -> bytes:
            response = get_session().get(url, headers=headers)
            hf_raise_for_status(response)
            content: bytes = response.content
            return content

        return self._asked(file, get)

    def _beside_here(self, file: str) -> Path:
        from huggingface_hub.utils import silent_tqdm

        return self._asked(file, lambda: self.download(file, tqdm_class=silent_tqdm))

    def _asked(self, file: str, ask: Callable[[], Answer]) -> Answer:
        return asked(ask, self.name, self.commit, file)

    def _beside(self) -> Iterable[str]:
        """The files that a checkpoint's folder has beside its weights, but for those of others."""
        weights = [PurePosixPath(name) for name in self.files if _is_weights(name)]
        others = {path.parent for path in weights} - {PurePosixPath()} | {PurePosixPath(ORIGINAL)}
        for name, file in self.files.items():
            path = PurePosixPath(name)
            is_hidden = any(part.startswith(".") for part in path.parts)
            is_ours = not is_hidden and others.isdisjoint(path.parents)
            if is_ours and may_be_copied(Path(name), file.size):
                yield name


def _is_weights(name: str) -> bool:
    return PurePosixPath(name).suffix in WEIGHT_SUFFIXES


def asked(
    ask: Callable[[], Answer], name: str, revision: str | None, file: str | None = None
) -> Answer:
    """Return the answer to a small request. Raises `SourceError` if there is none but errors."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except Exception as error:  # the hub client raises errors of many libraries
            is_offline = isinstance(error, OfflineModeIsEnabled)
            if attempt == ATTEMPTS - 1 or is_offline or not is_transient(error):
                raise explained(error, name, revision, file) from error
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


def explained(
    error: Exception, name: str, revision: str | None, file: str | None = None
) -> SourceError:
    """Return the error for what the hub, or the client, has answered."""
    from huggingface_hub import constants, errors

    if isinstance(error, SourceError):
        return error
    place = name if file is None else f"{name}: {plain_name(file)}"
    cause = (" ".join(str(error).split()) or type(error).__name__)[:200]
    match error:
        case errors.GatedRepoError():
            what = (
                f"{place}: the owner has to grant access to this model. Ask for it at "
                f"{constants.ENDPOINT}/{name}, then log in (`hf auth login`, or HF_TOKEN)."
            )
        case errors.RepositoryNotFoundError():
            what = (
                f"{name}: no such folder, and no such model on the hub, or a private one. Check "
                "the name; for a private one, log in (`hf auth login`, or HF_TOKEN)."
            )
        case errors.RevisionNotFoundError():
            what = (
                f"{name}: has no revision {revision} on the hub. Give another: ORG/NAME@REVISION."
            )
        case errors.RemoteEntryNotFoundError() if file is not None:
            what = (
                f"{place}: is missing on the hub, at {revision}. Give another revision "
                "(ORG/NAME@REVISION), or tell the model's owner."
            )
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            what = f"{place}: the hub refuses it: {cause}. Log in (`hf auth login`, or HF_TOKEN)."
        case errors.HFValidationError():
            what = f"{plain_name(name)}: no such folder, and no name on the hub: {cause}"
        case _:
            kind = UnreachableError if is_transient(error) else SourceError
            return kind(f"{place}: the hub does not give it: {cause}")
    return SourceError(what)


def is_transient(error: BaseException) -> bool:
    """True if the same request may succeed later."""
    from huggingface_hub import errors

    match error:
        case UnreachableError() | ConnectionError() | TimeoutError():
            return True
        case SourceError() | errors.RemoteEntryNotFoundError() | errors.HFValidationError():
            return False
        case errors.HfHubHTTPError():
            status: int = error.response.status_code
            return status in (408, 429) or status >= 500
        case OSError():
            return error.errno not in BROKEN_DISK
    return not isinstance(error, ValueError | TypeError | MemoryError)
