# SPDX-License-Identifier: Apache-2.0
"""How a weight is stored: the formats, and the kernels behind them."""
