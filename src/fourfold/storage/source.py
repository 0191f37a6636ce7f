# SPDX-License-Identifier: Apache-2.0
"""A checkpoint seen as Hugging Face names and lazy tensors: the `Source` base class.

Everything above this module sees a model only through `Source`. Its members are in
`fourfold.sources`: folders of safetensors, Megatron checkpoints, models in memory, and quantized
checkpoints that are decoded while they are read.

A tensor is read by **slabs**: a range of its first dimension, which is one run of bytes. One expert
of a fused parameter is a slab, and so are some rows of a matrix, and the whole tensor.

A member must implement `slab`, `side_files`, `stamps`, `check_unchanged` and `close`. Everything
else has a default that suits a checkpoint on disk which every rank can read by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fourfold.distributed.ranks import Ranks, joining
from fourfold.storage.fetching import Fetching
from fourfold.storage.fingerprints import FileStamp
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.side_files import SideFiles

Bytes = npt.NDArray[np.uint8]
"""A contiguous, one-dimensional buffer."""

Slab = tuple[str, int, int]
"""A raw tensor's name, the first row of the slab, and the row after its last."""


@dataclass(frozen=True, slots=True)
class MXFP4Weight:
    """The codes and exponents of a weight that a source stores in MXFP4.

    Both functions take an expert, None for a weight that is one matrix [out, in], and a range of
    its outputs.
    """

    codes: Callable[[int | None, range], torch.Tensor]
    """Returns E2M1 codes U8 [outputs, in/2], the low half of a byte first."""
    exponents: Callable[[int | None, range], torch.Tensor]
    """Returns biased exponents U8 [outputs, in/32]."""


@dataclass(frozen=True, slots=True)
class FP8Weight:
    """The codes and scales of a matrix [out, in] that a source stores in FP8.

    Both functions take the first row and the row after the last; the first begins a block.
    """

    block: tuple[int, int]
    """The rows and columns that share a scale."""
    codes: Callable[[int, int], torch.Tensor]
    """Returns E4M3 codes U8 [rows, in]."""
    scales: Callable[[int, int], torch.Tensor]
    """Returns float32 multipliers [blocks of rows, blocks of columns]."""


_ALL_HERE = Fetching()


