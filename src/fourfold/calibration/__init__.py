# SPDX-License-Identifier: Apache-2.0
"""Calibration: what the model reads, and what is observed while it does."""
