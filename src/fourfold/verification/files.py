# SPDX-License-Identifier: Apache-2.0
"""Rules on the index and the shards."""

from __future__ import annotations

from collections.abc import Iterator

from fourfold.storage.names import INDEX
from fourfold.verification.checkpoint import Checkpoint
from fourfold.verification.rules import Finding, finding


def check_index(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The index and the shards hold the same names."""
    files, tensors = checkpoint.files, checkpoint.stored
    if files.weight_map is None:
        if len(files.shards) > 1:
            yield finding("index-missing", INDEX, f"{len(files.shards)} files, no index")
        return
    for name in sorted(tensors.keys() - files.weight_map.keys()):
        yield finding("index-entry-missing", name, f"lies in {tensors[name].file.name}, not listed")
    for name, shard in sorted(files.weight_map.items()):
        if name not in tensors:
            yield finding("index-entry-wrong", name, f"listed in {shard}, in no shard")
        elif tensors[name].file != checkpoint.folder / shard:
            text = f"listed in {shard}, lies in {tensors[name].file.name}"
            yield finding("index-entry-wrong", name, text)


def check_total_size(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The index's total_size is the sum of the tensors."""
    stated = checkpoint.files.total_size
    actual = sum(info.nbytes for info in checkpoint.stored.values())
    if stated is not None and stated != actual:
        yield finding("index-total-size", INDEX, f"{stated:,} bytes stated, {actual:,} found")


def check_shards(checkpoint: Checkpoint) -> Iterator[Finding]:
    """No shard beside the index, no tensor twice."""
    for name in checkpoint.files.unlisted:
        yield finding("shard-unlisted", name, f"{INDEX} does not name it; it was not verified")
    for name, first, second in checkpoint.files.twice:
        yield finding("tensor-twice", name, f"lies in {first} and in {second}")


CHECKS = (check_index, check_total_size, check_shards)
