"""How a weight is stored: formats and their kernels."""
