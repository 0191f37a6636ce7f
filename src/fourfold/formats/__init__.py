"""How a weight is stored: the formats, and the kernels behind them."""
