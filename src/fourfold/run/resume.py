# SPDX-License-Identifier: Apache-2.0
"""Assign shards and folders to ranks, and find the shards that an earlier run has finished.

Ranks find out which of them see the same OUT. The first of those is its leader: it begins or
resumes the run in OUT, and makes the folder a checkpoint in the end. If all ranks share one OUT,
that is the whole checkpoint; otherwise each OUT holds some of the shards, and `merge` joins them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from fourfold.calibration.statistics import Statistics
from fourfold.calibration.store import StatisticsStore
from fourfold.distributed.ranks import Ranks
from fourfold.errors import FourfoldError
from fourfold.planning import CopyPlan, Shard, deal, slabs_of
from fourfold.reporting.summary import versions
from fourfold.run.strategies import Run
from fourfold.sources.folded import FoldedSource
from fourfold.sources.opening import Model
from fourfold.storage.output import OutputFolder
from fourfold.storage.safetensors_header import read_header
from fourfold.storage.shard_file import digest_of_file
from fourfold.storage.source import Source


@dataclass(frozen=True)
class Assignment:
    """The work of one rank, and the results of an earlier run."""

    shards: Sequence[int]
    """The numbers of the shards that this rank writes."""
    finished: Sequence[int]
    """The numbers of the shards that an earlier run has finished, on all ranks."""
    statistics: Mapping[int | None, Statistics]
    """The statistics of an earlier run by layer; None stands for the modules outside the layers."""
    leaders: Sequence[int]
    """By rank, the first of the ranks that write into the same folder."""

    @classmethod
    def of_one_rank(cls, plan: CopyPlan) -> Assignment:
        """Return the assignment of a single rank with nothing done before."""
        return cls(range(len(plan.shards)), [], {}, [0])

    def is_leader(self, rank: int) -> bool:
        """True for the first of the ranks that write into its folder."""
        return rank < len(self.leaders) and self.leaders[rank] == rank

    @property
    def has_one_folder(self) -> bool:
        """True if all ranks write into the same folder."""
        return not any(self.leaders)


def identity_of(plan: CopyPlan, source: Source, run: Run) -> dict[str, Any] | None:
    """Return what must stay the same for a run to resume with the bytes of an unbroken one.

    None for a source that cannot tell if it is still the same.
    """
    stamps = source.stamps()
    if stamps is None:
        return None
    identity = {
        "versions": versions(),
        "source": {
            "name": plan.model,
            "files": {
                name: [stamp.size, stamp.mtime_ns, stamp.digest] for name, stamp in stamps.items()
            },
            **({"hub": source.fetching.revision} if source.fetching.revision else {}),
        },
        "recipe": plan.settings,
        "calibration": run.identity,
        "shards": {"for each layer": plan.parts, "plan": plan.digest},
        **({"folds": source.factors.digest} if isinstance(source, FoldedSource) else {}),
    }
    as_json: dict[str, Any] = json.loads(json.dumps(identity))  # it is compared with stored JSON
    return as_json


def pinned(model: Model, folder: OutputFolder, ranks: Ranks) -> Model:
    """Return `model`; if it is a name on the hub, at the commit of the run that can be resumed."""
    source = (folder.state.identity or {}).get("source", {})
    revision = None if folder.overwrite else source.get("hub")
    revisions = [x for x in ranks.gather(revision) if x and x.rpartition("@")[0] == str(model)]
    return revisions[0] if revisions else model


def without_times(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the times of files, which differ in copies of a source."""
    source = identity["source"]
    files = {name: [size, digest] for name, (size, _, digest) in source["files"].items()}
    return {**identity, "source": {**source, "files": files}}


def shards_per_layer(
    folder: OutputFolder, ranks: Ranks, requested: int | None, source: Source
) -> int:
    """Return the number of shards that a layer is cut into.

    It is the requested number, else that of an unfinished run in the folder, else one for each
    rank that has a part of the layer.
    """
    begun = _setting_of_unfinished_run(folder, ranks, "shards", "for each layer")
    return requested or begun or source.ranks_per_layer or ranks.size


def calibration_threads(folder: OutputFolder, ranks: Ranks, requested: int | None) -> int | None:
    """Return the number of PyTorch threads for calibration, which its results may depend on.

    It is the requested number, else that of an unfinished run in the folder, else that of rank 0;
    None for a single rank, which leaves PyTorch as it is.
    """
    begun = _setting_of_unfinished_run(folder, ranks, "calibration", "threads")
    threads: int = ranks.gather(torch.get_num_threads())[0]
    return requested or begun or (threads if ranks.size > 1 else None)


