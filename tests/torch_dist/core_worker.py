# SPDX-License-Identifier: Apache-2.0
"""A rank of Megatron jobs: `python -m torch_dist.core_worker JOBS.json RANK`.

Each job builds a model, fills it (at random, or from what an earlier job saved), saves it, and
writes its logits beside it. Jobs with fewer ranks leave the others out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main() -> None:
    jobs, rank = Path(sys.argv[1]), int(sys.argv[2])
    from .core_models import (
        Ranks,
        build,
        load,
        logits,
        mtp_states,
        randomize,
        save,
        start,
        stop,
        training_arguments,
    )

    torch.set_num_threads(1)
    for number, job in enumerate(json.loads(jobs.read_text())):
        ranks = Ranks(**job["ranks"])
        if rank >= ranks.world:
            continue
        start(ranks, rank, jobs.parent / f"store{number}")
        hf, options, out = job["hf"], job["options"], Path(job["out"])
        model = build(hf, ranks, options)
        if job.get("load"):
            load(model, Path(job["load"]), options)
        else:
            randomize(model)
        save(model, out, options, training_arguments(model, hf))
        ids = torch.arange(24).reshape(2, 12) * 7 % hf["vocab_size"]
        found = logits(model, ids, hf["hidden_size"])
        if found is not None and rank == ranks.world - 1:
            torch.save(found.clone(), out.parent / f"{out.name}.logits.pt")
        if options.get("mtp"):
            found = mtp_states(model, ids, hf["hidden_size"])
            if found is not None and rank == ranks.world - 1:
                torch.save(found.clone(), out.parent / f"{out.name}.mtp.pt")
        stop()


if __name__ == "__main__":
    main()
