# SPDX-License-Identifier: Apache-2.0
"""How fast the CPU kernels are, on this machine, now: `python benchmarks/cpu_sweep.py`.

First the pruned search is checked against the full one, byte for byte, and a sample of both against
the PyTorch reference; then every pass is timed on bf16 weights, Gaussian and heavy-tailed
(Student-t, 3 degrees of freedom), on one thread and on two. All passes write codes and scales.

Passes take turns, round after round, so that a noisy machine is noisy for all of them. Reported
are medians: million weights a second by wall clock, and by the CPU time of the threads (what a
machine with nothing else to do would give), which other programs disturb less. JSON goes to stdout
with --json, or to a file with --out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from fourfold.formats.nvfp4 import amax, cpu, dequantize, global_scale, quantize
from fourfold.formats.nvfp4.sweep import MAX, MSE, MSE_FULL

WIDTH = 4096
SAMPLE = 1 << 20  # weights for the PyTorch reference, and for the check against it


class Job:
    """A weight, its buffers, and the passes over a range of its rows."""

    def __init__(self, weight: torch.Tensor) -> None:
        rows = weight.shape[0]
        self.weight = weight
        self.scale = global_scale(amax(weight))
        self.codes = torch.zeros(rows, WIDTH // 2, dtype=torch.uint8)
        self.scales = torch.zeros(rows, WIDTH // 16, dtype=torch.uint8)
        self.copy = torch.empty_like(weight)

    def search(self, rows: slice, algorithm: int) -> int:
        parts = self.weight[rows], self.codes[rows], self.scales[rows]
        return cpu.quantize(*parts, self.scale, algorithm)[2]

    def passes(self) -> dict[str, Callable[[slice], Any]]:
        return {
            "mse pruned": lambda rows: self.search(rows, MSE),
            "mse full": lambda rows: self.search(rows, MSE_FULL),
            "max": lambda rows: self.search(rows, MAX),
            "amax": lambda rows: cpu.amax(self.weight[rows]),
            "dequantize bf16": lambda rows: cpu.dequantize(
                self.codes[rows], self.scales[rows], self.scale, self.copy[rows]
            ),
            "error energy": lambda rows: cpu.error_energy(
                self.weight[rows], self.codes[rows], self.scales[rows], self.scale
            ),
            "copy": lambda rows: np.copyto(
                self.copy[rows].view(torch.int16).numpy(),
                self.weight[rows].view(torch.int16).numpy(),
            ),
        }


def make_weight(kind: str, million: int) -> torch.Tensor:
    rng = np.random.default_rng(7)
    shape = (million * 1_000_000 // WIDTH, WIDTH)
    if kind == "gaussian":
        values = rng.standard_normal(shape, np.float32) * 0.02
    else:
        values = (rng.standard_t(3, shape) * 0.02).astype(np.float32)
    return torch.from_numpy(values).to(torch.bfloat16)


def check(job: Job) -> str:
    """The equality of pruned search, full search and reference; returns a line that says so."""
    everything = slice(None)
    settled = job.search(everything, MSE)
    pruned = job.codes.clone(), job.scales.clone()
    job.search(everything, MSE_FULL)
    rows = slice(0, SAMPLE // WIDTH)
    made = quantize(job.weight[rows], scale="mse", global_scale=job.scale, kernel="reference")
    same = torch.equal(pruned[0], job.codes) and torch.equal(pruned[1], job.scales)
    same &= torch.equal(pruned[0][rows], made.codes)
    same &= torch.equal(pruned[1][rows], made.block_scale.view(torch.uint8))
    if not same:
        sys.exit("the pruned search and the full search differ: nothing to time")
    blocks = job.scales.numel()
    return f"{blocks:,} blocks equal; 1 in {blocks // max(settled, 1):,} settled by the definition"


def timed(work: Callable[[slice], Any], rows: int, threads: int) -> tuple[float, float]:
    """Wall seconds and CPU seconds of one pass over all rows."""
    step = (rows + threads - 1) // threads
    slices = [slice(start, start + step) for start in range(0, rows, step)]

    def part(piece: slice) -> float:
        start = time.thread_time()
        work(piece)
        return time.thread_time() - start

    start = time.perf_counter()
    if threads == 1:
        spent = part(slices[0])
        return time.perf_counter() - start, spent
    with ThreadPoolExecutor(threads) as pool:
        spent = sum(pool.map(part, slices))
    return time.perf_counter() - start, spent


def measure(job: Job, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    rows, numel = job.weight.shape[0], job.weight.numel()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in job.passes()}
    for _ in range(rounds):
        for name, work in job.passes().items():
            seconds[name].append(timed(work, rows, threads))
    return {
        name: {
            "wall": numel / 1e6 / statistics.median(wall for wall, _ in runs),
            "cpu": threads * numel / 1e6 / statistics.median(spent for _, spent in runs),
        }
        for name, runs in seconds.items()
    }


def measure_reference(job: Job) -> dict[str, float]:
    sample = job.weight[: SAMPLE // WIDTH // 4]
    start = time.perf_counter()
    quantize(sample, scale="mse", global_scale=job.scale, kernel="reference")
    return {"wall": sample.numel() / 1e6 / (time.perf_counter() - start)}


def machine() -> dict[str, Any]:
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else [platform.processor()]
    )
    return {
        "cpu": names[0],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "torch": torch.__version__,
    }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'':18}" + "".join(f"{kind:>32}" for kind in results)]
    columns = "".join(f"{name:>8}" for name in ("1 cpu", "1 wall", "2 cpu", "2 wall"))
    lines.append(f"{'M weights/s':18}" + columns * len(results))
    names = list(next(iter(results.values()))["1"])
    for name in names:
        line = f"{name:18}"
        for result in results.values():
            one, two = result["1"][name], result["2"].get(name, {})
            figures = one.get("cpu"), one["wall"], two.get("cpu"), two.get("wall")
            shown = [f"{v:,.0f}" if v and v > 10 else f"{v:.2f}" if v else "–" for v in figures]
            line += "".join(f"{v:>8}" for v in shown)
        lines.append(line)
    for kind, result in results.items():
        lines.append(f"{kind}: pruned / full = {result['ratio']:.1f} (CPU time, one thread)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--million", type=int, default=16, help="weights, in millions")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    say = (lambda *_: None) if options.json else print
    for kind in ("gaussian", "student-t"):
        job = Job(make_weight(kind, options.million))
        dequantize(job.codes[:1], job.scales[:1], job.scale)
        say(f"{kind}: {check(job)}")
        result: dict[str, Any] = {str(n): measure(job, options.rounds, n) for n in (1, 2)}
        result["1"]["pytorch reference"] = measure_reference(job)
        one = result["1"]
        result["ratio"] = one["mse pruned"]["cpu"] / one["mse full"]["cpu"]
        results[kind] = result
    document = {"machine": machine(), "weights": options.million * 1_000_000, "results": results}
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        print(f"\n{table(results)}\n\n{json.dumps(document)}")


if __name__ == "__main__":
    main()
