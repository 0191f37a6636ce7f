# SPDX-License-Identifier: Apache-2.0
"""What budgets buy on the embedded model: KL by bits a weight, and what the choice costs.

    python benchmarks/budget.py [--calib-size 128]

Quantizes the embedded model with `…_best` recipes without a budget and under several, with
candidates FP8 and BF16, for W4A4 also with inputs in 16 bits (`w4a16`), and measures each output on
held-out text, which neither calibration nor the choice has read. Prints the curves of
docs/which-recipe.md as a table: bits, KL, the number of components that moved, and CPU
seconds of the choice and of everything. One thread.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch

import fourfold
from fourfold.config import CalibrationConfig, EvaluationConfig, OutputConfig, Runtime
from fourfold.embedded import model_dir
from fourfold.events import BudgetSpent, Event
from fourfold.recipes import Budget, Recipe
from fourfold.storage.quant_summary import read_summary

WINDOW, WINDOWS = 512, 64
CURVES = {
    "w4a4": ("nvfp4_default_best", ("fp8", "bf16"), (None, 4.7, 4.9)),
    "w4a4-w4a16": ("nvfp4_default_best", ("w4a16", "fp8", "bf16"), (4.52,)),
    "w4a16": ("w4a16_nvfp4_default_best", ("fp8", "bf16"), (None, 4.7, 4.9)),
}
"""Of each curve the recipe, the candidates and the budgets; None for none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calib-size", type=int, default=128, help="calibration samples")
    parser.add_argument("--curves", nargs="*", default=list(CURVES), choices=list(CURVES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n")
    text = Path(model_dir()).parent / "heldout.txt"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        evaluation = EvaluationConfig(text, WINDOW, WINDOWS, cache=folder / "cache")
        for name in options.curves:
            base, candidates, budgets = CURVES[name]
            print(
                f"{name}\n\n| bits a weight | KL | components moved | choice, CPU s | all, CPU s |"
            )
            print("|---|---|---|---|---|")
            for number, bits in enumerate(budgets):
                recipe = Recipe.load(base)
                if bits is not None:
                    budget = Budget(bits_per_weight=bits, candidates=candidates)
                    recipe = recipe.model_copy(update={"budget": budget})
                out = folder / f"{name}-{number}"
                print(row(recipe, out, options.calib_size, evaluation), flush=True)
            print()


def row(recipe: Recipe, out: Path, samples: int, evaluation: EvaluationConfig) -> str:
    """Quantize and measure; return a row of the table."""
    chosen: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, BudgetSpent):
            chosen.append(time.process_time())

    begun = time.process_time()
    fourfold.quantize(
        model_dir(),
        out,
        recipe,
        calibration=CalibrationConfig(calib_size=samples),
        runtime=Runtime(threads=1),
        output=OutputConfig(verify=False),
        on_event=note,
    )
    ended = time.process_time()
    kl = fourfold.evaluate(model_dir(), out, evaluation).models[0].kl
    summary = read_summary(out)
    quantized = [role for role in summary.roles if role.role in ("experts", "attention")]
    bits = 8 * sum(x.bytes_after for x in quantized) / sum(x.numel for x in quantized)
    components = () if summary.budget is None else summary.budget.components
    moved = sum(component.option != "recipe" for component in components)
    choice = f"{chosen[0] - begun:.0f}" if chosen else ""
    return f"| {bits:.2f} | {kl:.2e} | {moved} | {choice} | {ended - begun:.0f} |"


if __name__ == "__main__":
    main()
