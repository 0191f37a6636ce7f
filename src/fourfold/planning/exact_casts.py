# SPDX-License-Identifier: Apache-2.0
"""Which weights of a quantized source keep their codes: MXFP4 (see `formats.mxfp4`), and FP8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fourfold.formats import mxfp4
from fourfold.formats.base import FORMATS
from fourfold.planning.rows import ScaleGroup, is_fp8, is_mxfp4
from fourfold.storage.source import Source


def exact_cast_notes(source: Source, groups: Sequence[ScaleGroup]) -> Iterator[str]:
    """Yield for how many weights the format holds the source's own codes; reads scales alone, where
    they tell."""
    if fp8 := sum(len(group.linears) for group in groups if is_fp8(source, group)):
        yield f"{fp8:,} FP8 weights keep their codes and scales where engines let them"
    stored = [group for group in groups if is_mxfp4(source, group)]
    if not stored:
        return
    total = sum(len(group.linears) for group in stored)
    if not source.fetching.is_here:
        yield f"{total:,} MXFP4 weights are cast without loss where that is exact"
        return
    exact = sum(len(x.linears) for x in stored if mxfp4_scale(source, x) is not None)
    yield (
        f"{exact:,} of {total:,} MXFP4 weights are cast without loss, code for code"
        + ("" if exact == total else "; the scales of the others span too much for that")
    )


def mxfp4_scale(source: Source, group: ScaleGroup) -> float | None:
    """Return the group scale under which its format holds a scale group of MXFP4 exactly.

    None if it does not, or if all of it is 0. Codes are read only where exponents alone do not
    tell: those of blocks of zeros do not count.
    """
    parts = []
    for linear in group.linears:
        weight, region = source.mxfp4(linear.region.key), linear.region
        assert weight is not None
        parts.append((weight, region, weight.exponents(region.expert, region.outputs)))
    scale = _scale_of(group, [exponents for _, _, exponents in parts])
    if scale is not None:
        return scale
    return _scale_of(
        group,
        [
            mxfp4.used(weight.codes(region.expert, region.outputs), exponents)
            for weight, region, exponents in parts
        ],
    )


def _scale_of(group: ScaleGroup, exponents: Sequence[Tensor]) -> float | None:
    span = mxfp4.span(exponents)
    return None if span is None else FORMATS[group.scheme.weights].scale_of_mxfp4(*span)
