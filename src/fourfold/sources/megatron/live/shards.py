# SPDX-License-Identifier: Apache-2.0
"""The parameters of a whole model whose shards are on several ranks.

Each rank says which shards it holds. Together that is the content of a checkpoint's metadata, with
ranks in the place of files, and the same index proves that no part is missing or held in two
versions. Ranks that hold the same shard are replicas (data or tensor parallelism): their bytes must
be the same.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from fourfold.distributed.process_groups import agreeing
from fourfold.errors import SourceError
from fourfold.sources.megatron.box_index import Box, BoxIndex, contiguous
from fourfold.sources.megatron.live.exchange import Exchange
from fourfold.sources.megatron.live.modules import LocalParameter
from fourfold.sources.megatron.parameters import Parameter
from fourfold.storage.safetensors_header import BITS
from fourfold.storage.source import Bytes

DIGEST_BYTES = 1 << 26
"""Replicas are digested in pieces of this size."""

INCOMPLETE = (
    "Does every rank call with its own part, and the model's process groups as they were built?"
)

_Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a shard."""

_Declared = tuple[str, str, tuple[int, ...], tuple[_Place, ...]]
"""A rank's declaration of a parameter: name, dtype, global shape, its shards."""


@dataclass(frozen=True)
class SharedShard:
    """A box of a parameter, and the ranks that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    owners: dict[int, int] = field(default_factory=dict)
    """Rank → the shard's number there."""

    @property
    def holder(self) -> str:
        return f"rank {min(self.owners)}"


class SharedTensors:
    """The parameters of the whole model. Safe for many threads."""

    def __init__(self, exchange: Exchange, local: Sequence[LocalParameter]) -> None:
        """Exchange with the other ranks what each holds; all of them must do so.

        Raises:
            SourceError: The shards do not make up whole parameters, or replicas differ.
        """
        self._exchange = exchange
        self._tensors = [shard.tensor for parameter in local for shard in parameter.shards]
        declared = exchange.ranks.gather([_declared(parameter) for parameter in local])
        self.parameters = _parameters(declared)
        shards = _shards(declared)
        self._indexes = {
            name: BoxIndex(name, self.parameters[name].shape, shards[name], INCOMPLETE)
            for name in shards
        }
        self._check_replicas(shards)
        self.ranks_per_layer = _ranks_per_layer(shards)
        exchange.serve(self._tensors)

    def read(self, key: str, box: Box, out: Bytes) -> None:
        """Fill `out` with the elements of a box of a parameter, row-major."""
        element = BITS[self.parameters[key].dtype] // 8
        for shard, inner, view in self._indexes[key].targets(box, element, out):
            with contiguous(view) as buffer:
                self._exchange.read(shard.owners, inner, buffer, key)

    def bytes_by_rank(self, boxes: Iterable[tuple[str, Box]]) -> list[int]:
        """Return how many bytes of boxes of parameters each rank holds."""
        counts: Counter[int] = Counter()
        for key, box in boxes:
            element = BITS[self.parameters[key].dtype] // 8
            for cell, shard in self._indexes[key].cells(box):
                nbytes = element * math.prod(stop - start for start, stop in cell)
                counts.update(dict.fromkeys(shard.owners, nbytes))
        return [counts[rank] for rank in range(self._exchange.ranks.size)]

    def _check_replicas(self, shards: Mapping[str, Sequence[SharedShard]]) -> None:
        ranks = self._exchange.ranks
        own: dict[tuple[str, tuple[int, ...]], str] = {}
        with agreeing(ranks.gather):
            for name, replicated in shards.items():
                for shard in replicated:
                    if ranks.rank in shard.owners and len(shard.owners) > 1:
                        tensor = self._tensors[shard.owners[ranks.rank]]
                        own[name, shard.offsets] = _digest(tensor)
        first: dict[tuple[str, tuple[int, ...]], tuple[int, str]] = {}
        for rank, digests in enumerate(ranks.gather(own)):
            for place, digest in digests.items():
                other, expected = first.setdefault(place, (rank, digest))
                if digest != expected:
                    raise SourceError(
                        f"{place[0]}: rank {other} and rank {rank} should have the same values of "
                        "it, but do not. Has the training diverged, or is a rank's model not "
                        "loaded?"
                    )


def _declared(parameter: LocalParameter) -> _Declared:
    shards = tuple((shard.offsets, tuple(shard.tensor.shape)) for shard in parameter.shards)
    return parameter.name, parameter.dtype, parameter.shape, shards


def _parameters(declared: Sequence[Sequence[_Declared]]) -> dict[str, Parameter]:
    """The parameters that ranks declare; raises `SourceError` if they disagree on one."""
    parameters: dict[str, tuple[int, Parameter]] = {}
    for rank, on_rank in enumerate(declared):
        for name, dtype, shape, _ in on_rank:
            first, parameter = parameters.setdefault(
                name, (rank, Parameter(name, name, (), shape, dtype))
            )
            if first != rank and (parameter.dtype, parameter.shape) != (dtype, shape):
                raise SourceError(
                    f"{name}: {parameter.dtype} {list(parameter.shape)} on rank {first}, {dtype} "
                    f"{list(shape)} on rank {rank}. Do all of them share one model?"
                )
    return {name: parameter for name, (_, parameter) in parameters.items()}


def _shards(declared: Sequence[Sequence[_Declared]]) -> dict[str, list[SharedShard]]:
    """The shards of each parameter, with all ranks that hold them."""
    shards: dict[str, dict[_Place, SharedShard]] = defaultdict(dict)
    for rank, on_rank in enumerate(declared):
        number = 0
        for name, _, _, places in on_rank:
            for place in places:
                shard = shards[name].setdefault(place, SharedShard(*place))
                shard.owners.setdefault(rank, number)
                number += 1
    return {name: list(by_place.values()) for name, by_place in shards.items()}


def _ranks_per_layer(shards: Mapping[str, Sequence[SharedShard]]) -> int:
    """The most ranks that hold shards of one layer, where one of several replicas counts."""
    owners: dict[str, set[int]] = defaultdict(set)
    for name, of_parameter in shards.items():
        layer = name.split(".layers.")[-1].split(".")[0]
        owners[layer] |= {min(shard.owners) for shard in of_parameter}
    return max(map(len, owners.values()), default=1)


def _digest(tensor: torch.Tensor) -> str:
    digest, flat = xxhash.xxh3_128(), tensor.reshape(-1)
    step = DIGEST_BYTES // tensor.element_size()
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
