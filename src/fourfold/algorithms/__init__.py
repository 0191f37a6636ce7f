# SPDX-License-Identifier: Apache-2.0
"""How scales and codes are chosen, given a format and what calibration measured."""

from fourfold.algorithms.base import ALGORITHMS, Algorithm, Figures, RowwiseAlgorithm, Weight

__all__ = ["ALGORITHMS", "Algorithm", "Figures", "RowwiseAlgorithm", "Weight"]
