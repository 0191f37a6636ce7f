# SPDX-License-Identifier: Apache-2.0
"""What the rounding of activations costs the embedded model, by the origin of scales: KL, top-1.

    python benchmarks/activations.py

Two tables for docs/calibration.md. The first: W4A4 with input scales from the largest input that
calibration saw, from twice and four times as much, from a histogram, and with a constant scale; for
routed experts, and for everything. The second: a KV cache in FP8 and in NVFP4, beside weights alone
and beside W4A4. Calibration reads the embedded mixed text; the figures are of held-out text, as in
`quality.py`. One thread.
"""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import torch

from fourfold import load, quantize
from fourfold.config import Runtime
from fourfold.embedded import heldout_text, model_dir
from fourfold.evaluation.demo import WINDOW, Comparison, compare
from fourfold.models.tokenizer import load_tokenizer

ROLES = {
    "experts": "quantize: [experts]",
    "everything": "quantize: [experts, attention]",
}
AMAXES = ("max", "{headroom: 1}", "{headroom: 2}", "histogram", "constant")
KV_CACHES = ("none", "{format: fp8, scale: cast}", "{format: fp8, scale: calibrated}",
             "{format: nvfp4}")  # fmt: skip


class Bench:
    """Quantizes the embedded model by many recipes and compares each output with the source."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.folder, self.count = folder, 0
        self.reference = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
        self.tokens = torch.tensor(load_tokenizer(model_dir())(heldout_text())["input_ids"])

    def measure(self, *lines: str) -> Comparison:
        """Return the figures of a recipe, given by its lines."""
        self.count += 1
        recipe = self.folder / f"{self.count}.yaml"
        recipe.write_text("\n".join(lines))
        out = self.folder / str(self.count)
        result = quantize(model_dir(), out, recipe, runtime=Runtime(threads=1))
        assert result.clean, str(result)
        is_rounded = bool(result.plan.sites) or result.plan.recipe.kv_format is not None
        model = load(out, dtype=torch.float32, simulate_activations=is_rounded)
        return compare(self.reference, model, self.tokens, WINDOW)


def cells(figures: Comparison) -> str:
    return f"{figures.kl:.2e} | {figures.top1_agreement:.1%}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print("| `amax` | KL, experts | top-1 | KL, everything | top-1 |\n|---|---|---|---|---|")
        for amax in AMAXES:
            inputs = f"activations: {{format: nvfp4, amax: {amax}}}"
            row = [cells(bench.measure(inputs, roles)) for roles in ROLES.values()]
            print(f"| `{amax}` | {' | '.join(row)} |", flush=True)
        print("\n| `kv_cache` | KL, W4A16 experts | top-1 | KL, W4A4 everything | top-1 |")
        print("|---|---|---|---|---|")
        for kv_cache in KV_CACHES:
            row = [
                cells(bench.measure(f"kv_cache: {kv_cache}", f"activations: {inputs}", roles))
                for inputs, roles in zip(("none", "{format: nvfp4}"), ROLES.values(), strict=True)
            ]
            print(f"| `{kv_cache}` | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
