# SPDX-License-Identifier: Apache-2.0
"""Tensors that stand for one parameter: two names for it, or a head that is tied and stored.

Which of them counts depends on the engine, and often on the order of files. Headers do not show
whether they agree, so their values are compared, here alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fourfold.errors import SourceError
from fourfold.models.inventory import Inventory
from fourfold.models.ties import FIELD, Tie
from fourfold.storage.source import Source

_CHUNK_BYTES = 1 << 23


def agreement_notes(source: Source, inventory: Inventory) -> Iterator[str]:
    """Yield notes on tensors that stand for the same parameter.

    Raises:
        SourceError: Two tensors for one parameter have different values.
    """
    if source.is_sharded:
        return  # a parameter in memory has one value
    for first, second in inventory.doubles:
        if not _are_equal(source, first, second):
            raise SourceError(
                f"{_place(inventory, first)} and {_place(inventory, second)}: both are the same "
                "parameter, with different values; which one counts depends on the engine. Take "
                "one of them out of the checkpoint."
            )
        yield f"{first} and {second} are the same parameter, with equal values; both are written"
    for head, embedding in inventory.tied_keys.items():
        if _are_equal(source, head, embedding):
            continue
        if inventory.tie is Tie.YES:
            raise SourceError(
                f"{_place(inventory, head)}: has other values than {embedding}, but config.json "
                f"ties the two ({FIELD}), and engines would leave this tensor out. Set {FIELD} to "
                f"false in config.json{_everywhere(source)}, or take the tensor out."
            )
        yield (
            f"{head} has other values than {embedding}, which config.json ties it to in one place "
            f"and not in another: engines that read the one leave {head} out. Set {FIELD} to false "
            f"{_everywhere(source)[2:]}"
        )


def _everywhere(source: Source) -> str:
    parts = sum(isinstance(value, dict) for value in source.config.values())
    return ", for the whole model and in its text_config" if parts else ""


def _place(inventory: Inventory, key: str) -> str:
    return f"{key} in {inventory.tensors[key].info.file.name}"


def _are_equal(source: Source, first: str, second: str) -> bool:
    one, other = source.tensors[first], source.tensors[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with source.fetching.peeking():
        for begin in range(0, one.nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, one.nbytes - begin)
            buffers = [np.empty(size, dtype=np.uint8) for _ in range(2)]
            for key, buffer in zip((first, second), buffers, strict=True):
                source.read_bytes(key, begin, buffer)
            if not np.array_equal(buffers[0], buffers[1]):
                return False
    return True
