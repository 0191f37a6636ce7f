# SPDX-License-Identifier: Apache-2.0
"""Which weights of a quantized source keep their codes: MXFP4 (see `formats.mxfp4`), and FP8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fourfold.formats import mxfp4
from fourfold.formats.base import FORMATS
from fourfold.planning.rows import ScaleGroup, is_fp8, is_mxfp4
from fourfold.storage.source import Source


def exact_cast_notes(source: Source, groups: Sequence[ScaleGroup]) -> Iterator[str]:
    """Yield for how many weights the format holds the source's own codes; reads scales only."""
    if fp8 := sum(len(group.linears) for group in groups if is_fp8(source, group)):
        yield f"{fp8:,} FP8 weights keep their codes and scales where engines let them"
    stored = [group for group in groups if is_mxfp4(source, group)]
    if not stored:
        return
    total = sum(len(group.linears) for group in stored)
    if not source.fetching.is_here:
        yield f"{total:,} MXFP4 weights are cast without loss where that is exact"
        return
    exact = sum(len(group.linears) for group in stored if _is_exact(source, group))
    yield (
        f"{exact:,} of {total:,} MXFP4 weights are cast without loss, code for code"
        + ("" if exact == total else "; the scales of the others span too much for that")
    )


def _is_exact(source: Source, group: ScaleGroup) -> bool:
    """True if a format has the powers of two of a whole scale group."""
    spans = []
    for linear in group.linears:
        weight = source.mxfp4(linear.region.key)
        assert weight is not None
        spans.append(mxfp4.span(weight.exponents(linear.region.expert, linear.region.outputs)))
    used = [span for span in spans if span is not None]
    scale_of = FORMATS[group.scheme.weights].scale_of_mxfp4
    return bool(used) and scale_of(min(x for x, _ in used), max(x for _, x in used)) is not None
