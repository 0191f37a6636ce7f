# SPDX-License-Identifier: Apache-2.0
"""What a recipe's budget was spent on, in words and tables for the report."""

from __future__ import annotations

from collections.abc import Sequence

from fourfold.reporting.text import clipped, figure, integer
from fourfold.storage.quant_summary import BudgetEntry, BudgetStep

CURVE = ("step", "bits a weight", "KL", "KL, other text")


def budget_text(entry: BudgetEntry) -> str:
    """Return what was measured and what it led to, in a few sentences."""
    first, last = entry.curve[0], entry.curve[-1]
    return (
        "Components were stored otherwise than the rules say, in the order of KL saved for each "
        f"byte, as measured on {integer(entry.tokens)} tokens of {clipped(entry.text)}: "
        f"{first.bits:.2f} → {last.bits:.2f} bits a weight, KL {figure(first.kl, 3)} → "
        f"{figure(last.kl, 3)} nats a token; {figure(first.other_kl, 3)} → "
        f"{figure(last.other_kl, 3)} on {integer(entry.other_tokens)} other tokens. Weights whose "
        "algorithm needs statistics of inputs were measured with mse, which loses more."
    )


def curve_rows(entry: BudgetEntry) -> list[list[str]]:
    """Return the points of the curve: what moved, bits, and KL on both texts."""
    return [
        [_moved(step), f"{step.bits:.3f}", figure(step.kl, 3), figure(step.other_kl, 3)]
        for step in entry.curve
    ]


def _moved(step: BudgetStep) -> str:
    moves = [f"{clipped(name, 60)} → {option}" for name, option in step.moved.items()]
    return ", ".join(moves) or "the rules alone"


def components_table(entry: BudgetEntry) -> tuple[Sequence[str], list[list[str]]]:
    """Return headings and rows: for each component its format, and the KL of the whole model with
    this component alone moved to each candidate."""
    options = list(
        dict.fromkeys(option for component in entry.components for option in component.kl)
    )
    heads = ("component", "stored as", "weights", *(f"KL with {option}" for option in options))
    rows = [
        [
            clipped(component.name, 80),
            component.format,
            integer(component.weights),
            *(figure(component.kl.get(option), 3) for option in options),
        ]
        for component in entry.components
    ]
    return heads, rows
