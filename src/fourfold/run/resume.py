"""Who writes which shards into which folder, and what of them is finished already.

Ranks find out which of them see the same OUT. The first of those is its leader: it takes OUT,
reads the journal that an earlier run left, and makes the folder a checkpoint in the end. Where
all ranks share one OUT that is the whole; otherwise each OUT holds parts, and `merge` joins them.
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
from fourfold.planning import Plan, Shard, deal, slabs_of
from fourfold.reporting.summary import versions
from fourfold.run.strategies import Run
from fourfold.storage.output import OutputFolder
from fourfold.storage.safetensors_header import read_header
from fourfold.storage.shard_file import digest_of_file
from fourfold.storage.source import Source


@dataclass(frozen=True)
class Share:
    """What this rank does, and what was done before."""

    shards: Sequence[int]
    """Numbers of those that this rank writes."""
    finished: int
    """How many an earlier run has finished, on all ranks."""
    kept: Mapping[int | None, Statistics]
    """What an earlier run has observed, by layer."""
    leaders: Sequence[int]
    """By rank, the first of those that write into the same folder."""

    @classmethod
    def of_all(cls, plan: Plan) -> Share:
        """Everything, by one rank, from the beginning."""
        return cls(range(len(plan.shards)), 0, {}, [0])

    def is_leader(self, rank: int) -> bool:
        return rank < len(self.leaders) and self.leaders[rank] == rank

    @property
    def is_whole(self) -> bool:
        """Whether all ranks write into one folder."""
        return not any(self.leaders)


def identity_of(plan: Plan, source: Source, run: Run) -> dict[str, Any] | None:
    """What must be as it was for a run to go on, so that the bytes are those of an unbroken one.

    None for a source that cannot say whether it is still the same.
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
        },
        "recipe": plan.recipe.model_dump(mode="json"),
        "calibration": run.identity,
        "shards": {"for each layer": plan.parts, "plan": plan.digest},
    }
    found: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read again
    return found


def without_times(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as several machines share it: copies of a file differ in when they were made."""
    source = identity["source"]
    files = {name: [size, digest] for name, (size, _, digest) in source["files"].items()}
    return {**identity, "source": {**source, "files": files}}


def parts_of(
    folder: OutputFolder, ranks: Ranks, wanted: int | None, overwrite: bool, source: Source
) -> int:
    """How many shards a layer is cut into: as it is wanted, or as an unfinished run has begun, or
    one for each rank; of a model whose layers lie on some of the ranks, one for each of these."""
    begun = _begun(folder, overwrite, "shards", "for each layer")
    known = [parts for parts in ranks.gather(begun) if parts is not None]
    return wanted or (known[0] if known else source.ranks_per_layer or ranks.size)


def forward_threads(
    folder: OutputFolder, ranks: Ranks, wanted: int | None, overwrite: bool
) -> int | None:
    """Threads of a calibration's matrix products, which what is found may depend on: as it is
    wanted, or as an unfinished run has begun, or as the first rank has them; None for its own."""
    begun = _begun(folder, overwrite, "calibration", "threads")
    every = ranks.gather([begun, torch.get_num_threads()])
    known = [threads for threads, _ in every if threads is not None]
    return wanted or (known[0] if known else every[0][1] if ranks.size > 1 else None)


def _begun(folder: OutputFolder, overwrite: bool, *names: str) -> int | None:
    """A number that an unfinished run has begun with."""
    if overwrite or not folder.state.has_finished_shards:
        return None
    try:
        value: Any = folder.state.identity or {}
        for name in names:
            value = value[name]
        return int(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def take_share(
    plan: Plan,
    source: Source,
    folder: OutputFolder,
    identity: Mapping[str, Any] | None,
    ranks: Ranks,
    *,
    overwrite: bool,
    threads: int,
) -> Share:
    """Take OUT, read what is finished there, and share out the rest."""
    _check_same(ranks, identity or _plan_of(plan))
    leaders = _take_folders(folder, ranks)
    is_leader = leaders[ranks.rank] == ranks.rank
    if is_leader:
        folder.begin(identity, plan.files, overwrite=overwrite)
    finished = ranks.gather(_finished(folder, plan, threads) if is_leader else [])
    done = {name for names in finished for name in names}
    kept = StatisticsStore(folder.state.statistics).load()
    common = set.intersection(*map(set, ranks.gather(list(kept))))
    kept = {unit: statistics for unit, statistics in kept.items() if unit in common}

    def nearness(shard: Shard) -> Sequence[int] | None:
        return source.rank_affinity(slab for job in shard.jobs for slab in slabs_of(job))

    unfinished = [number for number, name in enumerate(plan.shard_names) if name not in done]
    mine = deal(plan.shards, unfinished, ranks.size, nearness)[ranks.rank]
    return Share(mine, len(done), kept, leaders)


def _plan_of(plan: Plan) -> dict[str, Any]:
    """What ranks must have the same, where the source is no folder."""
    recipe: Any = json.loads(json.dumps(plan.recipe.model_dump(mode="json")))
    return {"versions": versions(), "recipe": recipe, "plan": plan.digest}


def _check_same(ranks: Ranks, identity: Mapping[str, Any]) -> None:
    """Raise where ranks were given another source or recipe, or run other versions."""
    if ranks.size == 1:
        return
    every = ranks.gather(without_times(identity) if "source" in identity else dict(identity))
    for rank, other in enumerate(every):
        different = [what for what in other if other[what] != every[0][what]]
        if different:
            raise FourfoldError(
                f"rank {rank} has another {' and another '.join(different)} than rank 0. "
                "Give every rank the same checkpoint, options and versions."
            )


def _take_folders(folder: OutputFolder, ranks: Ranks) -> list[int]:
    """By rank, the leader of those that see the same folder; it is theirs afterwards."""
    token = ranks.gather(uuid4().hex)[0]
    leaders: list[int | None] = [None] * ranks.size
    while None in leaders:
        first = leaders.index(None)
        if ranks.rank == first:
            folder.lock(token)
        ranks.gather("locked")
        is_mine = ranks.rank == first or _sees(folder.folder, first, folder, token)
        for rank, sees in enumerate(ranks.gather(is_mine)):
            if sees and leaders[rank] is None:
                leaders[rank] = first
    found = [leader for leader in leaders if leader is not None]
    if found[ranks.rank] != ranks.rank:
        folder.lock(token)
    ranks.gather("taken")
    return found


def _sees(out: Path, rank: int, folder: OutputFolder, token: str) -> bool:
    for path in (out.parent, out):  # asks a network's file system what is there by now
        if path.is_dir():
            os.listdir(path)
    return folder.state.token_of(rank) == token


def _finished(folder: OutputFolder, plan: Plan, threads: int) -> list[str]:
    """The shards with a record whose files still have the recorded digest."""
    records = folder.state.finished_shards()
    names = [name for name in plan.shard_names if name in records]
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(digest_of_file, (folder.folder / name for name in names))
        return [
            name
            for name, digest in zip(names, digests, strict=True)
            if digest is not None and digest == records[name].get("digest")
        ]


def check_whole(out: Path, plan: Plan, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where a shard is missing, or is not what the plan says: the last look at OUT."""
    for name, shard in zip(plan.shard_names, plan.shards, strict=True):
        if name not in entries:
            raise FourfoldError(
                f"{out / name}: planned, but no rank wrote it. "
                "This is a defect of fourfold; please report it."
            )
        found = read_header(out / name)
        if {key: (info.dtype, info.shape) for key, info in found.items()} != shard.tensors:
            raise FourfoldError(
                f"{out / name}: holds other tensors than planned. "
                "Does another program write into the folder?"
            )
