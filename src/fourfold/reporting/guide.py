# SPDX-License-Identifier: Apache-2.0
"""Which recipe to take: hardware and aim, and what a recipe costs in quality. All of it is data.

`fourfold recipes --guide` prints it, and docs/which-recipe.md says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fourfold.reporting.serving import EXAMPLES, Hardware


class Cost(NamedTuple):
    """The measured cost of a recipe: the embedded model on held-out text."""

    kl: float
    """Nats a byte."""
    top1_agreement: float


COSTS: Mapping[str, Cost] = {
    "w4a16_nvfp4_experts_only": Cost(5.32e-3, 0.972),
    "w4a16_nvfp4_experts_only_mse": Cost(4.35e-3, 0.976),
    "w4a16_nvfp4_default": Cost(1.15e-2, 0.959),
    "w4a16_nvfp4_default_mse": Cost(9.14e-3, 0.962),
    "nvfp4_experts_only": Cost(1.15e-2, 0.958),
    "nvfp4_experts_only_mse": Cost(1.06e-2, 0.960),
    "nvfp4_experts_only_mse-constant_inputs": Cost(1.05e-2, 0.960),
    "nvfp4_experts_only_mse-fp8_cast_kv": Cost(1.34e-2, 0.953),
    "nvfp4_default_mse-fp8_kv": Cost(2.60e-2, 0.936),
    "w4a16_nvfp4_experts_only_best": Cost(1.95e-3, 0.985),
    "w4a16_nvfp4_default_best": Cost(3.52e-3, 0.978),
    "nvfp4_experts_only_best": Cost(7.73e-3, 0.965),
    "nvfp4_default_best": Cost(1.68e-2, 0.949),
    "nvfp4_default_budget": Cost(8.96e-3, 0.964),
}
"""By recipe, as benchmarks/quality.py measures them."""


class Advice(NamedTuple):
    """A recipe for an aim."""

    aim: str
    recipe: str
    why: str


_NO_FP4_UNITS = (
    Advice(
        "the smallest change",
        "w4a16_nvfp4_experts_only_mse",
        "no FP4 units: W4A4 would run with 16-bit activations, too",
    ),
    Advice("the smallest files", "w4a16_nvfp4_default_mse", "attention in 4 bits, too"),
    Advice(
        "the best quality",
        "w4a16_nvfp4_experts_only_best",
        "codes are chosen with calibration data, layer after layer: much slower",
    ),
)
_FP4_UNITS = (
    Advice(
        "few requests at a time",
        "w4a16_nvfp4_experts_only_mse",
        "bound by memory: only the weights count",
    ),
    Advice(
        "many requests at a time",
        "nvfp4_experts_only_mse",
        "bound by arithmetic: 4-bit activations are faster",
    ),
    Advice(
        "many, with long texts",
        "nvfp4_experts_only_mse-fp8_cast_kv",
        "an FP8 KV cache holds twice as much",
    ),
    Advice(
        "a dense model",
        "nvfp4_mlp_only_mse-fp8_cast_kv",
        "the MLPs are most of it, and attention stays as it is",
    ),
    Advice("the smallest files", "nvfp4_default_mse-fp8_kv", "everything in 4 bits; check quality"),
    Advice(
        "small files, better",
        "nvfp4_default_budget",
        "components that cost most in FP8, as measured on your model: much slower",
    ),
    Advice(
        "the best quality",
        "nvfp4_experts_only_best",
        "codes are chosen with calibration data, layer after layer: much slower",
    ),
)

GUIDE: Mapping[tuple[Hardware, ...], Sequence[Advice]] = {
    (Hardware.ADA, Hardware.HOPPER): _NO_FP4_UNITS,
    (Hardware.BLACKWELL, Hardware.RTX, Hardware.SPARK): _FP4_UNITS,
    (Hardware.CPU,): (
        Advice(
            "llama.cpp",
            "w4a16_nvfp4_experts_only_mse",
            "it rounds activations to 8 bits by itself; not for every family",
        ),
    ),
}


NOTE = (
    "KL and top-1 agreement with the source are those of the embedded model, as",
    "benchmarks/quality.py measures them: a small model loses more than a large one. Compare",
    "recipes, not models. W4A16 needs no calibration, and W4A4 none with constant input scales",
    "(nvfp4_experts_only_mse-constant_inputs). Where quality falls short, write a recipe that",
    "keeps more of the model (docs/recipes.md).",
)


def guide_lines() -> Iterator[str]:
    """Yield the guide as text: what to take on which hardware, for which aim, at which cost."""
    for hardware, advices in GUIDE.items():
        yield "; ".join(f"{kind} ({EXAMPLES[kind]})" for kind in hardware)
        for advice in advices:
            yield f"  {advice.aim}: {advice.recipe}"
            yield f"      {advice.why} ({cost_of(advice.recipe)})"
        yield ""
    yield from NOTE


def guide_entries() -> list[dict[str, Any]]:
    """Return the guide as plain data for JSON: an entry for each hardware and aim."""
    return [
        {
            "hardware": [str(kind) for kind in hardware],
            **advice._asdict(),
            "cost": None if (cost := _cost(advice.recipe)) is None else cost._asdict(),
        }
        for hardware, advices in GUIDE.items()
        for advice in advices
    ]


NOT_MEASURED = "not measured"


def cost_of(recipe: str) -> str:
    """Return what a recipe costs, in a few words."""
    if (cost := _cost(recipe)) is None:
        return NOT_MEASURED
    return f"KL {cost.kl:.3g}, top-1 {cost.top1_agreement:.1%}"


def _cost(recipe: str) -> Cost | None:
    return COSTS.get(recipe)
