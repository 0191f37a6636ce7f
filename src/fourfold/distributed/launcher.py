# SPDX-License-Identifier: Apache-2.0
"""This process's place among those that a launcher such as torchrun has started."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fourfold.errors import UsageError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among those of one launch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """The number of ranks on this machine."""


def launch() -> Launch:
    """Read this process's place from the launcher's variables; it is alone if one is missing.

    Raises:
        UsageError: The variables do not fit together.
    """
    if not all(os.environ.get(name) for name in NEEDED):
        return Launch()
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    place = Launch(rank, size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))
    if not (0 <= rank < size and place.local_rank >= 0 and place.local_size >= 1):
        raise UsageError(
            f"RANK={rank} of WORLD_SIZE={size} in the environment: ranks go from 0 to "
            f"{size - 1}. Start all of them with torchrun."
        )
    return place if size > 1 else Launch()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UsageError(
            f"{name}={value!r} in the environment: not a number. Start all ranks with torchrun."
        ) from None
