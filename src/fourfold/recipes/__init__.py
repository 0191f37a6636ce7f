# SPDX-License-Identifier: Apache-2.0
"""Which linear weights are quantized, and how: recipes in YAML."""

from fourfold.recipes.schema import (
    DEFAULT_LAYOUT,
    DEFAULT_RECIPE,
    QUANTIZABLE_ROLES,
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
    "KVCache",
    "Recipe",
    "Rule",
    "Weights",
    "builtin_names",
]
