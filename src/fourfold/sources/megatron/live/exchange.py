# SPDX-License-Identifier: Apache-2.0
"""Reads boxes of tensors that another rank holds.

Every rank runs a thread that answers the requests of the others. A rank can therefore read anything
at any time and from any thread, in any order. Tensors travel a slab at a time through gloo and the
memory of the CPUs, even if the model is on GPUs, over a process group of their own.

    request   [tag, shard, start₀, stop₀, start₁, …]   to the owner, under the tag REQUEST
    answer    [bytes, or -1]  [the bytes, row-major]   to the rank that asked, under its tag
    goodbye   [0, …]                                   to every other rank

A rank answers until all others have said goodbye.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fourfold.distributed.process_groups import GroupRank
from fourfold.errors import SourceError
from fourfold.sources.megatron.box_index import Box
from fourfold.storage.source import Bytes

REQUEST = 1
FIRST_TAG, LAST_TAG = 2, 1 << 30
DIMENSIONS = 8
WORDS = 2 + 2 * DIMENSIONS

TIMEOUT = timedelta(days=30)
"""A rank may have no request as long as the others work. Gloo must not give up then, since it would
break all connections. A rank that dies closes its connections."""

GOODBYE_SECONDS = 10.0
"""The time that a rank waits for the others when they close the exchange."""


class Exchange:
    """This rank and the others of the default process group. Safe for many threads."""

    def __init__(self) -> None:
        """Meet the other ranks; all of them must do so."""
        self.ranks = GroupRank()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self.ranks = GroupRank(dist.get_rank(), dist.get_world_size(), group)
        self._tags = itertools.count(FIRST_TAG)
        self._shards: Sequence[torch.Tensor] = ()
        self._server: threading.Thread | None = None

    def serve(self, shards: Sequence[torch.Tensor]) -> None:
        """Begin to answer requests for these tensors, which `read` knows by their numbers."""
        self._shards = shards
        if self.ranks.size > 1:
            self._server = threading.Thread(target=self._answer_all, name="serve", daemon=True)
            self._server.start()

    def read(self, owners: Mapping[int, int], box: Box, out: Bytes, name: str) -> None:
        """Read a box of a shard.

        Args:
            owners: Each rank that holds the shard → the shard's number there.
            box: The elements that are wanted.
            out: A buffer for them, row-major.
            name: The parameter's name, for messages.

        Raises:
            SourceError: The rank that holds the shard does not answer.
        """
        if self.ranks.rank in owners:
            shard = self._shards[owners[self.ranks.rank]]
            out[:] = _bytes_of(shard, box).numpy()
            return
        candidates = sorted(owners)
        owner = candidates[self.ranks.rank % len(candidates)]
        try:
            self._request(owner, owners[owner], box, out)
        except RuntimeError as error:  # torch.distributed raises it when a rank has gone
            cause = str(error).splitlines()[0][:200]
            raise SourceError(
                f"{name}: rank {owner}, which holds it, does not answer: {cause}."
            ) from error

    def close(self) -> None:
        """Say goodbye to the other ranks, and wait until they do the same."""
        if self.ranks.size == 1:
            return
        if self._server is not None:
            self._say_goodbye()
            self._server.join(GOODBYE_SECONDS)
        if self._server is None or not self._server.is_alive():
            dist.destroy_process_group(self.ranks.group)
        self.ranks = GroupRank()

    def _say_goodbye(self) -> None:
        goodbye = torch.zeros(WORDS, dtype=torch.int64)
        others = [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]
        works: list[Any] = []
        with suppress(RuntimeError, ValueError):  # a rank that has gone needs no goodbye
            for other in others:
                works.append(dist.isend(goodbye, other, self.ranks.group, REQUEST))
        for work in works:
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=GOODBYE_SECONDS))

    def _request(self, owner: int, shard: int, box: Box, out: Bytes) -> None:
        tag = FIRST_TAG + next(self._tags) % (LAST_TAG - FIRST_TAG)
        words = [tag, shard, *itertools.chain.from_iterable(box)]
        request = torch.tensor([*words, *[0] * (WORDS - len(words))])
        dist.send(request, owner, self.ranks.group, tag=REQUEST)
        nbytes = torch.empty(1, dtype=torch.int64)
        dist.recv(nbytes, owner, self.ranks.group, tag=tag)
        if int(nbytes) != len(out):
            raise RuntimeError("it could not read the values")
        dist.recv(torch.from_numpy(out), owner, self.ranks.group, tag=tag)

    def _answer_all(self) -> None:
        group, active = self.ranks.group, self.ranks.size - 1
        request = torch.empty(WORDS, dtype=torch.int64)
        with suppress(RuntimeError):  # a rank has gone, which the ranks that need it will notice
            while active:
                asker = dist.recv(request, None, group, tag=REQUEST)
                tag, shard, *bounds = request.tolist()
                if tag:
                    self._answer(group, asker, tag, self._shards[shard], bounds)
                else:
                    active -= 1

    def _answer(
        self, group: Any, asker: int, tag: int, shard: torch.Tensor, bounds: Sequence[int]
    ) -> None:
        box = tuple(zip(bounds[::2], bounds[1::2], strict=True))[: shard.ndim]
        try:
            data = _bytes_of(shard, box)
        except Exception:  # such as an accelerator without memory: the rank that asked reports it
            dist.send(torch.tensor([-1]), asker, group, tag=tag)
            return
        dist.send(torch.tensor([data.numel()]), asker, group, tag=tag)
        dist.send(data, asker, group, tag=tag)


def _bytes_of(shard: torch.Tensor, box: Box) -> torch.Tensor:
    """The bytes of a box of a tensor, row-major, in the CPU's memory."""
    inner = shard[tuple(slice(*span) for span in box)]
    return inner.contiguous().cpu().reshape(-1).view(torch.uint8)
