# SPDX-License-Identifier: Apache-2.0
"""The whole job on a synthetic checkpoint with the shapes of Qwen3.6-35B-A3B.

    python benchmarks/synthetic.py [--layers 4] [--folder DIR] [--threads N] [--json FILE]

Writes DIR/model (hidden 2048, 256 experts of 512, top-8, shared expert; every layer holds 805
million expert weights), then measures in one run, each the median of several:

    copy     plain reads of all input bytes and plain writes of all output bytes, synced
    kernel   search and pack alone, over the experts of one layer in memory, times the layers
    job      the work of `quantize` after the plan: read, search, pack, write, sync
    verify   reading the output back and comparing it with the source

and the peak resident memory of the job in a process of its own, above that of its imports.
`warm`: the input lies in the page cache; `cold`: it was dropped from it before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.config import OutputConfig, Runtime

if TYPE_CHECKING:
    from fourfold import Plan
    from fourfold.storage.source import Source

RECIPE = "w4a16_nvfp4_experts_only_mse"
CHUNK = 1 << 24


def make(folder: Path, layers: int, experts: int = 256) -> None:
    """Write the checkpoint, a shard for each layer, with upstream's names (fused experts)."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3_5MoeTextConfig

    folder.mkdir(parents=True)
    config = Qwen3_5MoeTextConfig(
        hidden_size=2048, num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=8,
        moe_intermediate_size=512, shared_expert_intermediate_size=512, vocab_size=32768,
        num_attention_heads=16, num_key_value_heads=2, head_dim=256,
        architectures=["Qwen3_5MoeForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = _shapes(config)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for unit in sorted({_unit(name) for name in shapes}):
        tensors = {
            name: torch.empty(shape).normal_(0, 0.02, generator=generator).to(torch.bfloat16)
            for name, shape in shapes.items()
            if _unit(name) == unit
        }
        file = f"model-{unit:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        print(f"  wrote {file}", file=sys.stderr)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shapes(config: object) -> dict[str, tuple[int, ...]]:
    from accelerate import init_empty_weights
    from transformers import Qwen3_5MoeForCausalLM

    with init_empty_weights(include_buffers=False):
        model = Qwen3_5MoeForCausalLM._from_config(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def _unit(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) + 1 if "layers" in parts else 0


def drop_cache(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_bytes(model: Path, scratch: Path, nbytes_out: int) -> None:
    """Read every byte of the model; write as many as the output has, synced."""
    buffer = bytearray(CHUNK)
    left = nbytes_out
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    share = nbytes_out / total
    with scratch.open("wb", buffering=0) as target:
        for path in sorted(model.glob("*.safetensors")):
            with path.open("rb", buffering=0) as handle:
                while count := handle.readinto(buffer):
                    piece = min(left, int(count * share) + 1)
                    target.write(memoryview(buffer)[:piece])
                    left -= piece
        os.fsync(target.fileno())
    scratch.unlink()


def kernel_alone(threads: int) -> float:
    """Seconds for search and pack of one layer's experts, in memory, codes and scales kept."""
    import numpy as np
    import torch

    from fourfold.formats import nvfp4

    weight = torch.empty(256 * 3 * 512, 2048).normal_(0, 0.02).to(torch.bfloat16)
    codes = np.zeros((weight.shape[0], 1024), dtype=np.uint8)
    scales = np.zeros((weight.shape[0], 128), dtype=np.uint8)
    s = nvfp4.global_scale(nvfp4.amax(weight))

    def piece(first: int) -> None:
        rows = slice(first, first + 512)
        nvfp4.quantize_into(weight[rows], codes[rows], scales[rows], scale="mse", global_scale=s)

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(piece, range(0, weight.shape[0], 512)))

    run()
    return median(run, 5)


def median(
    function: Callable[[], object], runs: int, before: Callable[[], None] = lambda: None
) -> float:
    """Median wall seconds of `function`."""
    taken = []
    for _ in range(runs):
        before()
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def run_job(work: Plan, source: Source, out: Path, threads: int) -> None:
    """The work of `quantize` after the plan."""
    from fourfold.execution import ExecutionContext, Scheduler
    from fourfold.storage.output import OutputFolder

    target = OutputFolder(out, overwrite=True)
    target.lock("benchmark")
    target.begin(None, work.files)
    with Scheduler(ExecutionContext(work, source, target, threads)) as job:
        job.run()
        job.finish()
    target.state.release()


def memory_of_job(model: Path, out: Path, threads: int) -> tuple[float, float]:
    """Peak resident GB of the job in a process of its own, and of its imports and plan alone."""
    program = (
        "import sys; from fourfold import OutputConfig, Runtime, api\n"
        "from fourfold.distributed.machine import peak_resident\n"
        "base = peak_resident()\n"
        f"api.quantize({str(model)!r}, {str(out)!r}, {RECIPE!r}, "
        f"runtime=Runtime(threads={threads}), "
        "output=OutputConfig(overwrite=True, verify=sys.argv[1] == 'verified'))\n"
        "print(base / 1e9, peak_resident() / 1e9)"
    )
    peaks = []
    for mode in ("plain", "verified"):
        done = subprocess.run(
            [sys.executable, "-c", program, mode], capture_output=True, text=True, check=True
        )
        base, peak = map(float, done.stdout.split())
        peaks.append(peak - base)
    return peaks[0], peaks[1]


def measure(folder: Path, layers: int, threads: int, runs: int) -> dict[str, float | int | str]:
    """All figures, in seconds and GB."""
    from fourfold.api import plan, quantize
    from fourfold.sources.safetensors import open_source
    from fourfold.verification import verify

    model, out = folder / "model", folder / "out"
    work = plan(model, RECIPE)
    source = open_source(model)

    def copy() -> None:
        copy_bytes(model, folder / "scratch", work.nbytes_after)

    quantize(
        model, out, RECIPE, runtime=Runtime(threads=threads), output=OutputConfig(overwrite=True)
    )  # compiles, warms the cache
    kernel = kernel_alone(threads) * layers
    figures: dict[str, float | int | str] = {"kernel": kernel}
    figures["verify"] = median(lambda: verify(out, source=source, threads=threads), 3)
    for state in ("warm", "cold"):
        before = (lambda: drop_cache(model)) if state == "cold" else (lambda: None)
        copied, finished = [], []
        for _ in range(runs):  # in turn, so that a drift of the machine meets both
            copied.append(median(copy, 1, before))
            finished.append(median(lambda: run_job(work, source, out, threads), 1, before))
        figures[f"copy_{state}"] = statistics.median(copied)
        figures[f"job_{state}"] = statistics.median(finished)
        bound = max(figures[f"copy_{state}"], kernel)
        figures[f"ratio_{state}"] = figures[f"job_{state}"] / bound
    plain, verified = memory_of_job(model, out, threads)
    figures |= {"peak_job_gb": plain, "peak_with_verify_gb": verified}
    figures |= {
        "layers": layers, "threads": threads, "input_gb": work.nbytes / 1e9,
        "output_gb": work.nbytes_after / 1e9,
        "weights": sum(x.shape[0] * x.shape[1] for x in work.linears),
        "cpu": _cpu(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    return figures


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor()}, {os.cpu_count()} cores"


def report(figures: dict[str, float | int | str]) -> str:
    lines = [
        f"{figures['layers']} layers, {figures['weights']:,} expert weights, "
        f"{figures['input_gb']:.2f} GB in, {figures['output_gb']:.2f} GB out, "
        f"{figures['threads']} threads, {figures['cpu']}, {figures['date']}",
        f"{'':8}{'copy':>9}{'kernel':>9}{'job':>9}   job / max(copy, kernel)",
    ]
    for state in ("warm", "cold"):
        lines.append(
            f"{state:8}{figures[f'copy_{state}']:8.2f}s{figures['kernel']:8.2f}s"
            f"{figures[f'job_{state}']:8.2f}s   {figures[f'ratio_{state}']:.2f}"
        )
    rate = float(figures["weights"]) / float(figures["job_warm"]) / 1e6
    lines.append(
        f"job {rate:,.0f} M weights/s warm · verify against the source {figures['verify']:.2f}s · "
        f"peak resident above imports: job {figures['peak_job_gb']:.2f} GB, "
        f"with verify {figures['peak_with_verify_gb']:.2f} GB"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("bench-synthetic"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint afterwards")
    options = parser.parse_args()
    model = options.folder / "model"
    if not (model / "model.safetensors.index.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        make(model, options.layers)
    figures = measure(options.folder, options.layers, options.threads, options.runs)
    print(report(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
