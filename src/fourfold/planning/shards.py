"""Lay out the output: which tensors lie in which shard, and the work that fills them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from fourfold.errors import PlanError
from fourfold.layouts import modelopt
from fourfold.models.inventory import ExpertBias, Inventory, RawTensor
from fourfold.planning.rows import Job, KVScales, ScaleGroup, Shard
from fourfold.storage.safetensors_header import nbytes_of

SHARD_BYTES = 5_000_000_000
PACKED = "U8"
"""The dtype of packed E2M1 codes."""

Spec = tuple[str, tuple[int, ...]]
"""A tensor's dtype and shape."""

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def lay_out(
    groups: Sequence[ScaleGroup],
    biases: Sequence[ExpertBias],
    kept: Sequence[RawTensor],
    kv_scales: Sequence[KVScales],
    inventory: Inventory,
    *,
    activations: bool,
    parts: int = 1,
) -> Iterable[Shard]:
    """`parts` shards for each unit (decoder layer, or the shell), more where they would be too
    large, fewer where there is too little to part."""
    units: dict[int | None, list[tuple[tuple[str, int, int], Job]]] = defaultdict(list)

    def add(job: Job, layer: int | None, key: str, within: int = 0) -> None:
        info = inventory.tensors[key].info
        units[layer].append(((str(info.file), info.start, within), job))

    for group in groups:
        first = group.linears[0]
        add(group, first.layer, first.region.key, first.expert or 0)
    for number, bias in enumerate(biases):
        add(bias, bias.layer, bias.region.key, number)
    for raw in kept:
        add(raw, raw.layer, raw.info.key)
    for scales in kv_scales:
        units[scales.layer].append((("", 0, 0), scales))
    for layer in sorted(units, key=lambda layer: -1 if layer is None else layer):
        name = "shell" if layer is None else f"layer {layer}"
        jobs = [job for _, job in sorted(units[layer], key=lambda item: item[0])]
        made = [outputs_of(job, activations=activations) for job in jobs]
        for begin, end in cut(made, parts):
            tensors = {name: spec for each in made[begin:end] for name, spec in each.items()}
            yield Shard(name, layer, tensors, tuple(jobs[begin:end]))


def cut(bundles: Sequence[Mapping[str, Spec]], parts: int) -> Iterable[tuple[int, int]]:
    """Where a unit is cut into shards. A bundle is what one job writes, and stays together.

    Depends on the bundles alone, so that whoever has the shards of a unit can cut them anew.
    """
    sizes = [sum(nbytes_of(*spec) for spec in bundle.values()) for bundle in bundles]
    efforts = [effort(bundle) for bundle in bundles]
    total, passed, begin, size, present = max(1, sum(efforts)), 0, 0, 0, 0
    for number, (nbytes, takes) in enumerate(zip(sizes, efforts, strict=True)):
        middle = (2 * passed + takes) * parts // (2 * total)
        part = min(middle, parts - 1)  # a bundle is of the part where its middle lies
        if number > begin and (part > present or size + nbytes > SHARD_BYTES):
            yield begin, number
            begin, size = number, 0
        present, passed, size = max(part, present), passed + takes, size + nbytes
    if begin < len(bundles):
        yield begin, len(bundles)


def effort(tensors: Mapping[str, Spec]) -> int:
    """How much work tensors are to write: about the bytes that they are made from.

    What is packed was 16 bits wide, four times as wide as it is now.
    """
    return sum(nbytes_of(*spec) * (4 if spec[0] == PACKED else 1) for spec in tensors.values())


def deal(
    shards: Sequence[Shard],
    unfinished: Iterable[int],
    ranks: int,
    nearness: Callable[[Shard], Sequence[int] | None] = lambda shard: None,
) -> list[list[int]]:
    """The shards' numbers for each rank: even within each unit, and over all of them.

    nearness: bytes of a shard's source that each rank has; the one with the most writes it.
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
    """The files of a checkpoint, as Hugging Face numbers them."""
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def check_names(shards: Iterable[Shard], *, activations: bool) -> None:
    jobs = [job for shard in shards for job in shard.jobs]
    count = Counter(name for shard in shards for name in shard.tensors)
    made = Counter(name for job in jobs for name in outputs_of(job, activations=activations))
    twice = [name for name, times in (count | made).items() if times > 1]
    if twice:
        raise PlanError(
            f"{twice[0]}: two source tensors would be written under this name. "
            "Is a part of the checkpoint quantized already?"
        )


def check_kept(kept: Iterable[RawTensor]) -> None:
    """No tensor that is copied may look like a part of a quantized linear layer."""
    for raw in kept:
        leaf = raw.info.key.rpartition(".")[2]
        if leaf in modelopt.PARTS:
            raise PlanError(
                f"{raw.info.key} in {raw.info.file.name}: engines would take it for a part of a "
                "quantized layer. Is the checkpoint quantized already?"
            )
        if raw.is_matrix and raw.info.dtype not in FLOAT_DTYPES:
            raise PlanError(
                f"{raw.info.key} in {raw.info.file.name}: a weight of {raw.info.dtype}, which "
                "no engine reads beside NVFP4. Is the checkpoint quantized already?"
            )


def outputs_of(job: Job, *, activations: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a job writes: name → dtype, shape."""
    match job:
        case ScaleGroup():
            made: dict[str, tuple[str, tuple[int, ...]]] = {}
            for linear in job.linears:
                made |= modelopt.tensors_of(linear.name, linear.shape, activations=activations)
            return made
        case ExpertBias():
            return {f"{job.name}.bias": (job.dtype, job.region.shape)}
        case RawTensor():
            return {job.info.key: (job.info.dtype, job.info.shape)}
        case KVScales():
            return dict.fromkeys((job.k_name, job.v_name), ("F32", ()))
