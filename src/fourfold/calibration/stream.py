# SPDX-License-Identifier: Apache-2.0
"""The second stream: inputs as the quantized layers produce them, rounded as engines round them.

Calibration with `propagate: quantized` runs every text twice through each layer: once as the source
computes it, and once as the quantized model will. `Stream` stands where observers do. It rounds the
inputs of quantized linear layers, if their scheme does, and keeps the rows of the sites that are
measured, for one batch at a time.

Shapes: R rows, I input features, K experts of a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourfold.formats.base import FORMATS
from fourfold.sources.codecs.base import InputRounding


@dataclass(frozen=True)
class RecordedRows:
    """Rows that a linear layer, or some experts of a module, read in one call."""

    rows_RI: Tensor
    experts: Tensor | None = None
    """int64 `[R]` or `[R, K]`, negative for none; None for a linear layer."""
    tokens_R: Tensor | None = None
    """int64 `[R]`; None if that is not known."""


class EnoughError(Exception):
    """Everything that is recorded has been seen, so the layer's module can end."""


@dataclass
class Stream:
    """What a layer's module does with its inputs while it runs, besides computing."""

    roundings: Mapping[str, InputRounding] = field(default_factory=dict)
    """By site."""
    recorded_sites: Collection[str] = ()
    """The sites whose rows are kept."""
    later_sites: Collection[str] = ()
    """Linear layers that run only after all of these."""
    round_states: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Returns what attention reads for keys and values; None leaves them as they are."""
    recorded: dict[str, list[RecordedRows]] = field(default_factory=lambda: defaultdict(list))

    def round(self, site: str, x: Tensor) -> Tensor:
        """Return inputs as the engine's layer sees them.

        Raises:
            EnoughError: All that is recorded has been seen.
        """
        if site in self.later_sites:
            self.check()
        rounding = self.roundings.get(site)
        if rounding is None:
            return x
        return FORMATS[rounding.format].round_activations(x, rounding.scale)

    def check(self) -> None:
        """Raise `EnoughError` if something is recorded, and all of it has been seen."""
        if self.recorded_sites and self.recorded.keys() >= set(self.recorded_sites):
            raise EnoughError

    def record(self, site: str, rows: RecordedRows) -> None:
        """Keep rows, if they are of a site that is recorded."""
        if site in self.recorded_sites:
            self.recorded[site].append(rows)


def differences(
    own: list[RecordedRows], other: list[RecordedRows], *, by_expert: bool
) -> list[Tensor]:
    """Return `other − own` for the rows of `own`, float32; 0 where `other` has no such row.

    Args:
        own: The rows of one stream at a site.
        other: Those of the other stream, from the same texts.
        by_expert: True if the rows of a token differ between its experts.
    """
    if not own or not other:
        return [torch.zeros_like(x.rows_RI, dtype=torch.float32) for x in own]
    if own[0].experts is None:
        pairs = zip(own, other, strict=True)
        return [theirs.rows_RI.float() - mine.rows_RI.float() for mine, theirs in pairs]
    known = [x for x in other if x.tokens_R is not None]
    if not known:
        return differences(own, [], by_expert=by_expert)
    keys = torch.cat([_keys(x, by_expert) for x in known])
    rows = torch.cat([x.rows_RI for x in known])
    keys, order = keys.sort()
    return [_difference(x, keys, order, rows, by_expert) for x in own]


def _keys(rows: RecordedRows, by_expert: bool) -> Tensor:
    """A number for the token, or the token and the expert, of each row."""
    assert rows.tokens_R is not None
    assert rows.experts is not None
    if not by_expert:
        return rows.tokens_R
    assert rows.experts.ndim == 1, "rows of a token that differ have one expert each"
    return (rows.tokens_R << 20) + rows.experts


def _difference(
    own: RecordedRows, keys: Tensor, order: Tensor, rows: Tensor, by_expert: bool
) -> Tensor:
    result = torch.zeros_like(own.rows_RI, dtype=torch.float32)
    if own.tokens_R is None:
        return result
    wanted = _keys(own, by_expert)
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    has_twin = keys[place] == wanted
    theirs = rows[order[place[has_twin]]].float()
    result[has_twin] = theirs - own.rows_RI[has_twin].float()
    return result
