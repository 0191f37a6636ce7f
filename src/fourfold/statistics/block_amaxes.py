# SPDX-License-Identifier: Apache-2.0
"""`block_amaxes`: how often the blocks of an input have each largest magnitude. I64 `[2048]`.

A block is 16 consecutive inputs, which share a block scale in NVFP4. Its largest magnitude, its
amax, falls into a bin by its exponent and the first 5 bits of its mantissa, so the bins of an
octave are 1/32 of its lower end wide. They reach from 2⁻⁴⁰ to 2²⁴; what lies outside counts in the
first bin or the last. Blocks of zeros do not count: they are exact under every scale.

The histogram is one for a whole input site: the experts of a module share theirs, as engines give
them one input scale. A block counts once for each expert that reads it.

Counts are whole numbers, so the sum over ranks is exact, in any order.

Shapes: R rows, B blocks of a row, N blocks that count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.statistics.base import Reduction, Site, State, Statistic

BLOCK = 16
BINS = 2048

_MANTISSA_BITS = 5
_SHIFT = 23 - _MANTISSA_BITS
_FIRST_EXPONENT = -40
_OFFSET = (127 + _FIRST_EXPONENT) << _MANTISSA_BITS


class BlockAmaxes(Statistic):
    """A histogram of the amaxes of the blocks that reached a site."""

    name = "block_amaxes"
    reduction: Reduction = "sum"
    products = frozenset({"gate_up", "down"})

    def shapes(self, site: Site) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {self.name: (torch.int64, (BINS,))}

    def update(self, state: State, rows: Tensor, experts: Tensor | None) -> None:
        amax_RB = rows.reshape(len(rows), -1, BLOCK).abs().amax(dim=-1).float()
        readers_RB = torch.ones_like(amax_RB)
        if experts is not None:
            readers_R = (experts >= 0).reshape(len(rows), -1).sum(dim=-1)
            readers_RB = readers_R[:, None].expand(amax_RB.shape)
        counts = amax_RB > 0  # not NaN either, which the amax of the site finds
        bits_N = amax_RB[counts].view(torch.int32)
        bins_N = ((bits_N >> _SHIFT) - _OFFSET).clamp(0, BINS - 1)
        # Sums of whole numbers in float64: exact, whatever their order.
        histogram = torch.bincount(bins_N, readers_RB[counts].double(), BINS)
        state[self.name] += histogram.to(torch.int64)


def percentile(histogram: Tensor, percent: float) -> tuple[float, float]:
    """Return the bounds of the bin with the smallest amax that `percent` of the blocks do not
    exceed; 0 and 0 if there are no blocks.

    Args:
        histogram: Counts `[2048]`, int64.
        percent: From 0 to 100.
    """
    below = histogram.cumsum(0)
    if not int(below[-1]):
        return 0.0, 0.0
    rank = max(1.0, percent / 100 * int(below[-1]))
    number = int((below >= rank).nonzero()[0])
    return _lower_bound(number), _lower_bound(number + 1)


def _lower_bound(number: int) -> float:
    octave, step = divmod(number, 1 << _MANTISSA_BITS)
    return float((1 + step / (1 << _MANTISSA_BITS)) * 2.0 ** (_FIRST_EXPONENT + octave))
