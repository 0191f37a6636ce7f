# SPDX-License-Identifier: Apache-2.0
"""How fast the GPU kernels are, on this machine, now: `python benchmarks/gpu_sweep.py`.

Needs torch, triton and numpy, and a CUDA device; fourfold need not be installed. First the pruned
search is checked against the full one, byte for byte, and both, in part, against the PyTorch
reference on the same device: every dtype, several distributions, odd sizes. Only then every pass is
timed on bf16 weights: 8192 × 4096, and 256 experts of 512 × 2048 with a global scale each, in one
launch. Each pass is captured as a CUDA graph that goes around and around buffers larger than the L2
cache, so neither the cache nor Python has a part in it; reported are medians of CUDA events. A copy
by the device of the same bytes is the measure. JSON goes to stdout with --json, or to a file with
--out.

`--rehearse` runs the script without a GPU, tiny and interpreted (set TRITON_INTERPRET=1), without
graphs and with the pruned search in place of the full one, which would take minutes: to see that
the script works, not how fast anything is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import triton

from fourfold.formats.nvfp4 import activations, cuda, reference, sweep

SHAPES = {"8192 x 4096": (1, 8192 * 4096), "256 x 512 x 2048": (256, 512 * 2048)}
TINY = {"8 x 64": (1, 512), "3 x 4 x 32": (3, 128)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_OVER_FULL, MOST_OVER_COPY = 8, 10  # what is aimed at
CALLS = 32  # in a graph, at least: starting one takes longer than a copy
FULL = sweep.MSE if cuda.INTERPRETED else sweep.MSE_FULL


class Buffers:
    """A weight [N, X] with its global scales, and what the passes write."""

    def __init__(self, weight_NX: torch.Tensor) -> None:
        count, width = weight_NX.shape
        device = weight_NX.device
        self.weight = weight_NX
        self.global_scales = cuda.amaxes(weight_NX) / 2688
        self.codes = torch.empty(count, width // 2, dtype=torch.uint8, device=device)
        self.scales = torch.empty(count, width // 16, dtype=torch.uint8, device=device)
        self.copy = torch.empty_like(weight_NX)
        # What quantizing reads and writes, half of it read and half written.
        moved = weight_NX.nbytes + self.codes.nbytes + self.scales.nbytes
        self.half, self.other_half = (
            torch.empty(moved // 2, dtype=torch.uint8, device=device) for _ in range(2)
        )

    def search(self, algorithm: int, packs: bool = True) -> None:
        codes = self.codes if packs else None
        cuda.quantize(self.weight, codes, self.scales, self.global_scales, algorithm)

    def passes(self) -> dict[str, Callable[[], Any]]:
        scale = float(self.global_scales[0])
        return {
            "mse pruned": lambda: self.search(sweep.MSE),
            "mse pruned, scales alone": lambda: self.search(sweep.MSE, False),
            "mse full": lambda: self.search(FULL),
            "mse full, scales alone": lambda: self.search(FULL, False),
            "max": lambda: self.search(sweep.MAX),
            "amax": lambda: cuda.amaxes(self.weight),
            "dequantize bf16": lambda: cuda.dequantize(self.codes, self.scales, scale, self.copy),
            "round activations": lambda: cuda.fake_quantize(self.weight, scale, self.copy),
            "copy of the same bytes": lambda: self.other_half.copy_(self.half),
            "copy of the weight": lambda: self.copy.copy_(self.weight),
        }


def distributions(count: int, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """float32 [count·16] of several kinds, none above 2688 (a global scale of 1)."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(count, 16, generator=generator, device=device)

    scales = torch.arange(1, 127, device=device).to(torch.uint8).view(torch.float8_e4m3fn).float()
    of_block = scales[torch.randint(126, (count, 1), generator=generator, device=device)]
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0], device=device)
    one_of_8 = torch.randint(8, (count, 16), generator=generator, device=device)
    chi = (draw() ** 2 + draw() ** 2 + draw() ** 2) / 3
    found = {
        "gaussian": draw() * 500,
        "student-t": draw() / chi.sqrt() * 30,
        "subnormal scales": draw() * 2.0**-9,
        "wide range": torch.exp2(draw() * 8) * draw().sign(),
        "on the grid": grid[one_of_8] * of_block * draw().sign(),
        "on halfway points": halves[one_of_8] * of_block * draw().sign(),
        "one value": draw()[:, :1].expand(-1, 16) * 100,
        "zeros": torch.zeros(count, 16, device=device),
    }
    return {name: values.clamp(-2688, 2688).flatten() for name, values in found.items()}


def check(device: torch.device, count: int, sample: int) -> str:
    """The equality of pruned search, full search and reference; returns a line that says so."""
    blocks = 0
    for seed, dtype in enumerate(DTYPES):
        for name, values in distributions(count + 1 + 2 * seed, device, seed).items():
            buffers = Buffers(values.to(dtype).view(1, -1))
            buffers.global_scales = torch.ones(1, device=device)
            buffers.search(sweep.MSE)
            pruned = buffers.codes.clone(), buffers.scales.clone()
            buffers.search(FULL)
            if not all(map(torch.equal, pruned, (buffers.codes, buffers.scales))):
                sys.exit(f"{name}, {dtype}: pruned and full search differ: not timed")
            part = buffers.weight[0, : sample * 16]
            expected = reference.quantize(part.view(-1, 16), 1.0, mse=True)
            shown = pruned[0][0, : sample * 8].view(-1, 8), pruned[1][0, :sample].view(-1, 1)
            if not all(map(torch.equal, shown, expected)):
                sys.exit(f"{name}, {dtype}: pruned search and reference differ: not timed")
            buffers.search(sweep.MAX)
            expected = reference.quantize(part.view(-1, 16), 1.0, mse=False)
            if not torch.equal(buffers.codes[0, : sample * 8].view(-1, 8), expected[0]):
                sys.exit(f"{name}, {dtype}: max and reference differ: not timed")
            blocks += count
    check_passes(device)
    return f"{blocks:,} blocks equal, pruned and full; {sample:,} of each kind to the reference"


