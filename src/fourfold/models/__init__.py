"""What a model contains: its module tree, its linear weights, and where their bytes lie."""