def _setting_of_unfinished_run(
    folder: OutputFolder, ranks: Ranks, part: str, name: str
) -> int | None:
    """Return a number from the identity of the run that could be resumed on any rank."""
    value = None
    if not folder.overwrite and folder.state.has_finished_shards:
        settings = (folder.state.identity or {}).get(part)
        value = settings.get(name) if isinstance(settings, dict) else None
    known = [value for value in ranks.gather(value) if isinstance(value, int)]
    return known[0] if known else None


def assign_shards(
    plan: CopyPlan,
    source: Source,
    folder: OutputFolder,
    identity: Mapping[str, Any] | None,
    ranks: Ranks,
    *,
    threads: int,
) -> Assignment:
    """Lock OUT, find out what is finished there, and assign the other shards to ranks.

    All ranks call this at the same time. `identity` is that of `identity_of`.

    Raises:
        OutputError: Another process writes into OUT, or it holds something else.
        FourfoldError: The ranks were given different things.
    """
    if identity is None:  # the source is not a folder
        recipe = json.loads(json.dumps(plan.settings))
        _check_same(ranks, {"versions": versions(), "recipe": recipe, "plan": plan.digest})
    else:
        _check_same(ranks, without_times(identity))
    leaders = _lock_folders(folder, ranks)
    is_leader = leaders[ranks.rank] == ranks.rank
    if is_leader:
        folder.begin(identity, plan.files)
    finished = ranks.gather(_finished_shards(folder, plan, threads) if is_leader else [])
    done = {name for names in finished for name in names}
    statistics = StatisticsStore(folder.state.statistics).load()
    common = set.intersection(*map(set, ranks.gather(list(statistics))))
    statistics = {layer: statistics[layer] for layer in statistics if layer in common}

    def nearness(shard: Shard) -> Sequence[int] | None:
        return source.rank_affinity(slab for job in shard.jobs for slab in slabs_of(job))

    numbers = dict[bool, list[int]]({True: [], False: []})
    for number, name in enumerate(plan.shard_names):
        numbers[name in done].append(number)
    mine = deal(plan.shards, numbers[False], ranks.size, nearness)[ranks.rank]
    return Assignment(mine, numbers[True], statistics, leaders)


def _check_same(ranks: Ranks, identity: Mapping[str, Any]) -> None:
    """Raise if ranks were given different sources or recipes, or run different versions."""
    identities = ranks.gather(dict(identity))
    for rank, other in enumerate(identities):
        different = [name for name in other if other[name] != identities[0][name]]
        if different:
            raise FourfoldError(
                f"rank {rank} has another {' and another '.join(different)} than rank 0. "
                "Give every rank the same checkpoint, options and versions."
            )


def _lock_folders(folder: OutputFolder, ranks: Ranks) -> list[int]:
    """Lock OUT for this run; return, by rank, the leader of those that see the same folder."""
    token = ranks.gather(uuid4().hex)[0]
    leaders: list[int | None] = [None] * ranks.size
    while None in leaders:
        candidate = leaders.index(None)
        if ranks.rank == candidate:
            folder.lock(token)
        ranks.gather("locked")
        is_same = ranks.rank == candidate or _sees_lock(folder, candidate, token)
        for rank, sees in enumerate(ranks.gather(is_same)):
            if sees and leaders[rank] is None:
                leaders[rank] = candidate
    complete = [leader for leader in leaders if leader is not None]
    if complete[ranks.rank] != ranks.rank:
        folder.lock(token)
    ranks.gather("all locked")
    return complete


def _sees_lock(folder: OutputFolder, rank: int, token: str) -> bool:
    """True if another rank has locked this rank's folder."""
    for path in (folder.folder.parent, folder.folder):
        if path.is_dir():
            os.listdir(path)  # makes a network file system look again
    return folder.state.token_of(rank) == token


def _finished_shards(folder: OutputFolder, plan: CopyPlan, threads: int) -> list[str]:
    """Return the shards with a record whose files still have the recorded digest."""
    records = folder.state.finished_shards()
    names = [name for name in plan.shard_names if name in records]
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(digest_of_file, (folder.folder / name for name in names))
        return [
            name
            for name, digest in zip(names, digests, strict=True)
            if digest is not None and digest == records[name].get("digest")
        ]


def check_all_written(out: Path, plan: CopyPlan, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Check, before OUT becomes a checkpoint, that every shard holds the planned tensors."""
    for name, shard in zip(plan.shard_names, plan.shards, strict=True):
        if name not in records:
            raise FourfoldError(
                f"{out / name}: planned, but no rank wrote it. "
                "This is a defect of fourfold; please report it."
            )
        tensors = read_header(out / name)
        if {key: (info.dtype, info.shape) for key, info in tensors.items()} != shard.tensors:
            raise FourfoldError(
                f"{out / name}: holds other tensors than planned. "
                "Does another program write into the folder?"
            )
