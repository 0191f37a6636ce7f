# SPDX-License-Identifier: Apache-2.0
"""The shards of the output: which tensors each holds, and the jobs that fill it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from fourfold.errors import PlanError
from fourfold.formats.base import Spec, source_ratio
from fourfold.layouts.base import Layout
from fourfold.models.inventory import ExpertBias, Inventory, RawTensor
from fourfold.planning.limits import DEFAULT_LIMITS, Limits
from fourfold.planning.rows import Job, KVScales, ScaleGroup, Shard
from fourfold.storage.safetensors_header import FLOATS, nbytes_of


def lay_out(
    jobs: Iterable[Job],
    inventory: Inventory,
    *,
    layout: Layout,
    parts: int = 1,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterable[Shard]:
    """Yield the shards: `parts` for each decoder layer and for the non-layer tensors.

    There are more where a shard would be too large, and fewer where there is too little to cut.
    """
    units: dict[int | None, list[tuple[tuple[str, int, int], Job]]] = defaultdict(list)
    for job in jobs:
        layer, position = _place(job, inventory)
        units[layer].append((position, job))
    for layer in sorted(units, key=lambda layer: -1 if layer is None else layer):
        name = "shell" if layer is None else f"layer {layer}"
        ordered = [job for _, job in sorted(units[layer], key=lambda item: item[0])]
        bundles = [outputs_of(job, layout) for job in ordered]
        for begin, end in cut(bundles, parts, limits.shard_bytes):
            tensors = {name: spec for bundle in bundles[begin:end] for name, spec in bundle.items()}
            yield Shard(name, layer, tensors, tuple(ordered[begin:end]))


def _place(job: Job, inventory: Inventory) -> tuple[int | None, tuple[str, int, int]]:
    """A job's layer, and what orders the jobs of a layer: as the source's tensors lie on disk."""
    within = 0
    match job:
        case ScaleGroup():
            first = job.linears[0]
            layer, key, within = first.layer, first.region.key, first.expert or 0
        case ExpertBias():
            layer, key = job.layer, job.region.key
        case RawTensor():
            layer, key = job.layer, job.info.key
        case KVScales():
            return job.layer, ("", 0, 0)
    info = inventory.tensors[key].info
    return layer, (str(info.file), info.start, within)


def cut(
    bundles: Sequence[Mapping[str, Spec]],
    parts: int,
    shard_bytes: int = DEFAULT_LIMITS.shard_bytes,
) -> Iterable[tuple[int, int]]:
    """Yield where a unit is cut into shards, as ranges of bundles.

    A bundle holds the tensors that one job writes, and stays together. The cuts depend on the
    bundles alone, so that `merge` can cut the shards of a unit again.
    """
    sizes = [sum(nbytes_of(*spec) for spec in bundle.values()) for bundle in bundles]
    efforts = [effort(bundle) for bundle in bundles]
    total, passed, begin, size, present = max(1, sum(efforts)), 0, 0, 0, 0
    for number, (nbytes, takes) in enumerate(zip(sizes, efforts, strict=True)):
        middle = (2 * passed + takes) * parts // (2 * total)
        part = min(middle, parts - 1)  # a bundle is of the part where its middle lies
        if number > begin and (part > present or size + nbytes > shard_bytes):
            yield begin, number
            begin, size = number, 0
        present, passed, size = max(part, present), passed + takes, size + nbytes
    if begin < len(bundles):
        yield begin, len(bundles)


def effort(tensors: Mapping[str, Spec]) -> int:
    """Return how much work tensors are to write: about the bytes that they are made from."""
    return sum(nbytes_of(*spec) * source_ratio(spec[0]) for spec in tensors.values())


def deal(
    shards: Sequence[Shard],
    unfinished: Iterable[int],
    ranks: int,
    nearness: Callable[[Shard], Sequence[int] | None] = lambda shard: None,
) -> list[list[int]]:
    """Return the numbers of each rank's shards: balanced within each unit, and over all of them.

    Args:
        shards: All shards of the plan.
        unfinished: Numbers of those that are still to be written.
        ranks: The number of ranks.
        nearness: Bytes of a shard's source that each rank holds; the rank with the most writes it.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    units: dict[int | None, list[int]] = defaultdict(list)
    for number in unfinished:
        units[shards[number].layer].append(number)
    for numbers in units.values():
        here = [0] * ranks
        for number in sorted(numbers, key=lambda number: (-effort(shards[number].tensors), number)):
            near = nearness(shards[number]) or [0] * ranks
            rank = min(range(ranks), key=lambda rank: (-near[rank], here[rank], totals[rank], rank))
            here[rank] += effort(shards[number].tensors)
            totals[rank] += effort(shards[number].tensors)
            dealt[rank].append(number)
    return [sorted(numbers) for numbers in dealt]


def shard_names(count: int) -> tuple[str, ...]:
    """Return the names of a checkpoint's shards, as Hugging Face numbers them."""
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def check_names(shards: Iterable[Shard], layout: Layout) -> None:
    """Raise `PlanError` if two jobs write a tensor of the same name."""
    jobs = [job for shard in shards for job in shard.jobs]
    count = Counter(name for job in jobs for name in outputs_of(job, layout))
    twice = [name for name, times in count.items() if times > 1]
    if twice:
        raise PlanError(
            f"{twice[0]}: two source tensors would be written under this name. "
            "Is a part of the checkpoint quantized already?"
        )


def check_kept(kept: Iterable[RawTensor], layout: Layout) -> None:
    """Raise `PlanError` if a copied tensor looks like a part of a quantized linear layer."""
    for raw in kept:
        leaf = raw.info.key.rpartition(".")[2]
        if leaf in layout.part_names:
            raise PlanError(
                f"{raw.info.key} in {raw.info.file.name}: engines would take it for a part of a "
                "quantized layer. Is the checkpoint quantized already?"
            )
        if raw.is_matrix and raw.info.dtype not in FLOATS:
            raise PlanError(
                f"{raw.info.key} in {raw.info.file.name}: a weight of {raw.info.dtype}, which "
                "no engine reads beside quantized weights. Is the checkpoint quantized already?"
            )


def outputs_of(job: Job, layout: Layout) -> dict[str, Spec]:
    """Return the tensors that a job writes: name → dtype, shape."""
    match job:
        case ScaleGroup():
            return {
                spec.name: (spec.dtype, spec.shape)
                for linear in job.linears
                for spec in layout.tensors(linear.name, linear.shape, job.scheme).values()
            }
        case ExpertBias():
            return {f"{job.name}.bias": (job.dtype, job.region.shape)}
        case RawTensor():
            return {job.info.key: (job.info.dtype, job.info.shape)}
        case KVScales():
            return dict.fromkeys((job.k_name, job.v_name), layout.kv_scale)
