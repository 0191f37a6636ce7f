"""Lay out the output: which tensors lie in which shard, and the work that fills them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from fourfold.checkpoints import modelopt
from fourfold.checkpoints.safetensors_header import nbytes_of
from fourfold.errors import PlanError
from fourfold.models.inventory import ExpertBias, Inventory, RawTensor
from fourfold.planning.rows import Job, KVScales, ScaleGroup, Shard

SHARD_BYTES = 5_000_000_000
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def lay_out(
    groups: Sequence[ScaleGroup],
    biases: Sequence[ExpertBias],
    kept: Sequence[RawTensor],
    kv_scales: Sequence[KVScales],
    inventory: Inventory,
    *,
    activations: bool,
) -> Iterable[Shard]:
    """One shard for each unit (decoder layer, or the shell), more where one would be too large."""
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
        yield from _split_unit(name, layer, jobs, activations)


def _split_unit(
    unit: str, layer: int | None, jobs: Sequence[Job], activations: bool
) -> Iterable[Shard]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    taken: list[Job] = []
    size = 0
    for job in jobs:
        made = outputs_of(job, activations=activations)
        nbytes = sum(nbytes_of(*spec) for spec in made.values())
        if taken and size + nbytes > SHARD_BYTES:
            yield Shard(unit, layer, tensors, tuple(taken))
            tensors, taken, size = {}, [], 0
        tensors |= made
        taken.append(job)
        size += nbytes
    yield Shard(unit, layer, tensors, tuple(taken))


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
