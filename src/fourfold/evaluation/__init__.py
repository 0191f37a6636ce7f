"""Load, run and look at quantized models."""
