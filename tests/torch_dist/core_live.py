"""A rank of jobs on live Megatron models: `python -m torch_dist.core_live JOBS.json RANK`.

Each job builds a model, fills it (at random, or from what an earlier job saved), and does what it
is asked to: save it, or quantize it. What was raised lies beside OUT, as `raised<rank>`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    jobs, rank = Path(sys.argv[1]), int(sys.argv[2])
    from .core_models import Ranks, build, load, randomize, save, start, stop

    torch.set_num_threads(1)
    everything = json.loads(jobs.read_text())
    for number, job in enumerate(everything):
        ranks = Ranks(**job["ranks"])
        if rank >= ranks.world:
            continue
        start(ranks, rank, jobs.parent / f"store{number}")
        model = build(job["hf"], ranks, job["options"])
        if job.get("load"):
            load(model, Path(job["load"]), job["options"])
        else:
            randomize(model)
        if job.get("save"):
            save(model, Path(job["save"]), job["options"])
        else:
            quantize(model, job, rank)
        stop()
    sys.stdout.flush()
    os._exit(0)


def quantize(model: Any, job: dict[str, Any], rank: int) -> None:
    import fourfold

    out = Path(job["out"])
    try:
        result = fourfold.quantize(
            model, out, job["recipe"], hf_config=Path(job["hf_folder"]), **job.get("given", {})
        )
    except fourfold.FourfoldError as error:
        out.with_name(f"{out.name}.raised{rank}").write_text(f"{type(error).__name__}: {error}")
        return
    if rank == 0:
        assert result.clean, result.report


if __name__ == "__main__":
    main()
