"""What to do, by role: recipes in YAML."""

from fourfold.recipes.schema import KVCache, Recipe, Weights, builtin_names

__all__ = ["KVCache", "Recipe", "Weights", "builtin_names"]
