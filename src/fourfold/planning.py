"""Recipe × inventory: one explicit row for each tensor of the source. Pure data.

Everything that can fail is found here, before the first weight is read: a role or a pattern that
matches nothing, an input dimension that 16 does not divide, a scale group that would be half
quantized, a module whose layout is not known, an ignore list that no engine would read right.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from fourfold.checkpoints import modelopt
from fourfold.checkpoints.engines import write_ignore
from fourfold.checkpoints.safetensors_header import BITS, nbytes_of
from fourfold.checkpoints.source import Source
from fourfold.errors import PlanError, RecipeError, SourceError
from fourfold.models.families import family_of
from fourfold.models.inventory import (
    ExpertBias,
    Inventory,
    LinearWeight,
    RawTensor,
    take_inventory,
)
from fourfold.models.regions import Region
from fourfold.models.roles import Role
from fourfold.parallel import tensor_parallel
from fourfold.recipes import Recipe

SHARD_BYTES = 5_000_000_000
COPY_BYTES = 1 << 24
"""Tensors are copied in pieces of this size."""

GROUP_BYTES = 1 << 28
"""A scale group larger than this is read twice, in pieces, instead of being held."""

QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")


class Action(StrEnum):
    """What becomes of a source tensor."""

    QUANTIZE = "quantize"
    COPY = "copy"
    SPLIT = "split"
    """Copied value for value, one part for each expert: biases of fused experts."""


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one source tensor, and why."""

    key: str
    action: Action
    role: Role
    reason: str
    numel: int
    nbytes: int
    nbytes_after: int
    linears: int
    """How many linear weights it holds that are quantized."""


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linear weights that share one global scale; what is quantized in one go."""

    name: str
    linears: tuple[LinearWeight, ...]


Job = ScaleGroup | ExpertBias | RawTensor
"""One piece of work: a group to quantize, a bias to split off, a tensor to copy."""


@dataclass(frozen=True)
class Shard:
    """One file of the output: its tensors (name → dtype, shape), and the work that fills it."""

    unit: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    jobs: tuple[Job, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(nbytes_of(*spec) for spec in self.tensors.values())


@dataclass(frozen=True)
class Plan:
    """What will be done to what; nothing is left over."""

    source: Path
    recipe: Recipe
    inventory: Inventory
    rows: tuple[Row, ...]
    shards: tuple[Shard, ...]
    ignore: tuple[str, ...]
    side_files: tuple[Path, ...]
    dropped_files: tuple[Path, ...]
    notes: tuple[str, ...]
    """What a user should know: engines without a loader, files that are left behind."""
    tensor_parallel: Mapping[int, str]
    """Tensor-parallel size → why it will not load; empty where it will."""

    @cached_property
    def groups(self) -> tuple[ScaleGroup, ...]:
        return tuple(
            job for shard in self.shards for job in shard.jobs if isinstance(job, ScaleGroup)
        )

    @cached_property
    def linears(self) -> tuple[LinearWeight, ...]:
        """Every linear weight that is quantized."""
        return tuple(linear for group in self.groups for linear in group.linears)

    @cached_property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @cached_property
    def nbytes_after(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def memory(self, threads: int) -> int:
        """An estimate in bytes of what the job takes beside the interpreter and its libraries."""
        largest = COPY_BYTES
        for group in self.groups:
            held = job_bytes(group)
            plain = all(is_plain(linear.region) for linear in group.linears)
            largest = max(largest, min(held, GROUP_BYTES) if plain else 2 * held)
        return threads * largest * 3 // 2

    @cached_property
    def quantization_config(self) -> dict[str, Any]:
        return modelopt.quantization_config(
            self.ignore, activations=False, kv_cache=self.recipe.kv_cache != "none"
        )

    @cached_property
    def hf_quant_config(self) -> dict[str, Any]:
        return modelopt.hf_quant_config(
            self.ignore, activations=False, kv_cache=self.recipe.kv_cache != "none"
        )

    @cached_property
    def shard_names(self) -> tuple[str, ...]:
        count = len(self.shards)
        return tuple(
            f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data for JSON: one entry for each source tensor."""
        from fourfold.rendering import plan_json

        return plan_json(self)

    def __rich__(self) -> Any:
        from fourfold.rendering import render_plan

        return render_plan(self)

    def __str__(self) -> str:
        from fourfold.rendering import plain

        return plain(self)


def job_bytes(job: Job) -> int:
    """Bytes of the source that a job reads."""
    match job:
        case ScaleGroup():
            size = BITS[job.linears[0].dtype] // 8
            return sum(math.prod(linear.shape) for linear in job.linears) * size
        case ExpertBias():
            return math.prod(job.region.shape) * BITS[job.dtype] // 8
        case RawTensor():
            return job.info.nbytes


def is_plain(region: Region) -> bool:
    """Whether consecutive rows of the matrix are consecutive rows of the raw tensor."""
    return region.expert is None and not region.transposed and region.rows.step == 1


