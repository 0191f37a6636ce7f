"""A checkpoint seen as Hugging Face names and lazy tensors: the `Source` interface.

Everything above it knows no other view of a model. Its members are in `fourfold.sources`.

A tensor is read by **slabs**: a range of its first dimension, which is one run of bytes. One expert
of a fused parameter is a slab, and so are some rows of a matrix, and the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fourfold.storage.fingerprints import FileStamp
from fourfold.storage.safetensors_header import TensorInfo


class Source(Protocol):
    """A checkpoint: names, shapes, dtypes, lazy slabs, and the files beside the weights."""

    @property
    def folder(self) -> Path:
        """Where config, tokenizer and custom code lie."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The source's config.json, as it is."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its raw key, in the order of the keys' files."""

    def slab(
        self, key: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> torch.Tensor:
        """Rows `start:stop` of the first dimension of `key`, into `out` (uint8) where given."""

    def read_bytes(self, key: str, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` (uint8) with bytes of `key`, from byte `start` on, whatever its dtype."""

    def will_need(self, key: str, start: int, stop: int) -> None:
        """A hint that this slab will be read soon."""

    def side_files(self) -> tuple[list[Path], list[Path]]:
        """Files to copy, and those that are not: other weights, links that leave the folder, what
        is no file (a socket, a dangling link). Relative paths."""

    def stamps(self) -> Mapping[str, FileStamp] | None:
        """What the files looked like when the source was opened, by relative name, sorted:
        config.json, the index, shards, and the files to copy. None for what is no folder."""

    def check_unchanged(self) -> None:
        """Raise `SourceError` where one of these files changed or disappeared since then."""

    def close(self) -> None:
        """Give back every file that is open."""


def place_of(source: Source) -> Path:
    """The folder by which a source is known: its own, unless that is only a temporary one."""
    place: Path = getattr(source, "place", source.folder)
    return place
