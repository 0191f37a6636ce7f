# SPDX-License-Identifier: Apache-2.0
"""Sizes that bound memory and files. The bytes of an output do not depend on them, but for
`shard_bytes`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the bytes that are read, held and written at a time."""

    group_bytes: int = 1 << 28
    """A scale group with more bytes of source weights is read twice, in pieces, instead of held."""
    copy_bytes: int = 1 << 24
    """Tensors are copied in pieces of this size."""
    shard_bytes: int = 5_000_000_000
    """A shard is closed before it grows beyond this."""
    lookahead: int = 16
    """The operating system is asked to read ahead for this many jobs."""
    unsynced: int = 2
    """This many full shards may wait to be synced; beyond that workers wait for the disk."""
    waiting: int = 2
    """Workers besides those that compute: one may read, one may write meanwhile."""


DEFAULT_LIMITS = Limits()
