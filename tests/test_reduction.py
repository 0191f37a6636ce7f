# SPDX-License-Identifier: Apache-2.0
"""Tensors are reduced over ranks: in the order of ranks, and no rank hangs when another fails."""

from __future__ import annotations

import signal
from functools import reduce

import pytest
import torch

import fourfold
from fourfold.distributed.ranks import RankFailedError, RankGroup, Ranks
from jobs import Script
from test_ranks import free_port, threads_of, together


def tensors_of(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "floats": torch.randn(5, 3, generator=generator) * 10.0**rank,
        "halves": torch.randn(7, generator=generator).bfloat16(),
        "counts": torch.randint(0, 99, (4,), generator=generator),
        "scalar": torch.tensor(float(rank)),
        "large": torch.randn(5 << 20, generator=generator),  # several pieces
        "transposed": torch.randn(2, 3, generator=generator).T,
        "empty": torch.zeros(0),
    }


@pytest.mark.parametrize("op", ["sum", "max"])
def test_in_the_order_of_ranks(op: str) -> None:
    combine = torch.add if op == "sum" else torch.maximum
    with threads_of(3) as ranks:
        results = together(ranks, lambda rank: rank.reduce(tensors_of(rank.rank), op))
    every = [tensors_of(rank) for rank in range(3)]
    for result in results:
        assert result.keys() == every[0].keys()
        for name, tensor in result.items():
            wanted = reduce(combine, [tensors[name] for tensors in every])
            assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(tensor, wanted)


def test_tensors_that_some_ranks_lack() -> None:
    def act(rank: RankGroup) -> list[dict[str, torch.Tensor]]:
        mine = {str(rank.rank): torch.tensor([rank.rank + 1])} if rank.rank < 2 else {}
        return [rank.reduce(mine, "sum"), rank.reduce({}, "max"), rank.reduce(mine, "max")]

    with threads_of(3) as ranks:
        for first, second, third in together(ranks, act):
            assert first == third == {"0": torch.tensor([1]), "1": torch.tensor([2])}
            assert second == {}


def test_alone() -> None:
    assert Ranks().reduce({"a": torch.tensor(3)}, "sum") == {"a": torch.tensor(3)}


def test_an_error_while_the_others_reduce() -> None:
    """They leave the operation that the failed rank never joins."""

    def act(rank: RankGroup) -> None:
        rank.reduce(tensors_of(rank.rank), "max")
        assert rank._tensor_group is not None
        if rank.rank == 1:
            raise fourfold.UsageError("no such thing.")
        rank._tensor_group.reduce(tensors_of(rank.rank), "max")

    with threads_of(3) as ranks:
        errors = together(ranks, act)
    assert [str(error) for error in errors] == [
        "rank 1: no such thing.", "no such thing.", "rank 1: no such thing."
    ]  # fmt: skip
    assert isinstance(errors[0], RankFailedError)


RANK = """
import os, signal, sys, threading
import torch
from torch.distributed import TCPStore
from fourfold.distributed.ranks import RankGroup, RankTimeouts
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore("127.0.0.1", port, 3, rank == 0)
together = RankGroup(store, rank, 3, timeouts=RankTimeouts(silence=8))
with together.joined():
    while True:
        together.reduce({"a": torch.ones(1 << 20)}, "sum")
        if rank == 1:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
"""


def test_a_kill_while_the_others_reduce() -> None:
    port = free_port()
    processes = [Script(RANK, rank, port) for rank in range(3)]
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [1, -signal.SIGKILL, 1]
    for text in (errors[0], errors[2]):
        assert "FourfoldError" in text or "RankFailedError" in text
