# SPDX-License-Identifier: Apache-2.0
"""What a plan says of the inputs of quantized layers and of the KV cache, besides their scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fourfold.planning.rows import ScaleGroup


def input_notes(groups: Iterable[ScaleGroup]) -> Iterator[str]:
    """Yield a note on inputs whose scale is not measured."""
    linears: Sequence[str] = [
        linear.name
        for group in groups
        for linear in group.linears
        if group.scheme.has_input_scale and not group.scheme.observes_inputs
    ]
    if linears:
        yield (
            f"the inputs of {len(linears):,} linear weights get the scale 1 (amax: constant); no "
            "calibration measures them"
        )
