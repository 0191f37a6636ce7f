# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a model in memory, and talk through a process group of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from fourfold.errors import FourfoldError


@dataclass(frozen=True, slots=True)
class GroupRank:
    """This process in a process group; alone by default."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """The process group; None for the default one."""

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank gave, by rank. All ranks must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextmanager
def agreeing(gather: Callable[[str | None], list[str | None]]) -> Iterator[None]:
    """Raise an error of one rank on all ranks, which would otherwise wait for that rank.

    All ranks must enter and leave the context.

    Args:
        gather: Returns what each rank gave, by rank.

    Raises:
        FourfoldError: Another rank has raised an error; the message names the rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    texts = gather(None if failure is None else str(failure) or repr(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise FourfoldError(f"rank {rank}: {text}")
