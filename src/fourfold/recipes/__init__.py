# SPDX-License-Identifier: Apache-2.0
"""Which linear weights are quantized, and how: recipes in YAML."""

from fourfold.recipes.budget import Budget
from fourfold.recipes.schema import (
    DEFAULT_LAYOUT,
    DEFAULT_RECIPE,
    QUANTIZABLE_ROLES,
    Activations,
    KVCache,
    Recipe,
    Rule,
    Weights,
    builtin_names,
)

__all__ = [
    "DEFAULT_LAYOUT",
    "DEFAULT_RECIPE",
    "QUANTIZABLE_ROLES",
    "Activations",
    "Budget",
    "KVCache",
    "Recipe",
    "Rule",
    "Weights",
    "builtin_names",
]