class Source(ABC):
    """A checkpoint: names, shapes, dtypes, lazy slabs, and the files beside the weights.

    Attributes:
        folder: The directory that holds config.json, the tokenizer and custom code.
        config: The content of config.json, as the model's architecture is built from it.
        tensors: Every tensor by its raw key, in the order in which the keys lie in their files.
        trust_remote_code: True if code that the checkpoint brings may run.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    trust_remote_code: bool = False

    # ------------------------------------------------------------------------------ reading

    @abstractmethod
    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        """Read rows `start:stop` of the first dimension of a tensor. Safe for many threads.

        Args:
            key: The tensor's raw key.
            start: The first row. A scalar has one row.
            stop: The row after the last.
            out: A buffer of exactly the slab's size in bytes. The rows are then written into it,
                and the returned tensor is a view of it. Without one the source may return a view
                of memory that it owns, which must not be changed.

        Returns:
            The rows, contiguous, in the dtype of `tensors[key]`.
        """

    def read(self, key: str) -> torch.Tensor:
        """Return the whole tensor; it must not be changed."""
        return self.slab(key, 0, self.tensors[key].rows)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        """Fill `out` with bytes of a tensor, from byte `start` on, whatever its dtype."""
        read_rounded(partial(self.slab, key), self.tensors[key].row_bytes, start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:  # noqa: B027  # a hook
        """Say that this slab will be read soon, so that the disk can read ahead."""

    @property
    def fetching(self) -> Fetching:
        """How weights get to this machine; by default all of them are there."""
        return _ALL_HERE

    def stored_keys(self, keys: Iterable[str]) -> Iterable[str]:
        """Return the tensors in files that these tensors are made of, by their raw keys."""
        return keys

    @property
    def decoded(self) -> Mapping[str, str]:
        """The form that a tensor is decoded from, by raw key; empty unless some are quantized."""
        return {}

    def mxfp4(self, key: str) -> MXFP4Weight | None:
        """Return the codes and exponents of a tensor that is decoded from MXFP4; else None."""
        return None

    def fp8(self, key: str) -> FP8Weight | None:
        """Return the codes and scales of a matrix that is decoded from FP8; else None."""
        return None

    # ------------------------------------------------------- files, and where they come from

    @abstractmethod
    def side_files(self) -> SideFiles:
        """Return the files beside the weights; paths are relative to `folder`."""

    @abstractmethod
    def stamps(self) -> Mapping[str, FileStamp] | None:
        """Return the state of every file when the source was opened, by relative name, sorted.

        These are config.json, the index, the shards, and the files to copy. None if the weights do
        not lie in files: a run cannot be resumed then.
        """

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if one of these files changed or disappeared since then."""

    @abstractmethod
    def close(self) -> None:
        """Close every open file, and remove what was created for this source alone."""

    @property
    def place(self) -> Path:
        """The folder that names the source in reports: the one that a user gave or knows."""
        return self.folder

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        """The folders that are read; no output may lie in any of them."""
        return (self.folder,)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user on the origin of names, weights and configuration."""
        return ()

    @property
    def tokenizer_hint(self) -> str | None:
        """Why there cannot be a tokenizer in `folder`, and how to give one; None if there can."""
        return None

    def check_placed(  # noqa: B027  # a hook
        self, unplaced: Sequence[str], architecture: str
    ) -> None:
        """Judge the tensors, MTP layers aside, that `architecture` has no parameter for.

        A checkpoint as it was published may hold such tensors, and they are copied. A source that
        makes up the names itself raises `ModelError`.
        """

    def rename(self, names: Mapping[str, str]) -> None:  # noqa: B027  # a hook
        """Give tensors other raw keys, if they lie in files under the names in `names`."""

    # ------------------------------------------------------------------------ several ranks

    @classmethod
    def job_ranks(cls) -> AbstractContextManager[Ranks]:
        """Join the ranks that share a job on such a source: by default those of the launcher."""
        return joining()

    @property
    def ranks_per_layer(self) -> int | None:
        """The most ranks that hold a part of one layer; None if every rank can read all of it.

        A layer is written as that many shards, so that each rank can write what it holds.
        """
        return None

    def rank_affinity(self, slabs: Iterable[Slab]) -> Sequence[int] | None:
        """Return how many bytes of some slabs each rank holds; None if all read the same files."""
        return None

    # --------------------------------------------------------- a transformers model in memory

    @property
    def model(self) -> Any:
        """The transformers model that holds the weights, which calibration calls; None for files.

        Such a source runs its own job: its layers are brought into memory one after the other.
        """
        return None

    @property
    def module_tree(self) -> Any:
        """The `ModuleTree` of `model`."""
        return None

    @property
    def is_sharded(self) -> bool:
        """True if parameters of `model` lie on several ranks: `hold` must come before `slab`."""
        return False

    @property
    def rank(self) -> int:
        """This process's number among the ranks that share `model`; rank 0 writes."""
        return 0

    def hold(self, keys: Iterable[str], *, keep: bool = True) -> None:  # noqa: B027  # a hook
        """Bring what these tensors are made of into memory, until `release`.

        If `model` is sharded, all ranks must call this with the same keys in the same order, one
        layer at a time.

        Args:
            keys: Raw keys.
            keep: False on ranks that take part in the exchange but will not read.
        """

    def release(self) -> None:  # noqa: B027  # a hook
        """Give back the memory of what was held."""

    def agreeing(self) -> AbstractContextManager[None]:
        """Within this context, an error on one rank that shares `model` is raised on all ranks."""
        return nullcontext()

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank that shares `model` gave, by rank."""
        return [value]


class SourceView(Source):
    """Another source on disk, presented otherwise; it is closed with this one.

    A member overrides what it changes. Everything else is the other source's.
    """

    def __init__(self, source: Source) -> None:
        """Present `source`."""
        self.source = source
        self.folder, self.config, self.tensors = source.folder, source.config, source.tensors
        self.trust_remote_code = source.trust_remote_code

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        return self.source.slab(key, start, stop, out)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        self.source.read_bytes(key, start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        self.source.will_need(key, start, stop)

    @property
    def fetching(self) -> Fetching:
        return self.source.fetching

    def stored_keys(self, keys: Iterable[str]) -> Iterable[str]:
        return self.source.stored_keys(keys)

    @property
    def decoded(self) -> Mapping[str, str]:
        return self.source.decoded

    def mxfp4(self, key: str) -> MXFP4Weight | None:
        return self.source.mxfp4(key)

    def fp8(self, key: str) -> FP8Weight | None:
        return self.source.fp8(key)

    def side_files(self) -> SideFiles:
        return self.source.side_files()

    def stamps(self) -> Mapping[str, FileStamp] | None:
        return self.source.stamps()

    def check_unchanged(self) -> None:
        self.source.check_unchanged()

    def close(self) -> None:
        self.source.close()

    @property
    def place(self) -> Path:
        return self.source.place

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        return self.source.origin_folders

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source.notes

    @property
    def tokenizer_hint(self) -> str | None:
        return self.source.tokenizer_hint

    def check_placed(self, unplaced: Sequence[str], architecture: str) -> None:
        self.source.check_placed(unplaced, architecture)

    def rename(self, names: Mapping[str, str]) -> None:
        self.source.rename(names)
        self.tensors = renamed(self.tensors, names)

    def rank_affinity(self, slabs: Iterable[Slab]) -> Sequence[int] | None:
        return self.source.rank_affinity(slabs)


def renamed(tensors: Mapping[str, TensorInfo], names: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Return tensors under the raw keys that `names` gives for theirs, in the same order."""
    infos = (replace(info, key=names.get(key, key)) for key, info in tensors.items())
    return {info.key: info for info in infos}


def read_rounded(
    read: Callable[[int, int, Bytes], object], unit: int, start: int, out: Bytes
) -> None:
    """Fill `out` from byte `start` on, where only whole units of `unit` bytes can be read.

    `read` is called with the first unit, the unit after the last, and a buffer for them: `out`
    itself if that begins and ends with a unit.
    """
    if not len(out):
        return
    first, last = start // unit, -(-(start + len(out)) // unit)
    if len(out) == (last - first) * unit:
        read(first, last, out)
        return
    buffer = np.empty((last - first) * unit, dtype=np.uint8)
    read(first, last, buffer)
    out[:] = buffer[start - first * unit :][: len(out)]