def make_plan(source: Source, recipe: Recipe, *, trust_remote_code: bool = False) -> Plan:
    """Decide what becomes of every tensor of `source`; no weight is read.

    Raises `RecipeError`, `PlanError`, `ModelError` or `SourceError`: see the module's head.
    """
    _check_not_quantized(source)
    inventory = take_inventory(source, trust_remote_code=trust_remote_code)
    selection = _Selection(recipe, inventory)
    groups = selection.groups()
    rows = tuple(selection.row(raw) for raw in inventory.tensors.values())
    quantized = [linear for group in groups for linear in group.linears]
    kept = [inventory.tensors[row.key] for row in rows if row.action is Action.COPY]
    ignore = write_ignore(
        [linear.name for linear in quantized],
        [raw.stem for raw in kept if raw.is_matrix] + list(inventory.tied_linears),
    )
    shards = tuple(_shards(groups, selection.biases(), kept, inventory))
    _check_names(shards)
    copied, dropped = source.side_files()
    return Plan(
        source=source.folder,
        recipe=recipe,
        inventory=inventory,
        rows=rows,
        shards=shards,
        ignore=tuple(ignore),
        side_files=tuple(copied),
        dropped_files=tuple(dropped),
        notes=tuple(_notes(inventory, quantized, dropped)),
        tensor_parallel=tensor_parallel(quantized, source.config),
    )


def _check_not_quantized(source: Source) -> None:
    algorithm = modelopt.is_quantized(source.config)
    if algorithm is not None:
        raise SourceError(
            f"{source.folder}: quantized already ({algorithm}). "
            "Start from the BF16, FP16 or FP32 checkpoint."
        )


class _Selection:
    """Which linear weights a recipe quantizes in this model, checked."""

    def __init__(self, recipe: Recipe, inventory: Inventory) -> None:
        self.recipe, self.inventory = recipe, inventory
        self._check_roles()
        kept = self._match_patterns()
        self.chosen = {
            linear.name: linear
            for linear in inventory.linears
            if linear.role in recipe.roles and linear.name not in kept
        }
        self.kept = kept
        self._check_chosen()
        self._check_wholeness()
        self.modules = {linear.module for linear in self.chosen.values()}

    def _check_roles(self) -> None:
        for key, reason in self.inventory.blocked.items():
            if self.inventory.tensors[key].role in self.recipe.roles:
                raise PlanError(
                    f"{key}: {reason}, so its weights cannot be cut out and quantized. "
                    f"Leave the role {self.inventory.tensors[key].role} out of the recipe."
                )
        present = {role for role, count in self.inventory.roles.items() if count}
        shown = ", ".join(f"{role} ({count})" for role, count in self.inventory.roles.items())
        for role in self.recipe.quantize:
            if role not in present:
                raise RecipeError(
                    f"recipe {self.recipe.name}: the model has no {role}. It has: {shown}."
                )
        if not self.recipe.roles & present:
            raise RecipeError(
                f"recipe {self.recipe.name}: the model has none of "
                f"{', '.join(sorted(self.recipe.roles))}. It has: {shown}."
            )

    def _match_patterns(self) -> dict[str, str]:
        """Linear weights that a `keep` pattern names: name → pattern."""
        names = [linear.name for linear in self.inventory.linears]
        kept: dict[str, str] = {}
        for pattern in self.recipe.keep:
            matches = [name for name in names if fnmatchcase(name, pattern)]
            if not matches:
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
                hint = f" The nearest: {', '.join(near)}." if near else ""
                raise RecipeError(
                    f"recipe {self.recipe.name}: keep pattern {pattern!r} matches no linear "
                    f"weight of this model.{hint}"
                )
            kept |= dict.fromkeys(matches, pattern)
        return kept

    def _check_chosen(self) -> None:
        if not self.chosen:
            raise RecipeError(f"recipe {self.recipe.name}: keep leaves nothing to quantize.")
        odd = [x for x in self.chosen.values() if x.shape[1] % modelopt.BLOCK_SIZE]
        if odd:
            raise PlanError(
                f"{odd[0].name}: input dimension {odd[0].shape[1]} is not a multiple of "
                f"{modelopt.BLOCK_SIZE} ({len(odd)} such weights). "
                "Add a keep pattern for them to the recipe."
            )
        for linear in self.chosen.values():
            if linear.dtype not in QUANTIZABLE_DTYPES:
                raise PlanError(
                    f"{linear.region.key}: dtype {linear.dtype}; only "
                    f"{', '.join(QUANTIZABLE_DTYPES)} can be quantized. Is it quantized already?"
                )

    def _check_wholeness(self) -> None:
        """Scale groups, and the experts of a layer, are quantized whole or not at all."""
        chosen: dict[str, LinearWeight] = {}
        left: dict[str, LinearWeight] = {}
        for linear in self.inventory.linears:
            side = chosen if linear.name in self.chosen else left
            side.setdefault(linear.scale_group, linear)
            if linear.expert is not None:
                side.setdefault(linear.module, linear)
        for name in chosen.keys() & left.keys():
            raise PlanError(
                f"{left[name].name} would stay as it is while {chosen[name].name} is quantized, "
                f"but engines fuse them. Widen or narrow the recipe's keep patterns "
                f"{list(self.recipe.keep)}."
            )

    def groups(self) -> list[ScaleGroup]:
        members: dict[str, list[LinearWeight]] = defaultdict(list)
        for linear in self.chosen.values():
            members[linear.scale_group].append(linear)
        return [ScaleGroup(name, tuple(linears)) for name, linears in members.items()]

    def biases(self) -> list[ExpertBias]:
        """Fused biases of experts that are written one by one."""
        return [bias for bias in self.inventory.biases if bias.module in self.modules]

    def row(self, raw: RawTensor) -> Row:
        key, numel, nbytes = raw.info.key, raw.info.numel, raw.info.nbytes
        linears = self.inventory.linears_by_key.get(key, ())
        chosen = [linear for linear in linears if linear.name in self.chosen]
        if chosen:
            after = sum(
                nbytes_of(*spec)
                for linear in chosen
                for spec in modelopt.tensors_of(linear.name, linear.shape).values()
            )
            reason = f"role {raw.role}"
            return Row(key, Action.QUANTIZE, raw.role, reason, numel, nbytes, after, len(chosen))
        if key in self._split_keys:
            reason = "its experts are written one by one"
            return Row(key, Action.SPLIT, raw.role, reason, numel, nbytes, nbytes, 0)
        reason = self._why_kept(raw, linears)
        return Row(key, Action.COPY, raw.role, reason, numel, nbytes, nbytes, 0)

    @cached_property
    def _split_keys(self) -> frozenset[str]:
        return frozenset(bias.region.key for bias in self.biases())

    def _why_kept(self, raw: RawTensor, linears: Sequence[LinearWeight]) -> str:
        pattern = next((self.kept[x.name] for x in linears if x.name in self.kept), None)
        if pattern is not None:
            return f"keep pattern {pattern!r}"
        if not linears:
            return "not a linear weight" if raw.role is not Role.MTP else "MTP"
        return f"role {raw.role} is not in the recipe"


