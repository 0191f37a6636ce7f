# SPDX-License-Identifier: Apache-2.0
"""The fused tensors of a source, as a checkpoint of fourfold's holds them: cut into pieces.

`quant_summary.json` says of each quantized weight and bias which region of which source tensor it
was.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.models.regions import Region
from fourfold.storage.quant_summary import QuantSummary


@dataclass(frozen=True, slots=True)
class Piece:
    """A weight or bias of the checkpoint, and its place in a fused tensor of the source."""

    key: str
    region: Region

    @property
    def first_dimension(self) -> range:
        """The indices of the fused tensor's first dimension that it lies at."""
        expert = self.region.expert
        return self.region.rows if expert is None else range(expert, expert + 1)

    def rows_within(self, start: int, stop: int) -> range:
        """Those of `first_dimension` that are in `start:stop`."""
        own = self.first_dimension
        first, last = (max(0, -(-(at - own.start) // own.step)) for at in (start, stop))
        return own[first:last]

    def rows_to_decode(self, rows: range) -> tuple[int, int]:
        """The rows of the weight to decode for some of `first_dimension`."""
        if self.region.expert is not None or self.region.transposed:
            return 0, self.region.shape[0]
        first = self.first_dimension.index(rows[0])
        return first, first + len(rows)

    def fits(self, shape: Sequence[int]) -> bool:
        """True if the region lies inside a tensor of this shape."""
        region = self.region
        lead = [] if region.expert is None else [region.expert + 1]
        columns = [] if region.cols is None else [region.cols.stop]
        stops = [*lead, region.rows.stop, *columns]
        return len(stops) == len(shape) and all(map(operator.le, stops, shape))


def pieces_of(summary: QuantSummary) -> dict[str, list[Piece]]:
    """The source's fused tensors by name, and the weights and biases that they were cut into."""
    cut = [(f"{x.name}.weight", x.raw) for x in summary.linears if x.raw is not None]
    cut += [(f"{bias.name}.bias", bias.raw) for bias in summary.biases]
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for key, raw in cut:
        columns = None if raw.cols is None else range(*raw.cols)
        region = Region(raw.key, raw.expert, range(*raw.rows), columns, raw.transposed)
        pieces[raw.key].append(Piece(key, region))
    return dict(pieces)
