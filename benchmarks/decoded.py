# SPDX-License-Identifier: Apache-2.0
"""What it costs to quantize an FP8 checkpoint instead of the BF16 one of the same values.

    python benchmarks/decoded.py [--layers 4] [--experts 256] [--folder DIR] [--threads N]

Writes the checkpoint of `synthetic.py` (the shapes of Qwen3.6-35B-A3B) and its twin in FP8, with
a float32 scale for each 128×128 weights. The jobs of both run in turn, so that a drift of the
machine meets both: the work of `quantize` after the plan, without verification. Reported are
medians, and the peak resident memory of each job above that of its imports, in a process of its
own. FP8 should take at most 1.3 times the time, and at most 0.1 GB more memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from synthetic import RECIPE, drop_cache, make, memory_of_job, run_job
from torch import Tensor

BLOCK = 128
KEPT = ("embed_tokens", "lm_head", "norm", "conv1d", "mlp.gate.", "shared_expert_gate")
FORMS = ("bf16", "fp8")


def write_fp8(model: Path, folder: Path) -> None:
    """Write the checkpoint with its linear weights in FP8, shard by shard."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weight_map: dict[str, str] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for key, value in load_file(file).items():
            if value.ndim < 2 or any(part in key for part in KEPT):
                tensors[key] = value
                continue
            scale = f"{key.removesuffix('weight')}weight_scale_inv"
            if not key.endswith(".weight"):
                scale = f"{key}_scale_inv"
            tensors[key], tensors[scale] = in_blocks(value)
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        print(f"  wrote {file.name} in FP8", file=sys.stderr)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config))


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [..., rows, columns], and a float32 scale for each block."""
    matrices = weight.reshape(-1, *weight.shape[-2:])
    pairs = [_matrix_in_blocks(matrix) for matrix in matrices]
    codes, scales = (torch.stack(part) for part in zip(*pairs, strict=True))
    lead = weight.shape[:-2]
    return codes.reshape(weight.shape), scales.reshape(*lead, *scales.shape[-2:])


def _matrix_in_blocks(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = blocks.abs().amax((-1, -3)).clamp(min=1e-12) / 448
    codes = (blocks / scales[:, None, :, None]).flatten(0, 1).flatten(-2)
    return codes[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scales


def measure(folder: Path, threads: int, runs: int) -> dict[str, float]:
    """Nanoseconds for a quantized weight, and GB of memory, of each form.

    The time is wall time, warm and cold, and CPU time of all threads together, which other programs
    on the machine disturb less.
    """
    from fourfold.api import plan
    from fourfold.sources.opening import open_model

    plans = {form: plan(folder / form, RECIPE) for form in FORMS}
    sources = {form: open_model(folder / form) for form in FORMS}

    def job(form: str) -> None:
        run_job(plans[form], sources[form], folder / "out", threads)

    for form in FORMS:  # compiles, and warms the page cache
        job(form)
    figures: dict[str, float] = {}
    weights = sum(linear.shape[0] * linear.shape[1] for linear in plans["bf16"].linears)
    for state in ("warm", "cold"):
        wall: dict[str, list[float]] = {form: [] for form in FORMS}
        cpu: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(runs):
            for form in FORMS:
                if state == "cold":
                    drop_cache(folder / form)
                begun, used = time.perf_counter(), time.process_time()
                job(form)
                wall[form].append(time.perf_counter() - begun)
                cpu[form].append(time.process_time() - used)
        for form in FORMS:
            figures[f"{form}_{state}"] = statistics.median(wall[form]) / weights * 1e9
            figures[f"{form}_{state}_cpu"] = statistics.median(cpu[form]) / weights * 1e9
    for form in FORMS:
        sources[form].close()
        figures[f"{form}_gb"] = memory_of_job(folder / form, folder / "out", threads)[0]
    figures["weights"] = weights
    return figures


def report(figures: dict[str, float]) -> str:
    lines = [f"{figures['weights']:,} quantized weights, ns for each: BF16, FP8, ratio"]
    for state in ("warm", "warm_cpu", "cold", "cold_cpu"):
        bf16, fp8 = (figures[f"{form}_{state}"] for form in FORMS)
        lines.append(f"{state:9}{bf16:8.3f}{fp8:8.3f}{fp8 / bf16:8.2f}")
    bf16, fp8 = (figures[f"{form}_gb"] for form in FORMS)
    lines.append(f"{'peak GB':9}{bf16:8.2f}{fp8:8.2f}{fp8 - bf16:+8.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("bench-decoded"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints afterwards")
    options = parser.parse_args()
    if not (options.folder / "fp8" / "config.json").exists():
        shutil.rmtree(options.folder, ignore_errors=True)
        make(options.folder / "bf16", options.layers, options.experts)
        write_fp8(options.folder / "bf16", options.folder / "fp8")
    figures = measure(options.folder, options.threads, options.runs)
    print(report(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
