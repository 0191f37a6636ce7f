# SPDX-License-Identifier: Apache-2.0
"""How well estimates rank the components of the embedded model: Spearman's rank correlations.

    python benchmarks/sensitivity.py

What each component costs in NVFP4 W4A4, in NVFP4 W4A16 and in FP8, measured on 32,768 tokens of
held-out text, is compared with the same measured on fewer tokens of another text (the beginning of
the embedded calibration text), as a large model's would be, and with the relative error of the
component's outputs, which needs no pass through the layers behind it. One thread.
"""

from __future__ import annotations

import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import fourfold
from fourfold.config import EvaluationConfig
from fourfold.embedded import heldout_text, model_dir
from fourfold.recipes import Recipe

TOKENS = (128, 256, 512, 1024, 2048, 8192)
OPTIONS = ("recipe", "w4a16", "fp8")


def kl_of_components(text: Path, tokens: int) -> tuple[dict[tuple[str, str], float], float]:
    """KL by component and option, and seconds."""
    begun = time.perf_counter()
    config = EvaluationConfig(text, length=min(512, tokens), tokens=tokens)
    result = fourfold.sensitivity(model_dir(), config, candidates=OPTIONS[1:], threads=1)
    kl = {
        (component.component, x.option): x.kl
        for component in result.components
        for x in component.options
    }
    return kl, time.perf_counter() - begun


def rank_correlation(one: list[float], other: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def output_errors(folder: Path) -> dict[tuple[str, str], float]:
    """Relative error of each component's outputs in W4A4 and W4A16, on the inputs of the source."""
    from transformers import AutoModelForCausalLM

    from fourfold.formats.nvfp4.activations import fake_quantize

    recipe = Recipe.load("w4a16_nvfp4_default_mse")
    fourfold.quantize(model_dir(), folder / "out", recipe)
    quantized = fourfold.load(folder / "out", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    errors: dict[tuple[str, str], float] = {}
    ids = torch.tensor([list(heldout_text().encode()[-2048:])])
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith((".q_proj", ".o_proj", ".mlp.experts")):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args}), with_kwargs=False
            )
    with torch.no_grad():
        model(ids, use_cache=False)
        for layer in range(len(model.model.layers)):
            at = f"model.layers.{layer}"
            components = {
                f"{at}.self_attn.o_proj": [f"{at}.self_attn.o_proj"],
                f"{at}.self_attn.{{k,q,v}}_proj": [f"{at}.self_attn.{x}_proj" for x in "kqv"],
                f"{at}.mlp.experts": [f"{at}.mlp.experts"],
            }
            for component, modules in components.items():
                (x, *rest) = inputs.get(modules[0]) or inputs[f"{at}.self_attn.q_proj"]
                for option in ("recipe", "w4a16"):
                    rounded = fake_quantize(x, float(x.abs().max()) / 2688)
                    shown = rounded if option == "recipe" else x
                    lost = power = 0.0
                    for module in modules:
                        wanted = model.get_submodule(module)(x, *rest)
                        made = quantized.get_submodule(module)(shown, *rest)
                        lost += float((wanted - made).square().sum())
                        power += float(wanted.square().sum())
                    errors[component, option] = lost / power
    return errors


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n")
    embedded = Path(model_dir()).parent
    measured, seconds = kl_of_components(embedded / "heldout.txt", 32_768)
    print("| estimate | NVFP4 W4A4 | NVFP4 W4A16 | FP8 | all together | s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for tokens in TOKENS:
            estimate, taken = kl_of_components(embedded / "calibration.jsonl.gz", tokens)
            print(f"| KL on {tokens:,} tokens | {row(measured, estimate)} | {taken:.0f} |")
        errors = output_errors(Path(folder))
        print(f"| error of outputs | {row(measured, errors)} | |")
    print(f"\n{len(measured)} figures measured in {seconds:.0f} s")


def row(measured: dict[tuple[str, str], float], estimate: dict[tuple[str, str], float]) -> str:
    """Correlations of each option's components, and of all of them; empty where there is no
    estimate."""
    cells = []
    for options in (*((option,) for option in OPTIONS), OPTIONS):
        keys = [key for key in measured if key[1] in options]
        known = all(key in estimate for key in keys)
        pairs = [measured[x] for x in keys], [estimate[x] for x in keys] if known else []
        cells.append(f"{rank_correlation(*pairs):.2f}" if known else "")
    return " | ".join(cells)


if __name__ == "__main__":
    main()
