# SPDX-License-Identifier: Apache-2.0
"""A rank of jobs on live Megatron models: `python -m torch_dist.core_live JOBS.json RANK`.

Each job builds a model and fills it, at random or from what an earlier job saved; saves it, or
quantizes it as it is. What came of it on a rank lies beside OUT, as `OUT.<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs import flat

PATIENCE = 60


class Wrapper(nn.Module):
    """A model inside of another module, as in DDP and Float16Module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def main() -> None:
    jobs, rank = Path(sys.argv[1]), int(sys.argv[2])
    from .core_models import Ranks, start, stop

    torch.set_num_threads(1)
    for number, job in enumerate(json.loads(jobs.read_text())):
        ranks = Ranks(**job["ranks"])
        if rank < ranks.world:
            start(ranks, rank, jobs.parent / f"store{number}")
            run(job, ranks, rank)
            stop()
    leave(jobs.parent, rank)


def run(job: dict[str, Any], ranks: Any, rank: int) -> None:
    from .core_models import build, load, randomize, save

    options = job["options"]
    chunks = [build(job["hf"], ranks, options, stage) for stage in range(ranks.vp)]
    for chunk in chunks:
        if options.get("bf16"):
            chunk.bfloat16()
    if job.get("load"):
        load(chunks, Path(job["load"]), options)
    else:
        randomize(chunks[0])
        save(chunks[0], Path(job["save"]), options)
    if job.get("out"):
        quantize([Wrapper(chunk) for chunk in chunks] if ranks.vp > 1 else chunks[0], job, rank)


@torch.no_grad()
def spoil(model: Any, how: str, rank: int) -> None:
    """Damage the model in a way that every rank must notice."""
    if rank != 1:
        return
    parameters = dict(model.named_parameters())
    experts = next(name for name in parameters if "experts.linear_fc2.weight" in name)
    match how:
        case "not finite":
            parameters[experts].view(-1)[7] = torch.nan
        case "replica":
            parameters["decoder.layers.0.mlp.router.weight"][0, 0] += 1
        case "adapter":
            model.decoder.layers[0].adapter = nn.Linear(2, 2)
        case "meta":
            model.decoder.layers[0].mlp.router.to("meta")


def die(event: Any) -> None:
    """End this process without a word, once it has written a shard."""
    from fourfold.events import ShardWritten

    if isinstance(event, ShardWritten):
        os._exit(0)


def quantize(model: Any, job: dict[str, Any], rank: int) -> None:
    import fourfold

    out = Path(job["out"])
    given = {**job["given"], **job.get("ranks_given", {}).get(str(rank), {})}
    if "spoiled" in job:
        spoil(model, job["spoiled"], rank)
    if job.get("spoiled") == "dead" and rank == 1:
        given["on_event"] = die
    try:
        result = fourfold.quantize(model, out, **flat(**given))
        found: dict[str, Any] = {
            "clean": result.report is None or result.clean,
            "verified": result.report is not None,
            "linears": len(result.linears),
        }
    except Exception as error:
        found = {"error": type(error).__name__, "text": str(error)}
    out.with_name(f"{out.name}.{rank}.json").write_text(json.dumps(found))
    if job.get("spoiled") == "dead":
        os._exit(0)


def leave(folder: Path, rank: int) -> None:
    """Exit when all ranks are here, without torch's teardown of gloo, which sometimes hangs."""
    from .core_models import Ranks

    (folder / f"left{rank}").touch()
    jobs = json.loads((folder / "jobs.json").read_text())
    size = max(Ranks(**job["ranks"]).world for job in jobs)
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob("left*"))) < size and time.monotonic() < end:
        time.sleep(0.05)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