def check_passes(device: torch.device) -> None:
    weight = torch.randn(64, 256, device=device).to(torch.bfloat16)
    buffers = Buffers(weight.view(1, -1))
    buffers.search(sweep.MSE)
    scale = float(buffers.global_scales[0])
    cuda.dequantize(buffers.codes, buffers.scales, scale, buffers.copy)
    fp8 = buffers.scales.view(torch.float8_e4m3fn)
    if not torch.equal(buffers.copy, reference.dequantize(buffers.codes, fp8, scale).bfloat16()):
        sys.exit("dequantize and reference differ: not timed")
    rounded = activations.fake_quantize(weight, scale, kernel="reference")
    if not torch.equal(rounded, activations.fake_quantize(weight, scale, kernel="triton")):
        sys.exit("rounding of activations and reference differ: not timed")


def milliseconds(passes: list[Callable[[], Any]], rounds: int) -> float:
    """Of one call: the median of `rounds`, each of which calls all of them, on their buffers."""
    for work in passes:
        work()
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for work in passes:
            work()
        return (time.perf_counter() - begin) * 1e3 / len(passes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    times = max(1, math.ceil(CALLS / len(passes)))
    with torch.cuda.graph(graph):
        for work in passes * times:
            work()
    graph.replay()
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / len(passes) / times)
    return statistics.median(found)


def measure(shape: tuple[int, int], device: torch.device, rounds: int, heavy: bool) -> dict:
    """Milliseconds of each pass."""
    sets = 1
    if torch.cuda.is_available():
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets = max(3, math.ceil(4 * cache / (2 * math.prod(shape))))
    generator = torch.Generator(device).manual_seed(7)
    made = []
    for _ in range(sets):
        values = torch.randn(shape, generator=generator, device=device)
        if heavy:
            chi = sum(torch.randn(shape, generator=generator, device=device) ** 2 for _ in "xyz")
            values /= (chi / 3).sqrt()
            del chi
        made.append(Buffers((values * 0.02).to(torch.bfloat16)))
    several = [buffers.passes() for buffers in made]
    return {name: milliseconds([passes[name] for passes in several], rounds) for name in several[0]}


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": str(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "tiles": {str(key): tile for key, tile in cuda._tuned.items()},
        }
    return found


def table(results: dict[str, dict[str, float]], shapes: dict[str, tuple[int, int]]) -> str:
    lines = [f"{'':26}" + "".join(f"{name:>36}" for name in results)]
    lines.append(f"{'':26}" + f"{'ms':>12}{'G weights/s':>13}{'× copy':>11}" * len(results))
    for name in next(iter(results.values())):
        line = f"{name:26}"
        for shown, result in results.items():
            weights = math.prod(shapes[shown.rsplit(",", 1)[0]])
            over = result[name] / result["copy of the same bytes"]
            line += f"{result[name]:>12.3f}{weights / result[name] / 1e6:>13,.0f}{over:>11.1f}"
        lines.append(line)
    return "\n".join(lines)


def ratios(result: dict[str, float]) -> dict[str, float]:
    return {
        "full / pruned": result["mse full"] / result["mse pruned"],
        "full / pruned, scales alone": result["mse full, scales alone"]
        / result["mse pruned, scales alone"],
        "pruned / copy of the same bytes": result["mse pruned"] / result["copy of the same bytes"],
        "pruned / copy of the weight": result["mse pruned"] / result["copy of the weight"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="of each kind, checked")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, see the head")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not (options.rehearse and cuda.INTERPRETED):
        sys.exit(
            "no CUDA device: nothing to time. To try the script alone: "
            "TRITON_INTERPRET=1 python benchmarks/gpu_sweep.py --rehearse"
        )
    device = torch.device("cpu" if options.rehearse else "cuda:0")
    shapes = TINY if options.rehearse else SHAPES
    say = (lambda *_: None) if options.json else print
    for packs in (True, False):
        for algorithm in (sweep.MSE, FULL, sweep.MAX):
            if packs or algorithm != sweep.MAX:
                cuda.tune(device, torch.bfloat16, algorithm, packs)
    say(check(device, *((9, 5) if options.rehearse else (options.blocks, 50_000))))
    results = {
        f"{name}, {kind}": measure(shape, device, options.rounds, kind == "student-t")
        for name, shape in shapes.items()
        for kind in ("gaussian", "student-t")
    }
    document = {
        "machine": machine(device),
        "milliseconds": results,
        "ratios": {name: ratios(result) for name, result in results.items()},
    }
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
        return
    print(f"\n{table(results, shapes)}\n")
    for name, found in document["ratios"].items():
        print(f"{name}: " + ", ".join(f"{what} {value:.1f}" for what, value in found.items()))
    print(f"aimed at: full / pruned at least {LEAST_OVER_FULL}, pruned / copy at most "
          f"{MOST_OVER_COPY}\n\n{json.dumps(document)}")  # fmt: skip


if __name__ == "__main__":
    main()
