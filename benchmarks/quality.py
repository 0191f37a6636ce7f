# SPDX-License-Identifier: Apache-2.0
"""What quantization does to the embedded model: KL, top-1 agreement, bits a byte, by recipe.

    python benchmarks/quality.py [NAME …]

Each recipe is carried out as `fourfold quantize` does, W4A4 recipes calibrated on the embedded
mixed text, and the output compared with its source on held-out text: weights dequantized, for
W4A4 inputs rounded as engines round them, and keys and values where the recipe has a quantized KV
cache. Prints the tables of the README and of docs/recipes.md; with names, those rows alone. One
thread, so that the figures are the same everywhere.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from fourfold import load, quantize
from fourfold.config import Runtime
from fourfold.embedded import heldout_text, model_dir
from fourfold.evaluation.demo import WINDOW, Comparison, compare
from fourfold.models.tokenizer import load_tokenizer

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


def measure(
    folder: Path, name: str, reference: torch.nn.Module, tokens: torch.Tensor
) -> Comparison:
    recipe: str | Path = name
    if name in OWN:
        from fourfold import Recipe

        recipe = folder / "recipe.yaml"
        base, old, new = OWN[name]
        recipe.write_text(Recipe.load(base).to_yaml().replace(old, new))
    result = quantize(model_dir(), folder / name, recipe, runtime=Runtime(threads=1))
    assert result.clean, str(result)
    is_rounded = bool(result.plan.sites) or result.plan.recipe.kv_format is not None
    model = load(folder / name, dtype=torch.float32, simulate_activations=is_rounded)
    return compare(reference, model, tokens, WINDOW)


def main() -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    reference = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    tokens = torch.tensor(load_tokenizer(model_dir())(heldout_text())["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        names = (*RECIPES, *ALGORITHMS) if not sys.argv[1:] else sys.argv[1:]
        found = {name: measure(Path(folder), name, reference, tokens) for name in names}
    source = next(iter(found.values())).reference_bits
    print(f"| recipe | KL, nats a byte | top-1 agreement | bits a byte (source {source:.4f}) |")
    print("|---|---|---|---|")
    for name, each in found.items():
        print(
            f"| `{name}` | {each.kl:.2e} | {each.top1_agreement:.1%} | {each.quantized_bits:.4f} |"
        )


if __name__ == "__main__":
    main()
