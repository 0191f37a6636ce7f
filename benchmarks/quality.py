# SPDX-License-Identifier: Apache-2.0
"""What quantization does to the embedded model, by recipe: KL with intervals, agreement, time.

    python benchmarks/quality.py [--seeds N] [--base NAME] [NAME …]

Each recipe is carried out as `fourfold quantize` does, and the output compared with its source on
held-out text as `fourfold eval` does: weights dequantized, for W4A4 inputs rounded as engines round
them, and keys and values where the recipe has a quantized KV cache. A recipe that calibrates is
carried out with several seeds, which choose and order the samples of the embedded mixed text. Shown
are the mean over seeds, the smallest and largest KL among them, the 95 % interval over windows of
text (the mean of its ends over seeds), the ratio to the recipe with `mse`, or to `--base`, with
its paired interval, and CPU seconds of a run.

Prints the tables of the README and of docs/recipes.md; with names, those rows alone. One thread, so
that the figures are the same everywhere.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fourfold import Recipe, evaluate, quantize
from fourfold.config import CalibrationConfig, EvaluationConfig, Runtime
from fourfold.embedded import heldout_text, model_dir
from fourfold.evaluation.demo import WINDOW
from fourfold.evaluation.evaluated import ModelFigures

BASES = {
    "w4a16_nvfp4_experts_only": "w4a16_nvfp4_experts_only_mse",
    "w4a16_nvfp4_default": "w4a16_nvfp4_default_mse",
    "nvfp4_experts_only": "nvfp4_experts_only_mse",
    "nvfp4_default": "nvfp4_default_mse",
}
"""What the recipes are compared with whose names begin so."""

RECIPES = (
    "w4a16_nvfp4_experts_only",
    "w4a16_nvfp4_experts_only_mse",
    "w4a16_nvfp4_default",
    "w4a16_nvfp4_default_mse",
    "w4a16_nvfp4_experts_only_gptq",
    "w4a16_nvfp4_experts_only_best",
    "w4a16_nvfp4_default_gptq",
    "w4a16_nvfp4_default_best",
    "nvfp4_experts_only",
    "nvfp4_experts_only_mse",
    "nvfp4_experts_only_mse-constant_inputs",
    "nvfp4_experts_only_mse-fp8_cast_kv",
    "nvfp4_default_max",
    "nvfp4_default_mse",
    "nvfp4_experts_only_gptq",
    "nvfp4_experts_only_best",
    "nvfp4_default_gptq",
    "nvfp4_default_best",
    "nvfp4_default_budget",
    "w4a16_nvfp4_default_budget",
    "nvfp4_default_mse-fp8_kv",
)
_INPUTS = ("activations: none", "activations: {format: nvfp4}")
ALGORITHMS = (
    "four_over_six", "mse_weighted", "local_hessian", "gptq", "gptq, descent: 2", "gptq_joint",
    "gptq_joint, descent: 2",
)  # fmt: skip
OWN = {
    "nvfp4_default_max": ("w4a16_nvfp4_default", *_INPUTS),
    "nvfp4_default_mse": ("w4a16_nvfp4_default_mse", *_INPUTS),
} | {name: ("w4a16_nvfp4_default_mse", "scale: mse", f"scale: {name}") for name in ALGORITHMS}
"""Recipes that do not come with fourfold: one that does, and what stands in place of what in it."""


@dataclass
class Row:
    """The figures of a recipe, for each seed."""

    figures: list[ModelFigures]
    seconds: list[float]

    def cells(self) -> list[str]:
        kls = [x.kl for x in self.figures]
        seeds = f"{min(kls):.2e} to {max(kls):.2e}" if len(kls) > 1 else ""
        low, high = _ends([x.ratio_interval for x in self.figures])
        ratio = f"{_mean([x.ratio or 0.0 for x in self.figures]):.3f} ({low:.3f} to {high:.3f})"
        low, high = _ends([x.kl_interval for x in self.figures])
        return [
            f"{_mean(kls):.2e}",
            f"{low:.2e} to {high:.2e}",
            seeds,
            ratio,
            f"{_mean([x.top1 for x in self.figures]):.1%}",
            f"{_mean([math.log2(x.perplexity) for x in self.figures]):.4f}",
            f"{_mean(self.seconds):.0f}",
        ]


def recipe_of(folder: Path, name: str) -> Recipe:
    if name not in OWN:
        return Recipe.load(name)
    base, old, new = OWN[name]
    file = folder / "recipe.yaml"
    file.write_text(Recipe.load(base).to_yaml().replace(old, new))
    return Recipe.load(file)


def base_of(name: str) -> str:
    """Return the recipe with `mse` that quantizes the same."""
    if name in ALGORITHMS:
        return "w4a16_nvfp4_default_mse"
    return next(base for start, base in BASES.items() if name.startswith(start))


class Bench:
    """Outputs of recipes in a folder."""

    def __init__(self, folder: Path, seeds: int, base: str | None) -> None:
        self.folder, self.seeds, self.base = folder, seeds, base
        text = folder / "heldout.txt"
        text.write_text(heldout_text(), encoding="utf-8")
        windows = len(heldout_text().encode()) // WINDOW
        self.text = EvaluationConfig(text, length=WINDOW, windows=windows, cache=folder / "cache")
        self.outs: dict[str, tuple[list[Path], list[float]]] = {}
        self.source_bits = 0.0

    def quantized(self, name: str) -> tuple[list[Path], list[float]]:
        """Return the outputs of a recipe, one for each seed, and the CPU seconds of each."""
        if name not in self.outs:
            runs = list(self._quantize(name))
            self.outs[name] = [out for out, _ in runs], [seconds for _, seconds in runs]
        return self.outs[name]

    def _quantize(self, name: str) -> Iterator[tuple[Path, float]]:
        recipe = recipe_of(self.folder, name)
        for seed in range(self.seeds):
            out, begun = self.folder / f"{name.replace(' ', '')}-{seed}", time.process_time()
            config = CalibrationConfig(seed=seed)
            result = quantize(
                model_dir(), out, recipe, calibration=config, runtime=Runtime(threads=1)
            )
            assert result.clean, str(result)
            yield out, time.process_time() - begun
            if not result.plan.needs_calibration:
                return

    def row(self, name: str) -> Row:
        base, (outs, seconds) = self.base or base_of(name), self.quantized(name)
        result = evaluate(model_dir(), [self.quantized(base)[0][0], *outs], self.text)
        self.source_bits = math.log2(result.perplexity)
        return Row(list(result.models[1:]), seconds)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _ends(intervals: list[tuple[float, float] | None]) -> tuple[float, float]:
    ends = [x for x in intervals if x is not None]
    return _mean([low for low, _ in ends]), _mean([high for _, high in ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", metavar="NAME", help="what KL is divided by")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seeds, options.base)
        rows = {}
        for name in options.names or (*RECIPES, *ALGORITHMS):
            rows[name] = bench.row(name).cells()
            print(f"{name}: KL {rows[name][0]}", flush=True)
    print()
    heads = [
        "recipe",
        "KL, nats a byte",
        "95 %",
        "seeds",
        f"KL / `{options.base or 'mse'}`",
        "top-1 agreement",
    ]
    heads += [f"bits a byte (source {bench.source_bits:.4f})", "CPU s"]
    for cells in (heads, ["---"] * len(heads), *([f"`{x}`", *row] for x, row in rows.items())):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
