# SPDX-License-Identifier: Apache-2.0
"""This checkout's CPU figures as ratios to another's: `python benchmarks/against.py OTHER`.

    git worktree add ../other v0.2.0
    python benchmarks/against.py ../other [--rounds 3] [--million 16] [--layers 4]

Each round runs `cpu_sweep.py` and `synthetic.py` of both checkouts, one after the other, with this
interpreter, so that a machine that slows down is slow for both. Reported are medians of the
rounds, as this / other: rates above 1 and seconds below 1 are gains.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent

SECONDS = ("kernel", "verify", "copy_warm", "job_warm", "copy_cold", "job_cold")
"""The figures of `synthetic.py` in seconds; `copy_…` tells how even the rounds are."""

MEMORY = ("peak_job_gb", "peak_with_verify_gb")


def run(checkout: Path, script: str, *arguments: object) -> None:
    """Run a benchmark of a checkout with that checkout's own code."""
    subprocess.run(
        [sys.executable, checkout / "benchmarks" / script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(checkout / "src")},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def sweep(checkout: Path, scratch: Path, million: int) -> dict[str, float]:
    """Million weights a second of CPU time, by pass, kind of weights and threads."""
    run(checkout, "cpu_sweep.py", "--million", million, "--json", "--out", scratch / "sweep.json")
    results: Mapping[str, Any] = json.loads((scratch / "sweep.json").read_text())["results"]
    return {
        f"{name} ({kind}, {threads} threads)": rates["cpu"]
        for kind, result in results.items()
        for threads in ("1", "2")
        for name, rates in result[threads].items()
        if "cpu" in rates
    }


def job(checkout: Path, scratch: Path, layers: int) -> dict[str, float]:
    """Seconds and GB of the whole job."""
    figures = scratch / "job.json"
    folder = scratch / "synthetic"
    run(
        checkout, "synthetic.py", "--layers", layers, "--folder", folder, "--json", figures,
        "--runs", 2, "--keep",
    )  # fmt: skip
    values: Mapping[str, Any] = json.loads(figures.read_text())
    current = {name.replace("fold_", "job_"): value for name, value in values.items()}  # 0.2.0
    return {name: float(current[name]) for name in (*SECONDS, *MEMORY)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million", type=int, default=16, help="weights of a sweep, in millions")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the synthetic checkpoint is written")
    options = parser.parse_args()
    checkouts = (HERE, options.other.resolve())
    figures: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for number in range(options.rounds):
            for checkout in checkouts if number % 2 == 0 else reversed(checkouts):
                rates = sweep(checkout, Path(folder), options.million)
                figures[checkout].append(rates | job(checkout, Path(folder), options.layers))
    ours, theirs = (medians(figures[checkout]) for checkout in checkouts)
    print(f"{'':48}{'this':>10}{'other':>10}{'ratio':>8}")
    for name, value in ours.items():
        print(f"{name:48}{value:>10.2f}{theirs[name]:>10.2f}{value / theirs[name]:>8.3f}")


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


if __name__ == "__main__":
    main()
