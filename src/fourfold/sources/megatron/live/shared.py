"""The parameters of a whole model that ranks have parts of: who has what, and reading any box.

Each rank says what it has; together that is what a checkpoint's metadata says, with ranks in the
place of files. Boxes prove that nothing is missing and nothing doubly there. Ranks that have the
same box are replicas of it (data and tensor parallelism): their bytes must be the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from fourfold.errors import SourceError
from fourfold.sources.megatron.boxes import Box, Boxes
from fourfold.sources.megatron.keys import Parameter
from fourfold.sources.megatron.live.exchange import Bytes, Exchange
from fourfold.sources.megatron.live.modules import Local
from fourfold.storage.safetensors_header import BITS

SLAB_BYTES = 1 << 26
"""Replicas are compared a slab at a time."""

INCOMPLETE = (
    "Does every rank call with its own part, and the model's process groups as they were built?"
)

_Said = tuple[str, str, tuple[int, ...], tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]
"""What a rank says of a parameter: name, dtype, shape of the whole, offsets and sizes of parts."""


@dataclass(frozen=True)
class RankPart:
    """A box of a parameter, and the ranks that have it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    owners: dict[int, int] = field(default_factory=dict)
    """Rank → the part's number there."""

    @property
    def place(self) -> str:
        return f"rank {min(self.owners)}"


class SharedTensors:
    """The parameters of the whole model, as a reader. Safe for many threads."""

    def __init__(self, exchange: Exchange, locals_: Sequence[Local]) -> None:
        """All ranks make it together. Raises `SourceError` where parts do not make a whole."""
        self._exchange = exchange
        self._parts = [part.tensor for each in locals_ for part in each.parts]
        everyone = exchange.agree([_said(each) for each in locals_])
        self.parameters = {name: _parameter(name, said) for name, said in _by_name(everyone)}
        shared = _shared(everyone)
        self._boxes = {
            name: Boxes(name, self.parameters[name].shape, parts, INCOMPLETE)
            for name, parts in shared.items()
        }
        self._check_replicas(shared)
        self.spread = _spread(shared)
        """The most ranks that a layer is spread over, replicas apart."""
        exchange.serve(self._parts)

    def read(self, key: str, box: Box, out: Bytes) -> None:
        parameter = self.parameters[key]
        size = BITS[parameter.dtype] // 8
        whole = out.reshape(*(stop - start for start, stop in box), size)
        for cell, part in self._boxes[key].cells(box):
            inner = tuple(
                slice(start - first, stop - first)
                for (start, stop), (first, _) in zip(cell, box, strict=True)
            )
            there = tuple(
                (start - at, stop - at)
                for (start, stop), at in zip(cell, part.offsets, strict=True)
            )
            target = whole[inner]
            if target.flags.c_contiguous:
                self._exchange.read(part.owners, there, target.reshape(-1), key)
            else:
                data = np.empty(target.size, dtype=np.uint8)
                self._exchange.read(part.owners, there, data, key)
                target[...] = data.reshape(target.shape)

    def will_need(self, key: str, box: Box) -> None:
        """Nothing to do: it is in memory."""

    def owned(self, key: str, box: Box) -> Iterator[tuple[int, Iterable[int]]]:
        """The bytes of each part of a box, and the ranks that have them."""
        size = BITS[self.parameters[key].dtype] // 8
        for cell, part in self._boxes[key].cells(box):
            yield size * int(np.prod([stop - start for start, stop in cell])), part.owners

    def _check_replicas(self, shared: Mapping[str, Sequence[RankPart]]) -> None:
        """Raise `SourceError` where ranks that should have the same have not."""
        rank, mine = self._exchange.rank, {}
        try:
            for name, parts in shared.items():
                for part in parts:
                    if rank in part.owners and len(part.owners) > 1:
                        mine[name, part.offsets] = _digest(self._parts[part.owners[rank]])
        except Exception as error:
            self._exchange.agree(None, error)
        everyone = self._exchange.agree(mine)
        first: dict[Any, tuple[int, str]] = {}
        for rank, digests in enumerate(everyone):
            for what, digest in digests.items():
                other, same = first.setdefault(what, (rank, digest))
                if digest != same:
                    raise SourceError(
                        f"{what[0]}: rank {other} and rank {rank} should have the same values of "
                        "it, and have not. Has the training diverged, or is a rank's model not "
                        "loaded?"
                    )


def _said(local: Local) -> _Said:
    parts = tuple((part.offsets, tuple(part.tensor.shape)) for part in local.parts)
    return local.name, local.dtype, local.shape, parts


def _by_name(everyone: Sequence[Sequence[_Said]]) -> Iterator[tuple[str, dict[int, _Said]]]:
    """What ranks say of each parameter, in the order of ranks."""
    found: dict[str, dict[int, _Said]] = defaultdict(dict)
    for rank, all_said in enumerate(everyone):
        for said in all_said:
            found[said[0]].setdefault(rank, said)
    yield from found.items()


def _parameter(name: str, said: Mapping[int, _Said]) -> Parameter:
    (first, (_, dtype, shape, _)), *others = said.items()
    for rank, (_, other_dtype, other_shape, _) in others:
        if (other_dtype, other_shape) != (dtype, shape):
            raise SourceError(
                f"{name}: {dtype} {list(shape)} on rank {first}, {other_dtype} "
                f"{list(other_shape)} on rank {rank}. Do all of them share one model?"
            )
    return Parameter(name, name, (), shape, dtype)


def _shared(everyone: Sequence[Sequence[_Said]]) -> dict[str, list[RankPart]]:
    """Each parameter's boxes, with all that have them."""
    found: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], RankPart]] = defaultdict(dict)
    for rank, all_said in enumerate(everyone):
        number = 0
        for name, _, _, parts in all_said:
            for box in parts:
                found[name].setdefault(box, RankPart(*box)).owners.setdefault(rank, number)
                number += 1
    return {name: list(parts.values()) for name, parts in found.items()}


def _spread(shared: Mapping[str, Sequence[RankPart]]) -> int:
    layers: dict[str, set[int]] = defaultdict(set)
    for name, parts in shared.items():
        layers[".".join(name.split(".layers.")[-1].split(".")[:1])] |= {
            min(part.owners) for part in parts
        }
    return max(map(len, layers.values()), default=1)


def _digest(tensor: torch.Tensor) -> str:
    digest, flat = xxhash.xxh3_128(), tensor.reshape(-1)
    step = SLAB_BYTES // tensor.element_size()
    for at in range(0, flat.numel(), step):
        digest.update(flat[at : at + step].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def nearest(owned: Iterable[tuple[int, Iterable[int]]], ranks: int) -> list[int]:
    """Bytes that each rank has of something."""
    found: Counter[int] = Counter()
    for nbytes, owners in owned:
        for rank in owners:
            found[rank] += nbytes
    return [found[rank] for rank in range(ranks)]
