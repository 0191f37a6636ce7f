# SPDX-License-Identifier: Apache-2.0
"""Scales from the largest magnitude: nothing is clipped."""

from __future__ import annotations

from fourfold.algorithms.base import RowwiseAlgorithm


class MaxScale(RowwiseAlgorithm):
    """Takes each block's scale from its largest magnitude, rounded to the scale's own format."""

    name = scale = "max"
