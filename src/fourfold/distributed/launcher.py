"""What a launcher such as torchrun tells a process of the others that it has started."""

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
    """How many of them share this machine."""


def launch() -> Launch:
    """How this process was launched; alone unless all of the launcher's variables are set.

    Raises `UsageError` where they make no sense.
    """
    if not all(os.environ.get(name) for name in NEEDED):
        return Launch()
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    found = Launch(rank, size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1))
    if not (0 <= rank < size and found.local_rank >= 0 and found.local_size >= 1):
        raise UsageError(
            f"RANK={rank} of WORLD_SIZE={size} in the environment: ranks go from 0 to "
            f"{size - 1}. Start all of them with torchrun."
        )
    return found if size > 1 else Launch()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UsageError(
            f"{name}={value!r} in the environment: no number. Start all ranks with torchrun."
        ) from None
