# SPDX-License-Identifier: Apache-2.0
"""Builds the contents of `quant_summary.json` from a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from fourfold._version import __version__
from fourfold.calibration.scales import ActivationScales
from fourfold.execution import LinearResult
from fourfold.models.inventory import ExpertBias, LinearWeight
from fourfold.models.names import natural
from fourfold.models.regions import Region, whole
from fourfold.planning import Plan, Scheme, outputs_of
from fourfold.planning.text import by_role
from fourfold.sources.folded import Factors
from fourfold.storage.names import storable
from fourfold.storage.non_finite import NonFinite
from fourfold.storage.quant_summary import (
    SCHEMA_VERSION,
    BiasEntry,
    BudgetEntry,
    CalibrationEntry,
    DecodedEntry,
    ExpertsEntry,
    FoldEntry,
    FoldsEntry,
    KVCacheEntry,
    Ledger,
    LinearEntry,
    NonFiniteEntry,
    QuantSummary,
    RawRegion,
    RawTensorEntry,
    RepairEntry,
    RoleEntry,
    ShardEntry,
)


def summarize(
    plan: Plan,
    linears: Sequence[LinearResult],
    scales: ActivationScales | None = None,
    non_finite: Sequence[NonFinite] = (),
    budget: BudgetEntry | None = None,
    factors: Factors | None = None,
) -> QuantSummary:
    """Return the summary of a run.

    It depends only on the source, the recipe, the calibration and the versions.

    Args:
        plan: The plan that was executed.
        linears: The result of every linear weight, sorted by name.
        scales: The calibrated scales, if the recipe needed any.
        non_finite: The NaN and Inf in copied tensors.
        budget: What the recipe's budget was spent on, if it has one.
        factors: What the source is folded with, if the recipe folds.
    """
    calibration = None
    if scales is not None:
        unreached = sum(map(len, scales.unreached().values()))
        data = asdict(scales.statistics.data)
        calibration = CalibrationEntry(**data, unreached_experts=unreached)
    elif factors is not None:
        calibration = CalibrationEntry(**factors.texts)
    planned = {linear.name: linear for linear in plan.linears}
    if_any: dict[str, Any] = {
        "repairs": tuple(RepairEntry(name=x.name, repair=x.repair) for x in linears if x.repair),
        "non_finite": tuple(map(_non_finite, non_finite)),
        "decoded_from": tuple(
            DecodedEntry(form=form, tensors=count) for form, count in plan.decoded_from.items()
        ),
        "budget": budget,
    }
    if factors is not None:
        if_any["folds"] = FoldsEntry(
            digest=factors.digest, choices=tuple(map(FoldEntry.model_validate, factors.choices))
        )
    return QuantSummary(
        **{name: entries for name, entries in if_any.items() if entries},
        producer=f"fourfold {__version__}",
        schema_version=SCHEMA_VERSION,
        versions=versions(),
        model=storable(plan.model),
        recipe=plan.recipe.model_dump(mode="json"),
        model_type=plan.inventory.model_types[0],
        architecture=plan.inventory.architecture,
        ledger=Ledger(
            source_tensors=len(plan.rows),
            linear_weights_planned=len(plan.linears),
            linear_weights_quantized=len(linears),
            tensors_written=sum(len(shard.tensors) for shard in plan.shards),
            bytes_before=plan.nbytes,
            bytes_after=plan.nbytes_after,
        ),
        roles=tuple(_roles(plan)),
        calibration=calibration,
        kv_cache=() if scales is None else tuple(_kv_cache(scales)),
        files=tuple(plan.files),
        shards=tuple(_shards(plan)),
        experts=() if scales is None else tuple(_experts(plan, scales)),
        raw_tensors=tuple(_raw_tensors(plan)),
        biases=tuple(BiasEntry(name=bias.name, raw=_raw(bias.region)) for bias in _biases(plan)),
        linears=tuple(
            _linear(result, planned[result.name], plan.schemes[result.name]) for result in linears
        ),
    )


def _non_finite(entry: NonFinite) -> NonFiniteEntry:
    return NonFiniteEntry.model_validate(asdict(entry))


def versions() -> dict[str, str]:
    """Return the versions of the packages that influence the output."""
    names = ("torch", "transformers", "numpy", "numba")
    return {"fourfold": __version__} | {name: metadata.version(name) for name in names}


def _roles(plan: Plan) -> Iterator[RoleEntry]:
    for (role, what), rows in by_role(plan.rows):
        yield RoleEntry(
            role=role,
            what=what,
            tensors=len(rows),
            linear_weights=sum(row.linears for row in rows),
            numel=sum(row.numel for row in rows),
            bytes_before=sum(row.nbytes for row in rows),
            bytes_after=sum(row.nbytes_after for row in rows),
        )


def _kv_cache(scales: ActivationScales) -> Iterator[KVCacheEntry]:
    for job in scales.plan.kv_scales:
        k_scale, v_scale = scales.kv(job)
        yield KVCacheEntry(name=job.name, k_scale=k_scale, v_scale=v_scale)


def _shards(plan: Plan) -> Iterator[ShardEntry]:
    for name, shard in zip(plan.shard_names, plan.shards, strict=True):
        jobs = (len(outputs_of(job, plan.layout)) for job in shard.jobs)
        yield ShardEntry(file=name, unit=shard.unit, layer=shard.layer, jobs=tuple(jobs))


def _experts(plan: Plan, scales: ActivationScales) -> Iterator[ExpertsEntry]:
    layers = {linear.module: linear.layer for linear in plan.linears if linear.expert is not None}
    for path in sorted(scales.statistics.experts, key=natural):
        tokens = scales.statistics.experts[path].tokens.tolist()
        yield ExpertsEntry(module=path, layer=layers.get(path), tokens=tuple(tokens))


def _raw_tensors(plan: Plan) -> Iterator[RawTensorEntry]:
    """The source's tensors that the output holds only in parts.

    Together with `raw` of linear weights and biases they let `sources.decoded` present the output
    under the source's names.
    """
    keys = {linear.region.key for linear in plan.linears if not _is_whole(linear)}
    keys |= {bias.region.key for bias in _biases(plan)}
    for key in sorted(keys, key=natural):
        info = plan.inventory.tensors[key].info
        yield RawTensorEntry.model_validate(
            {"key": info.key, "dtype": info.dtype, "shape": info.shape}
        )


def _biases(plan: Plan) -> list[ExpertBias]:
    return [job for shard in plan.shards for job in shard.jobs if isinstance(job, ExpertBias)]


def _linear(result: LinearResult, linear: LinearWeight, scheme: Scheme) -> LinearEntry:
    place = {} if _is_whole(linear) else {"raw": _raw(linear.region)}
    figures = asdict(result)
    del figures["sum_sq_err"], figures["sum_sq_w"], figures["repair"]
    for name in ("exact", "asymmetric", "asymmetric_gain", "damping"):
        if figures[name] is None or figures[name] is False:
            del figures[name]
    if result.asymmetric_gain is not None:
        figures["asymmetric_gain"] = float(f"{result.asymmetric_gain:.4g}")
    figures |= {"format": scheme.weights, "dtype": linear.dtype}
    figures["relative_error"] = float(f"{result.relative_error:.4g}")
    return LinearEntry.model_validate({**figures, **place})


def _is_whole(linear: LinearWeight) -> bool:
    return linear.region == whole(f"{linear.name}.weight", linear.shape)


def _raw(region: Region) -> RawRegion:
    return RawRegion(
        key=region.key,
        expert=region.expert,
        rows=_numbers(region.rows),
        cols=None if region.cols is None else _numbers(region.cols),
        transposed=region.transposed,
    )


def _numbers(span: range) -> tuple[int, int, int]:
    return span.start, span.stop, span.step