def _shards(
    groups: Sequence[ScaleGroup],
    biases: Sequence[ExpertBias],
    kept: Sequence[RawTensor],
    inventory: Inventory,
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
    for layer in sorted(units, key=lambda layer: -1 if layer is None else layer):
        name = "shell" if layer is None else f"layer {layer}"
        jobs = [job for _, job in sorted(units[layer], key=lambda item: item[0])]
        yield from _split_unit(name, jobs)


def _split_unit(unit: str, jobs: Sequence[Job]) -> Iterable[Shard]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    taken: list[Job] = []
    size = 0
    for job in jobs:
        made = _outputs(job)
        nbytes = sum(nbytes_of(*spec) for spec in made.values())
        if taken and size + nbytes > SHARD_BYTES:
            yield Shard(unit, tensors, tuple(taken))
            tensors, taken, size = {}, [], 0
        tensors |= made
        taken.append(job)
        size += nbytes
    yield Shard(unit, tensors, tuple(taken))


def _check_names(shards: Iterable[Shard]) -> None:
    count = Counter(name for shard in shards for name in shard.tensors)
    made = Counter(name for shard in shards for job in shard.jobs for name in _outputs(job))
    twice = [name for name, times in (count | made).items() if times > 1]
    if twice:
        raise PlanError(
            f"{twice[0]}: two source tensors would be written under this name. "
            "Is a part of the checkpoint quantized already?"
        )


def _outputs(job: Job) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that a job writes: name → dtype, shape."""
    match job:
        case ScaleGroup():
            made: dict[str, tuple[str, tuple[int, ...]]] = {}
            for linear in job.linears:
                made |= modelopt.tensors_of(linear.name, linear.shape)
            return made
        case ExpertBias():
            return {f"{job.name}.bias": (job.dtype, job.region.shape)}
        case RawTensor():
            return {job.info.key: (job.info.dtype, job.info.shape)}


def _notes(
    inventory: Inventory, quantized: Sequence[LinearWeight], dropped: Sequence[Path]
) -> Iterable[str]:
    family = family_of(*inventory.model_types)
    if any(linear.expert is not None for linear in quantized) and not family.readers:
        yield (
            f"no engine is known to read NVFP4 experts of {inventory.model_types[0]}"
            + (f": {family.remark}" if family.remark else "")
        )
    dtypes = Counter(linear.dtype for linear in quantized)
    if len(dtypes) > 1:
        yield f"weights of several dtypes are quantized: {dict(dtypes)}"
    if dropped:
        names = ", ".join(str(path) for path in dropped[:3])
        yield f"{len(dropped)} other weight files are not copied: {names}"
