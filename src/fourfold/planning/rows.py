# SPDX-License-Identifier: Apache-2.0
"""The elements of a plan: rows, scale groups, jobs and shards. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from fourfold.formats import mxfp4
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.models.experts import Projection
from fourfold.models.inventory import ExpertBias, LinearWeight, RawTensor
from fourfold.models.regions import whole
from fourfold.models.roles import Role
from fourfold.storage.safetensors_header import BITS, nbytes_of
from fourfold.storage.source import Source


class Action(StrEnum):
    """How a plan treats a source tensor."""

    QUANTIZE = "quantize"
    COPY = "copy"
    SPLIT = "split"
    """Copied value for value, one part for each expert: biases of fused experts."""


@dataclass(frozen=True, slots=True)
class Row:
    """How a plan treats one source tensor, and why."""

    key: str
    action: Action
    role: Role
    reason: str
    numel: int
    nbytes: int
    nbytes_after: int
    linears: int
    """The number of quantized linear weights in it."""
    is_decoded: bool = False
    """True if it is quantized in the source: what the plan treats are the decoded values."""


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linear weights that share one group scale, and are quantized together."""

    name: str
    linears: tuple[LinearWeight, ...]
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class KVScales:
    """The scales of one attention module's keys and values."""

    name: str
    layer: int
    k_name: str
    v_name: str
    is_calibrated: bool = True
    """False if they are 1."""


Job = ScaleGroup | ExpertBias | RawTensor | KVScales
"""One piece of work: a group to quantize, a bias to split off, a tensor to copy, KV scales."""


@dataclass(frozen=True)
class Shard:
    """One file of the output: its tensors (name → dtype, shape), and the work that fills it."""

    unit: str
    layer: int | None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    jobs: tuple[Job, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(nbytes_of(*spec) for spec in self.tensors.values())


def is_mxfp4(source: Source, group: ScaleGroup) -> bool:
    """True if all weights of a group lie in MXFP4 and could become another format without loss."""
    return FORMATS[group.scheme.weights].holds_mxfp4 and all(
        source.mxfp4(linear.region.key) is not None and linear.shape[1] % mxfp4.BLOCK == 0
        for linear in group.linears
    )


def is_fp8(source: Source, group: ScaleGroup) -> bool:
    """True if all weights of a group lie in FP8, with scales as the format of the group has them,
    as matrices of their own."""
    fmt = FORMATS[group.scheme.weights]
    for linear in group.linears:
        stored, block = source.fp8(linear.region.key), fmt.fp8_block(linear.shape)
        rows, columns = linear.shape
        if stored is None or linear.region != whole(linear.region.key, linear.shape):
            return False
        if block != (min(stored.block[0], rows), min(stored.block[1], columns)):
            return False
    return True


def keeps_codes(source: Source, job: Job) -> bool:
    """True if a job reads a group's stored codes, which it keeps if they are exact."""
    return isinstance(job, ScaleGroup) and (is_mxfp4(source, job) or is_fp8(source, job))


def job_bytes(job: Job) -> int:
    """Return the bytes of the source that a job reads."""
    match job:
        case ScaleGroup():
            size = BITS[job.linears[0].dtype] // 8
            return sum(math.prod(linear.shape) for linear in job.linears) * size
        case ExpertBias():
            return math.prod(job.region.shape) * BITS[job.dtype] // 8
        case RawTensor():
            return job.info.nbytes
        case KVScales():
            return 0


def observed_site(linear: LinearWeight) -> str:
    """Return the name of the place where the inputs of a linear weight are measured.

    It is the path of the linear module, or of the experts module with the product that reads the
    inputs, `gate_up` or `down`.
    """
    if linear.expert is None:
        return linear.module
    product = "down" if linear.projection is Projection.DOWN else "gate_up"
    return f"{linear.module}.{product}"


def keys_of(job: Job) -> Iterable[str]:
    """Return the raw tensors that a job reads, in the order in which it does."""
    return dict.fromkeys(key for key, *_ in slabs_of(job))


def slabs_of(job: Job) -> Iterator[tuple[str, int, int]]:
    """Yield the slabs that a job reads: raw tensor, first row, the row after the last."""
    match job:
        case ScaleGroup():
            yield from dict.fromkeys((x.region.key, *x.region.slab) for x in job.linears)
        case ExpertBias():
            yield (job.region.key, *job.region.slab)
        case RawTensor():
            yield (job.info.key, 0, job.info.rows)
        case KVScales():
            pass
