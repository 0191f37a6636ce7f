"""What to do, by role: recipes in YAML."""

from fourfold.recipes.schema import DEFAULT_RECIPE, KVCache, Recipe, Weights, builtin_names

__all__ = ["DEFAULT_RECIPE", "KVCache", "Recipe", "Weights", "builtin_names"]
