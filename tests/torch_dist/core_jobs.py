# SPDX-License-Identifier: Apache-2.0
"""Runs jobs of megatron-core in processes of their own, and returns what they saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from families import FAMILIES

LIMIT = 240
"""Seconds after which a rank stops waiting for one that may have died."""


@dataclass(frozen=True)
class Case:
    """A model: a family's tiny configuration, changes to it, and Megatron's options."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        found = FAMILIES[self.family].build_config()
        if hasattr(found, "sliding_window"):
            found.sliding_window = None  # Megatron's model has none, and they are compared
        for name, value in self.changes.items():
            setattr(found, name, value)
        found.architectures = [FAMILIES[self.family].model_class]
        found.dtype = torch.float32
        return json.loads(json.dumps(found.to_dict(), default=str))


@dataclass(frozen=True)
class Ranks:
    """Parallel sizes; a job's ranks are processes."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    vp: int = 1

    @property
    def world(self) -> int:
        return max(self.tp, self.ep * self.etp) * self.pp * self.dp

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name, size in asdict(self).items() if size > 1]
        return "·".join(sizes) or "one"


@dataclass(frozen=True)
class Saved:
    """The output of the jobs of a case."""

    hf_config: Path
    checkpoints: dict[str, Path]
    logits: dict[str, torch.Tensor]
    mtp: dict[str, torch.Tensor]
    """The output of the MTP layers for the same batch, if the model has any."""


def run(case: Case, shardings: Sequence[Ranks], folder: Path) -> Saved:
    """Build the model of `case` on one rank, then save it again in each of `shardings`."""
    folder.mkdir(parents=True, exist_ok=True)
    every = [Ranks(), *shardings]
    places = {str(ranks): folder / str(ranks) for ranks in every}
    jobs = [
        {
            "hf": case.config(),
            "options": case.options,
            "ranks": asdict(ranks),
            "out": str(places[str(ranks)]),
            "load": str(places["one"]) if number else None,
        }
        for number, ranks in enumerate(every)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(folder / "jobs.json", max(ranks.world for ranks in every))
    hf = folder / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(case.config()))
    logits = {name: torch.load(folder / f"{name}.logits.pt") for name in places}
    mtp = {
        name: torch.load(folder / f"{name}.mtp.pt") for name in places if case.options.get("mtp")
    }
    return Saved(hf, places, logits, mtp)


def run_ranks(jobs: Path, world: int, worker: str = "core_worker") -> None:
    """Run a process for each rank; an error of one ends all of them."""
    outputs = [(jobs.parent / f"rank{rank}.txt").open("w+") for rank in range(world)]
    tests = Path(__file__).parent.parent
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{worker}", str(jobs), str(rank)],
            cwd=tests,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(LIMIT)
            outputs[rank].seek(0)
            assert code == 0, outputs[rank].read()[-4000:]
    finally:
        for process, output in zip(ranks, outputs, strict=True):
            if process.poll() is None:
                process.kill()
                process.wait()
            output.close()
