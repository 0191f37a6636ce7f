# SPDX-License-Identifier: Apache-2.0
"""Sums and maxima of tensors over ranks, by a gloo process group.

**The result does not depend on timing.** Every rank receives the tensors of all others, piece by
piece, and combines them in the order of ranks. All ranks thus hold the same bytes, and a maximum
or a sum of integers is the same for any number of ranks. gloo's own all-reduce would send less,
but it adds floats in an order that depends on how it cuts the tensor.

**An error of one rank still ends all ranks within seconds.** A rank that waits inside gloo cannot
be interrupted, so no rank does: operations are asynchronous, and while one is running the rank
looks for the failure of others. All ranks meet through the store before the first operation and
before each reduction, so that gloo only runs while every rank takes part. An operation that is
given up ends when the rank that failed closes its connection, or after `TIMEOUT` at the latest.

Hosts of several nodes must resolve their own name to an address that the other nodes can reach;
otherwise set `GLOO_SOCKET_IFNAME` to the network interface.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from fourfold.errors import FourfoldError
from fourfold.statistics import Reduction

TIMEOUT = timedelta(seconds=30)
"""The time that a gloo operation may take. It moves at most `PIECE_BYTES` to and from each rank."""

PIECE_BYTES = 1 << 24


class TensorGroup:
    """The ranks of a job, as a gloo group of their own."""

    def __init__(self, store: Any, rank: int, size: int, check: Callable[[], None]) -> None:
        """Connect the ranks; all of them must do so at the same time.

        Args:
            store: A store of torch.distributed that all ranks share.
            rank: The number of this rank.
            size: The number of ranks.
            check: Raises an error if another rank has failed.
        """
        self.size, self._check = size, check
        self._group: Any = dist.ProcessGroupGloo(PrefixStore("gloo", store), rank, size, TIMEOUT)

    def reduce(self, tensors: Mapping[str, Tensor], op: Reduction) -> dict[str, Tensor]:
        """Combine tensors element by element, in the order of ranks.

        Args:
            tensors: CPU tensors by name; names, dtypes and shapes are the same on all ranks.
            op: "sum" or "max".

        Returns:
            The combined tensors, the same bytes on all ranks.
        """
        return {name: self._reduced(tensors[name], op) for name in sorted(tensors)}

    def _reduced(self, tensor: Tensor, op: Reduction) -> Tensor:
        combine = torch.add if op == "sum" else torch.maximum
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        elements = max(1, PIECE_BYTES // tensor.dtype.itemsize)
        pieces = (torch.split(whole.reshape(-1), elements) for whole in (tensor, result))
        for mine, target in zip(*pieces, strict=True):
            target.copy_(functools.reduce(combine, self._all_of(mine)))
        return result

    def _all_of(self, piece: Tensor) -> list[Tensor]:
        """The piece of every rank, by rank."""
        pieces = [torch.empty_like(piece) for _ in range(self.size)]
        # As bytes: gloo knows few dtypes.
        as_bytes = [received.view(torch.uint8) for received in pieces]
        self._finish(self._group.allgather([as_bytes], [piece.view(torch.uint8)]))
        return pieces

    def _finish(self, work: Any) -> None:
        """Wait for an operation, or raise the error of the rank that failed meanwhile."""
        for pause in _pauses():
            if work.is_completed():
                break
            self._check()
            time.sleep(pause)
        try:
            work.wait()
        except RuntimeError as error:
            self._check()
            raise FourfoldError(
                f"the connection to another rank was lost ({str(error).splitlines()[0][:200]}). "
                "Was it stopped?"
            ) from error


def _pauses() -> Iterator[float]:
    """Seconds between two looks: short at first, since most operations are."""
    pause = 0.0001
    while True:
        yield pause
        pause = min(2 * pause, 0.05)
