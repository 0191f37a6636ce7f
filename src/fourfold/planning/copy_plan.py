# SPDX-License-Identifier: Apache-2.0
"""The part of a plan that does not depend on quantization: which tensors lie in which shard.

`CopyPlan` alone describes a checkpoint that has the same tensors in new shards. `Plan` adds what
is quantized, and how.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fourfold.layouts.base import LAYOUTS, Layout
from fourfold.models.inventory import Inventory
from fourfold.planning.limits import DEFAULT_LIMITS, Limits
from fourfold.planning.rows import Row, Shard, slabs_of
from fourfold.planning.shards import outputs_of, shard_names
from fourfold.recipes import DEFAULT_LAYOUT
from fourfold.storage.names import CONFIG, INDEX, hub_id
from fourfold.storage.side_files import SideFiles


@dataclass(frozen=True, kw_only=True)
class CopyPlan:
    """A plan that writes every tensor of a source unchanged, and says into which shard."""

    source: Path
    inventory: Inventory
    rows: tuple[Row, ...]
    shards: tuple[Shard, ...]
    side_files: SideFiles
    notes: tuple[str, ...]
    """Remarks for the user: engines without a loader, files that are not copied."""
    parts: int = 1
    """The least number of shards of a decoder layer."""
    fetches: bool = False
    """True if weights have to be fetched to this machine."""
    own_files: tuple[str, ...] = ()
    """Files of the output that the source does not have."""
    limits: Limits = DEFAULT_LIMITS

    @property
    def base_model(self) -> str:
        """The source's name on the hub, or else that of its folder, even if it was given as `.`."""
        return hub_id(self.source) or os.path.basename(os.path.abspath(self.source))

    @property
    def model(self) -> str:
        """The source's name, without its organization."""
        return self.base_model.rpartition("/")[2]

    @property
    def layout(self) -> Layout:
        """The layout of the checkpoint that is written. Tensors that are copied are the same in
        all layouts."""
        return LAYOUTS[DEFAULT_LAYOUT]

    @property
    def settings(self) -> Any:
        """The user's settings as plain data. A run with other settings does not resume this one."""
        return "copy"

    @cached_property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @cached_property
    def nbytes_after(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def largest_job(self) -> int:
        """Bytes that the largest job has in memory at a time."""
        return self.limits.copy_bytes

    def memory(self, threads: int, workers: int | None = None) -> int:
        """Estimate the memory of the job, without the interpreter and its libraries.

        Args:
            threads: The number of threads that compute.
            workers: The number of workers that hold a job; by default a few more than `threads`.

        Returns:
            Bytes.
        """
        count = threads + self.limits.waiting if workers is None else workers
        return count * self.largest_job * 3 // 2

    @property
    def calibration_memory(self) -> int:
        """Bytes that running the model takes besides activations."""
        return 0

    def shards_of(self, layer: int | None) -> Sequence[int]:
        """Return the numbers of a decoder layer's shards; for None, of the non-layer tensors'."""
        return self._shards_by_layer.get(layer, ())

    @cached_property
    def _shards_by_layer(self) -> Mapping[int | None, Sequence[int]]:
        numbers: dict[int | None, list[int]] = defaultdict(list)
        for number, shard in enumerate(self.shards):
            numbers[shard.layer].append(number)
        return numbers

    @cached_property
    def digest(self) -> str:
        """A digest of all that is written: each shard's tensors and what they are made of."""
        digest = hashlib.sha256(repr(self._digested).encode())
        for shard in self.shards:
            for job in shard.jobs:
                digest.update(repr((shard.layer, outputs_of(job, self.layout))).encode())
                digest.update(repr([*slabs_of(job)]).encode())
        return digest.hexdigest()

    @property
    def _digested(self) -> Any:
        """The data that the digest covers besides the shards."""
        return ()

    @cached_property
    def files(self) -> list[str]:
        """Every file of the output, relative to its folder."""
        beside = [self.name_in_output(path) for path in self.side_files.copied]
        return [*self.shard_names, *beside, *self._reports, INDEX, CONFIG]

    def name_in_output(self, side_file: Path) -> str:
        """Return the path that a side file of the source gets in the output."""
        return side_file.as_posix()

    @property
    def _reports(self) -> Sequence[str]:
        """Files of the output that say what was done."""
        return self.own_files

    @cached_property
    def shard_names(self) -> tuple[str, ...]:
        return shard_names(len(self.shards))
