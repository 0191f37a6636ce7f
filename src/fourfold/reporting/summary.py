"""`quant_summary.json`: what was done to each linear weight, and the ledger; written into OUT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from fourfold._version import __version__
from fourfold.calibration.data import plain_text
from fourfold.calibration.scales import ActivationScales
from fourfold.execution import LinearResult
from fourfold.models.inventory import ExpertBias, LinearWeight, natural
from fourfold.models.regions import Region, Span, whole
from fourfold.planning import Plan, outputs_of
from fourfold.planning.tables import by_role


def summary_of(
    plan: Plan, linears: Sequence[LinearResult], scales: ActivationScales | None = None
) -> str:
    """The file's text: one line for each linear weight, sorted by name.

    The bytes follow from the source, the recipe, the calibration and the versions alone.
    """
    head: dict[str, Any] = {
        "producer": f"fourfold {__version__}",
        "versions": versions(),
        "model": plain_text(plan.model),
        "recipe": plan.recipe.model_dump(mode="json"),
        "model_type": plan.inventory.model_types[0],
        "architecture": plan.inventory.architecture,
        "ledger": {
            "source_tensors": len(plan.rows),
            "linear_weights_planned": len(plan.linears),
            "linear_weights_quantized": len(linears),
            "tensors_written": sum(len(shard.tensors) for shard in plan.shards),
            "bytes_before": plan.nbytes,
            "bytes_after": plan.nbytes_after,
        },
    }
    head["roles"] = list(_roles(plan))
    head["calibration"] = None if scales is None else _calibration(scales)
    head["kv_cache"] = [] if scales is None else list(_kv_cache(scales))
    head["files"] = plan.files
    planned = {linear.name: linear for linear in plan.linears}
    lists = {
        "shards": list(_shards(plan)),
        "experts": [] if scales is None else list(_experts(plan, scales)),
        "raw_tensors": _raw_tensors(plan),
        "biases": [{"name": bias.name, "raw": _raw(bias.region)} for bias in _biases(plan)],
        "linears": [_entry(result) | _place_in_source(planned[result.name]) for result in linears],
    }
    return text_of(head | lists)


LISTS = ("shards", "experts", "raw_tensors", "biases", "linears")
"""What the document lists with an entry a line."""


def text_of(document: Mapping[str, Any]) -> str:
    """The document as it is written: the same document gives the same bytes."""
    head = {name: value for name, value in document.items() if name not in LISTS}
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    return text + "".join(_lines(name, document[name]) for name in LISTS) + "}\n"


def _shards(plan: Plan) -> Iterator[dict[str, Any]]:
    """Every shard, and how many tensors each of its jobs wrote: between jobs it may be cut."""
    for name, shard in zip(plan.shard_names, plan.shards, strict=True):
        jobs = [len(outputs_of(job, activations=plan.recipe.is_w4a4)) for job in shard.jobs]
        yield {"file": name, "unit": shard.unit, "layer": shard.layer, "jobs": jobs}


def _lines(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """A list of a document that goes on, one entry a line."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    return f',\n  "{name}": [\n{lines}\n]' if lines else f',\n  "{name}": []'


def _entry(result: LinearResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "role": result.role,
        "shape": list(result.shape),
        "format": "nvfp4",
        "layer": result.layer,
        "expert": result.expert,
        "global_scale": result.global_scale,
        "amax": result.amax,
        "input_amax": result.input_amax,
        "input_scale": result.input_scale,
        "tokens": result.tokens,
        "relative_error": float(f"{result.relative_error:.4g}"),
    }


def versions() -> dict[str, str]:
    """The packages that have a say in what is written."""
    names = ("torch", "transformers", "numpy", "numba")
    return {"fourfold": __version__} | {name: _version(name) for name in names}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _roles(plan: Plan) -> Iterator[dict[str, Any]]:
    """The ledger's rows, by role and what became of them."""
    for (role, what), rows in by_role(plan.rows):
        yield {
            "role": role,
            "what": what,
            "tensors": len(rows),
            "linear_weights": sum(row.linears for row in rows),
            "numel": sum(row.numel for row in rows),
            "bytes_before": sum(row.nbytes for row in rows),
            "bytes_after": sum(row.nbytes_after for row in rows),
        }


def _calibration(scales: ActivationScales) -> dict[str, Any]:
    unreached = sum(map(len, scales.unreached().values()))
    return asdict(scales.statistics.data) | {"unreached_experts": unreached}


def _kv_cache(scales: ActivationScales) -> Iterator[dict[str, Any]]:
    for job in scales.plan.kv_scales:
        k_scale, v_scale = scales.kv(job)
        yield {"name": job.name, "k_scale": k_scale, "v_scale": v_scale}


def _experts(plan: Plan, scales: ActivationScales) -> Iterator[dict[str, Any]]:
    """Tokens of every expert, by experts module, in the order of layers."""
    layers = {linear.module: linear.layer for linear in plan.linears if linear.expert is not None}
    for path in sorted(scales.statistics.experts, key=natural):
        tokens = scales.statistics.experts[path].tokens.tolist()
        yield {"module": path, "layer": layers.get(path), "tokens": tokens}


def _raw_tensors(plan: Plan) -> list[dict[str, Any]]:
    """The source's tensors that OUT holds in parts alone: what they were.

    With it, and with the `raw` of linear weights and biases, OUT can be read under the source's
    names (`checkpoints/dequantized.py`).
    """
    keys = {linear.region.key for linear in plan.linears if not _is_whole(linear)}
    keys |= {bias.region.key for bias in _biases(plan)}
    infos = (plan.inventory.tensors[key].info for key in sorted(keys, key=natural))
    return [{"key": info.key, "dtype": info.dtype, "shape": list(info.shape)} for info in infos]


def _biases(plan: Plan) -> list[ExpertBias]:
    return [job for shard in plan.shards for job in shard.jobs if isinstance(job, ExpertBias)]


def _place_in_source(linear: LinearWeight) -> dict[str, Any]:
    """The dtype that a linear weight had, and where it lay, unless it was all of its tensor."""
    return {"dtype": linear.dtype} | ({} if _is_whole(linear) else {"raw": _raw(linear.region)})


def _is_whole(linear: LinearWeight) -> bool:
    return linear.region == whole(f"{linear.name}.weight", linear.shape)


def _raw(region: Region) -> dict[str, Any]:
    return {
        "key": region.key,
        "expert": region.expert,
        "rows": _numbers(region.rows),
        "cols": None if region.cols is None else _numbers(region.cols),
        "transposed": region.transposed,
    }


def _numbers(span: Span) -> list[int]:
    return [span.start, span.stop, span.step]
