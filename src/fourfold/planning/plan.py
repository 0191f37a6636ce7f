# SPDX-License-Identifier: Apache-2.0
"""Recipe × inventory → plan: one explicit row for each tensor of the source. Pure data.

Everything that can fail is found here, before the first weight is read: a role or a pattern that
matches nothing, an input dimension that the format's block does not divide, a scale group that
would be quantized in part, a module whose weights cannot be cut out, schemes that the layout cannot
express, an ignore list that some engine would misread.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fourfold.algorithms.base import RowwiseAlgorithm, algorithm_of
from fourfold.distributed.machine import threads_available
from fourfold.documents import Shown, document
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import LAYOUTS, CheckpointContents, Layout
from fourfold.layouts.recognition import check_not_quantized
from fourfold.models.agreement import agreement_notes
from fourfold.models.families import family_of
from fourfold.models.folds import Fold
from fourfold.models.inventory import Inventory, LinearWeight, RawTensor
from fourfold.models.inventory_builder import take_inventory
from fourfold.models.names import SINGLE_EXPERT
from fourfold.models.peculiarities import peculiarities_of
from fourfold.models.roles import Role
from fourfold.planning.activations import input_notes, kv_cache_notes
from fourfold.planning.copy_plan import CopyPlan
from fourfold.planning.exact_casts import exact_cast_notes
from fourfold.planning.folding import plan_folds
from fourfold.planning.limits import DEFAULT_LIMITS, Limits
from fourfold.planning.placement import placement_notes
from fourfold.planning.rows import (
    Action,
    Job,
    KVScales,
    ScaleGroup,
    job_bytes,
    observed_site,
    slabs_of,
)
from fourfold.planning.selection import Selection
from fourfold.planning.shards import check_kept, check_names, lay_out
from fourfold.planning.tensor_parallel import marlin_notes, tensor_parallel
from fourfold.planning.text import role_lines, tensor_parallel_lines
from fourfold.recipes import Recipe
from fourfold.sources.rounded import is_rounded
from fourfold.statistics import BLOCK_AMAXES, KEPT, SMALL, PooledMoment, SecondMoment, Site
from fourfold.statistics import STATISTICS as ALL_STATISTICS
from fourfold.storage.names import CARD, FOLDS, REPORT, SOURCE_CARD, STATISTICS, SUMMARY
from fourfold.storage.side_files import SideFiles, describe
from fourfold.storage.source import Source
from fourfold.storage.units import size

FLOAT32_ELEMENTS = 1 << 28
"""Elements of a decoder layer up to which sequential calibration computes in float32."""

BUDGET = (
    "the recipe has a budget: quantize measures what the model's components cost, and stores some "
    "otherwise than the rules say. This is the plan of the rules alone"
)

NO_KV_SCALES = (
    "no attention layer here has a k_proj that engines know a KV scale for (MLA's latent cache, "
    "Wqkv): they take 1.0, and there is nothing to calibrate"
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Shown, CopyPlan):
    """The plan for a source: it says of every tensor how it is treated."""

    recipe: Recipe
    ignore: tuple[str, ...]
    decoded_from: Mapping[str, int]
    """The number of tensors that are decoded from each quantized form; empty unless the source is
    quantized."""
    tensor_parallel: Mapping[int, str]
    """Why a checkpoint does not load, by tensor-parallel size; empty if it does."""
    is_live: bool = False
    """True if the source is a model in memory: calibration observes all layers at a time."""
    folds: Mapping[str, Fold] = field(default_factory=dict)
    """The folds that factors are searched for, by name; empty unless the recipe folds."""

    @cached_property
    def layout(self) -> Layout:
        """The layout of the checkpoint that is written."""
        return LAYOUTS[self.recipe.layout]

    @property
    def settings(self) -> Any:
        """The recipe, as plain data."""
        return self.recipe.model_dump(mode="json")

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
    def schemes(self) -> Mapping[str, Scheme]:
        """The scheme of every linear weight that is quantized, by name."""
        return {linear.name: group.scheme for group in self.groups for linear in group.linears}

    def scheme_of(self, linear: LinearWeight) -> Scheme:
        """Return the scheme of a linear weight that is quantized."""
        return self.schemes[linear.name]

    @cached_property
    def largest_job(self) -> int:
        """Bytes that the largest job has in memory at a time."""
        return max(self.limits.copy_bytes, *map(self._memory_of, self.groups), 0)

    def _memory_of(self, group: ScaleGroup) -> int:
        """Bytes of a group that are in memory at a time; a matrix that is not plain is copied."""
        held, most = job_bytes(group), self.limits.group_bytes
        is_whole = not isinstance(algorithm_of(group.scheme), RowwiseAlgorithm)
        if all(linear.region.is_plain for linear in group.linears):
            return held if is_whole else min(held, most)
        if is_whole or held <= most:
            return 2 * held
        slabs = ((self.inventory.tensors[key].info, rows) for key, *rows in slabs_of(group))
        return 2 * max(info.nbytes // info.shape[0] * (b - a) for info, (a, b) in slabs)

    @cached_property
    def sites(self) -> Mapping[str, tuple[LinearWeight, ...]]:
        """The quantized linear weights whose inputs have a stored scale, by input site."""
        sites: dict[str, list[LinearWeight]] = defaultdict(list)
        for linear in self.linears:
            if self.scheme_of(linear).has_input_scale:
                sites[linear.input_site].append(linear)
        return {site: tuple(linears) for site, linears in sites.items()}

    def needs_of(self, linear: LinearWeight) -> frozenset[str]:
        """Return the statistics of a linear weight's inputs that calibration measures, by name.

        Where anything is measured, the small ones are, too: they are reported for every weight.
        """
        scheme, needs = self.scheme_of(linear), self.algorithm_needs(linear)
        if scheme.observes_inputs and scheme.amax == "histogram":
            needs |= {BLOCK_AMAXES}
        return needs | SMALL if needs or scheme.observes_inputs else needs

    def algorithm_needs(self, linear: LinearWeight) -> frozenset[str]:
        """Return the statistics of a linear weight's inputs that its algorithm reads, by name."""
        site = self._site(linear, observed_site(linear))
        return algorithm_of(self.scheme_of(linear)).needs_at(site)

    @cached_property
    def observed(self) -> tuple[LinearWeight, ...]:
        """The linear weights whose inputs calibration measures."""
        return tuple(linear for linear in self.linears if self.needs_of(linear))

    @cached_property
    def _measured(self) -> Mapping[tuple[Site, str], int | None]:
        """The statistics of inputs that calibration measures, and the layer of each."""
        return {
            (self.site(linear, name), name): linear.layer
            for linear in self.observed
            for name in self.needs_of(linear)
        }

    @cached_property
    def statistics(self) -> Mapping[str, frozenset[str]]:
        """The statistics that calibration measures: names by `observed_site`."""
        needs: dict[str, frozenset[str]] = defaultdict(frozenset)
        for site, name in self._measured:
            needs[site.name] |= {name}
        for job in self.kv_scales:
            needs[f"{self.inventory.layer_paths[job.layer]}.kv"] = frozenset({"amax"})
        return dict(needs)

    def site_of(self, linear: LinearWeight, statistic: str) -> str:
        """Return the name of the site where a statistic of a linear weight's inputs is measured.

        Small statistics are measured at every module. Large ones are measured once for the modules
        that read the same activation, such as q, k and v.
        """
        if statistic in SMALL or linear.expert is not None:
            return observed_site(linear)
        return self._shared_sites[_activation_of(linear), statistic]

    @cached_property
    def _shared_sites(self) -> Mapping[tuple[str, str], str]:
        """By activation and statistic, the first module that reads it and needs the statistic."""
        sites: dict[tuple[str, str], str] = {}
        for linear in self.observed:
            if linear.expert is None:
                for name in self.needs_of(linear):
                    sites.setdefault((_activation_of(linear), name), observed_site(linear))
        return sites

    def site(self, linear: LinearWeight, statistic: str) -> Site:
        """Return the site where a statistic of a linear weight's inputs is measured."""
        return self._site(linear, self.site_of(linear, statistic))

    def _site(self, linear: LinearWeight, name: str) -> Site:
        experts = None
        if linear.expert is not None:
            experts = self.inventory.experts_counts.get(linear.module)  # None in an MTP layer
        return Site(name, linear.shape[1], experts)

    def statistics_memory(self, *, pooled: bool = False) -> int:
        """Return the bytes of all statistics that are kept, and of the others of the layer with the
        most; of a model in memory, of the others of all layers, and once more that layer's means,
        which take half as much.

        `pooled`: as if gate and up of all experts of a layer shared one second moment.
        """
        large: Counter[int | None] = Counter()
        small = 0
        for (site, name), layer in self._measured.items():
            if pooled and name == SecondMoment.name and site.name.endswith(".gate_up"):
                name = PooledMoment.name
            nbytes = ALL_STATISTICS[name].nbytes(site)
            if name in KEPT:
                small += nbytes
            else:
                large[layer] += nbytes
        most = max(large.values(), default=0)
        if self.is_live:
            return small + large.total() + most // 2
        return small + int(self._copies_of_large * most)

    @property
    def _copies_of_large(self) -> float:
        """How often large statistics are in memory, in float64. In sequential calibration there are
        cross moments, and means in float32 beside the sums."""
        if not self.is_sequential:
            return 1
        return 3 if self.recipe.calibration.asymmetric else 1.5

    @property
    def needs_calibration(self) -> bool:
        """True if there is anything to observe, which the recipe wants and the model has."""
        return bool(self.observed or self.kv_scales)

    @cached_property
    def expert_count(self) -> int:
        """The number of experts that are quantized, over all layers."""
        inside = {(x.module, x.expert) for x in self.linears if x.expert is not None}
        alone = {
            x.name[: match.end()]
            for x in self.linears
            if x.expert is None and (match := SINGLE_EXPERT.search(x.name))
        }
        return len(inside) + len(alone)

    @cached_property
    def kv_scales(self) -> tuple[KVScales, ...]:
        """The scales of keys and values that calibration measures."""
        jobs = (job for shard in self.shards for job in shard.jobs)
        return tuple(job for job in jobs if isinstance(job, KVScales) and job.is_calibrated)

    @cached_property
    def contents(self) -> CheckpointContents:
        """The facts that the configuration files must state."""
        peculiar = peculiarities_of(*self.inventory.model_types)
        return CheckpointContents(self.schemes, self.ignore, self.recipe.kv_format, peculiar)

    @cached_property
    def quantization_config(self) -> dict[str, Any]:
        """The value of `quantization_config` in config.json."""
        return self.layout.quantization_config(self.contents)

    @cached_property
    def config_files(self) -> dict[str, dict[str, Any]]:
        """The contents of configuration files besides config.json, by file name."""
        return self.layout.config_files(self.contents)

    @property
    def _digested(self) -> Any:
        return self.ignore

    @cached_property
    def calibration_memory(self) -> int:
        """Bytes that running the model takes besides activations.

        They are the non-layer tensors, a layer three times (as it lies on disk, as transformers
        holds it, and in between while it is loaded), and the statistics. Where quantized layers
        are run, too, transformers holds a layer twice. A model in memory is there already.
        """
        if not (self.needs_calibration or self.folds):
            return 0
        if self.is_live:
            return self.statistics_memory()
        outside, layer = self._largest_parts(_nbytes)
        copies = 3 * layer
        if self.is_sequential:
            copies = layer + 2 * (self._layer_elements * 4 if self.computes_in_float32 else layer)
        return outside + copies + self.statistics_memory()

    @cached_property
    def variants_memory(self) -> int:
        """Bytes that measuring a component in several formats takes besides hidden states.

        They are the non-layer tensors, a layer as it lies on disk, and in float32 that of the
        source, the one that most variants have, and that of one more.
        """
        outside, elements = self._largest_parts(_numel)
        return 4 * (outside + 3 * elements) + self._largest_parts(_nbytes)[1]

    @cached_property
    def repeats_layers(self) -> bool:
        """True if a layer that is observed but not written must run again in a resumed run: what
        its algorithms read is not stored."""
        return self.is_sequential or any(name not in KEPT for _, name in self._measured)

    @property
    def is_sequential(self) -> bool:
        """True if each part of a layer is quantized on what the parts before it compute."""
        return self.needs_calibration and self.recipe.calibration.propagate == "quantized"

    @property
    def computes_in_float32(self) -> bool:
        """True if calibration runs the model in float32, whatever its weights have.

        Values of codes are not rounded to 16 bits then, which costs 4 % of KL where one layer's
        errors are to be made up for by the next. A large layer would take too much memory.
        """
        return self.is_sequential and self._layer_elements <= FLOAT32_ELEMENTS

    @cached_property
    def _layer_elements(self) -> int:
        """The number of elements of the largest decoder layer."""
        return self._largest_parts(_numel)[1]

    def _largest_parts(self, measure: Callable[[RawTensor], int]) -> tuple[int, int]:
        """The bytes, or elements, of the non-layer tensors and of the largest decoder layer."""
        sizes: Counter[int | None] = Counter()
        for raw in self.inventory.tensors.values():
            if raw.role not in {Role.VISION, Role.MTP}:
                sizes[raw.layer] += measure(raw)
        layers = (size for layer, size in sizes.items() if layer is not None)
        return sizes[None], max(layers, default=0)

    @property
    def _reports(self) -> Sequence[str]:
        statistics = (STATISTICS,) if self.needs_calibration else ()
        factors = (FOLDS,) if self.folds else ()
        return (*statistics, *factors, SUMMARY, REPORT, CARD, *self.config_files)

    def name_in_output(self, side_file: Path) -> str:
        """As its path in the source, but for the model card: the output has its own."""
        return SOURCE_CARD if side_file == Path(CARD) else super().name_in_output(side_file)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON, with one entry for each source tensor."""
        return document(
            "plan",
            source=str(self.source),
            architecture=self.inventory.architecture,
            model_types=list(self.inventory.model_types),
            recipe=self.recipe.model_dump(mode="json"),
            bytes_before=self.nbytes,
            bytes_after=self.nbytes_after,
            memory_bytes=self.memory(threads_available()) + self.calibration_memory,
            linear_weights=len(self.linears),
            tensor_parallel={str(n): why or "loads" for n, why in self.tensor_parallel.items()},
            notes=list(self.notes),
            side_files=[str(path) for path in self.side_files.copied],
            dropped_files={str(path): why.value for path, why in self.side_files.left_out},
            quantization_config=self.quantization_config,
            tensors=[
                {
                    "name": row.key,
                    "role": row.role.value,
                    "action": row.action.value,
                    "reason": row.reason,
                    "bytes_before": row.nbytes,
                    "bytes_after": row.nbytes_after,
                    "linear_weights": row.linears,
                }
                for row in self.rows
            ],
            shards=[
                {
                    "file": name,
                    "unit": shard.unit,
                    "tensors": len(shard.tensors),
                    "bytes": shard.nbytes,
                }
                for name, shard in zip(self.shard_names, self.shards, strict=True)
            ],
        )

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """The plan for people; its table has no more columns than fit into `width` characters."""
        memory = size(self.memory(threads_available()) + self.calibration_memory)
        disk = size(self.nbytes_after + self.side_files.nbytes)
        written = sum(len(shard.tensors) for shard in self.shards)
        lines = [
            f"{self.source}: {self.inventory.architecture} → recipe {self.recipe.name}",
            *role_lines(self.rows, width),
            *tensor_parallel_lines(self.tensor_parallel),
            f"{len(self.rows):,} tensors in, {written:,} out in {len(self.shards)} shards · "
            f"{len(self.linears):,} linear weights to quantize · "
            f"{len(self.ignore):,} ignore entries",
            f"disk {disk} · memory about {memory}, plus half a GB for Python and PyTorch",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def _activation_of(linear: LinearWeight) -> str:
    """The name of the activation that a linear module reads. Experts that are modules of their own
    share an input scale, and not the rows that they read."""
    expert = SINGLE_EXPERT.search(linear.name)
    return linear.input_site if expert is None else (
        f"{linear.input_site} of {linear.name[: expert.end()]}"
    )  # fmt: skip


def make_plan(
    source: Source, recipe: Recipe, *, parts: int = 1, limits: Limits = DEFAULT_LIMITS
) -> Plan:
    """Decide how every tensor of `source` is treated.

    No weight is read, with two exceptions: tensors that stand for one parameter are compared, and
    the exponents of MXFP4 weights tell how many are cast without loss.

    Args:
        source: The checkpoint.
        recipe: What to quantize, and how.
        parts: The least number of shards of a decoder layer.
        limits: Sizes that bound memory and files.

    Raises:
        RecipeError: The recipe names something that the model lacks.
        PlanError: The recipe cannot be carried out on this model.
        ModelError: The architecture is unknown, or cannot be taken apart.
        SourceError: The checkpoint is broken, or quantized in a form that no codec reads.
    """
    check_not_quantized(source)
    inventory = take_inventory(source)
    placement = [*placement_notes(source, inventory), *agreement_notes(source, inventory)]
    selection = Selection(recipe, inventory)
    groups = selection.groups()
    decoded = source.decoded
    rows = tuple(
        replace(selection.row(raw), is_decoded=raw.info.key in decoded)
        for raw in inventory.tensors.values()
    )
    quantized = [linear for group in groups for linear in group.linears]
    kept = [inventory.tensors[row.key] for row in rows if row.action is Action.COPY]
    ignore = selection.layout.ignore(
        [linear.name for linear in quantized],
        [raw.stem for raw in kept if raw.is_matrix] + list(inventory.tied_linears),
        peculiarities_of(*inventory.model_types),
    )
    kv_scales = selection.kv_scales()
    jobs: list[Job] = [*groups, *selection.biases(), *kept, *kv_scales]
    shards = tuple(lay_out(jobs, inventory, layout=selection.layout, parts=parts, limits=limits))
    check_names(shards, selection.layout)
    check_kept(kept, selection.layout)
    side_files = _side_files(source)
    folds: Mapping[str, Fold] = {}
    fold_notes: list[str] = []
    if recipe.folds != "none":
        folds, note = plan_folds(source, inventory, groups)
        fold_notes.append(note)
    return Plan(
        source=source.place,
        recipe=recipe,
        inventory=inventory,
        rows=rows,
        shards=shards,
        ignore=tuple(ignore),
        side_files=side_files,
        notes=(
            *source.notes,
            *([BUDGET] if recipe.budget is not None else ()),
            *([NO_KV_SCALES] if recipe.calibrates_kv and not kv_scales else ()),
            *fold_notes,
            *placement,
            *_notes(inventory, groups, side_files),
            *input_notes(groups),
            *kv_cache_notes(recipe, inventory, source.config),
            *exact_cast_notes(source, groups),
            *_dtype_note(kept, source.config),
            *_architecture_note(inventory, source.config),
        ),
        decoded_from=Counter(decoded.values()),
        folds=folds,
        tensor_parallel=tensor_parallel(quantized, selection.schemes, source.config),
        parts=parts,
        fetches=not source.fetching.is_here,
        is_live=source.model is not None,
        limits=limits,
    )


def _side_files(source: Source) -> SideFiles:
    """The files beside the weights, without those that the output has of its own."""
    side_files = source.side_files().without({SUMMARY, REPORT, STATISTICS, FOLDS})
    if Path(CARD) in side_files.copied:
        side_files = side_files.without({SOURCE_CARD})
    return side_files


def _architecture_note(inventory: Inventory, config: Mapping[str, Any]) -> Iterable[str]:
    stated = config.get("model_type")
    if isinstance(stated, str) and stated != inventory.model_types[0]:
        yield (
            f"model_type is {stated}, which transformers lacks: it is read as "
            f"{inventory.architecture}, and the checkpoint's own code does not run"
        )


def _dtype_note(kept: Iterable[RawTensor], config: Mapping[str, Any]) -> Iterable[str]:
    """FP32 tensors that are copied where the configuration says 16 bits."""
    dtype = config.get("dtype", config.get("torch_dtype"))
    wide = [raw.info for raw in kept if raw.is_matrix and is_rounded(raw.info)]
    if wide and dtype in ("bfloat16", "float16"):
        yield (
            f"{len(wide):,} copied matrices stay FP32 ({size(sum(x.nbytes for x in wide))}) beside "
            f"dtype {dtype} in config.json; `dtype=bfloat16` reads them as BF16"
        )


def _notes(
    inventory: Inventory, groups: Sequence[ScaleGroup], side_files: SideFiles
) -> Iterable[str]:
    quantized = [linear for group in groups for linear in group.linears]
    formats = " and ".join(
        FORMATS[name].title for name in dict.fromkeys(group.scheme.weights for group in groups)
    )
    family = family_of(*inventory.model_types)
    if any(linear.expert is not None for linear in quantized) and not family.readers:
        yield (
            f"no engine is known to read {formats} experts of {inventory.model_types[0]}"
            + (f": {family.remark}" if family.remark else "")
        )
    yield from marlin_notes(quantized)
    dtypes = Counter(linear.dtype for linear in quantized)
    if len(dtypes) > 1:
        yield f"weights of several dtypes are quantized: {dict(dtypes)}"
    if side_files.left_out:
        yield f"{len(side_files.left_out)} files are not copied: {describe(side_files.left_out)}"
    if not side_files.has_tokenizer:
        yield (
            "the source has no tokenizer, so the output has none either. Copy its files into OUT, "
            "or name another folder to the engine"
        )


def _nbytes(raw: RawTensor) -> int:
    return raw.info.nbytes


def _numel(raw: RawTensor) -> int:
    return raw.info.numel
