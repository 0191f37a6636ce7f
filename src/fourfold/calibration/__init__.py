"""Calibration: what the model reads, and what is observed while it does."""
