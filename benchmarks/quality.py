# SPDX-License-Identifier: Apache-2.0
"""What quantization does to the embedded model: KL, top-1 agreement, bits a byte, by recipe.

    python benchmarks/quality.py

Each recipe is carried out as `fourfold quantize` does, W4A4 recipes calibrated on the embedded
mixed text, and the output compared with its source on held-out text: weights dequantized, for
W4A4 inputs rounded as engines round them, and keys and values where the recipe has a quantized KV
cache. Prints the table of the README. One thread, so that the figures are the same everywhere.
"""

from __future__ import annotations

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
    "nvfp4_experts_only",
    "nvfp4_experts_only_mse",
    "nvfp4_experts_only_mse-constant_inputs",
    "nvfp4_experts_only_mse-fp8_cast_kv",
    "nvfp4_default_max",
    "nvfp4_default_mse",
    "nvfp4_default_mse-fp8_kv",
)
OWN = {
    "nvfp4_default_max": "w4a16_nvfp4_default",
    "nvfp4_default_mse": "w4a16_nvfp4_default_mse",
}
"""Recipes that do not come with fourfold: W4A4 of the weights that another one quantizes."""


def measure(
    folder: Path, name: str, reference: torch.nn.Module, tokens: torch.Tensor
) -> Comparison:
    recipe: str | Path = name
    if name in OWN:
        from fourfold import Recipe

        recipe = folder / f"{name}.yaml"
        text = Recipe.load(OWN[name]).to_yaml()
        recipe.write_text(text.replace("activations: none", "activations: {format: nvfp4}"))
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
        found = {name: measure(Path(folder), name, reference, tokens) for name in RECIPES}
    source = next(iter(found.values())).reference_bits
    print(f"| recipe | KL, nats a byte | top-1 agreement | bits a byte (source {source:.4f}) |")
    print("|---|---|---|---|")
    for name, each in found.items():
        print(
            f"| `{name}` | {each.kl:.2e} | {each.top1_agreement:.1%} | {each.quantized_bits:.4f} |"
        )


if __name__ == "__main__":
    main()
