# SPDX-License-Identifier: Apache-2.0
"""Scales with the smallest squared error of the weight."""

from __future__ import annotations

from fourfold.algorithms.base import RowwiseAlgorithm


class MSEScale(RowwiseAlgorithm):
    """Takes, of all scales that a block may have, the one with the smallest squared error.

    The error is that of the weight alone, Σ(w − ŵ)², whatever the inputs are. The search and its
    proof are in `formats.nvfp4.sweep`.
    """

    name = scale = "mse"
