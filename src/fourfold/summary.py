"""`quant_summary.json`: what was done to each linear weight, and the ledger; written into OUT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fourfold._version import __version__
from fourfold.fold import LinearResult
from fourfold.planning import Plan


def summary_of(plan: Plan, linears: Sequence[LinearResult]) -> str:
    """The file's text: one line for each linear weight, sorted by name.

    The bytes follow from the source, the recipe and the version alone.
    """
    head: dict[str, Any] = {
        "producer": f"fourfold {__version__}",
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
    head["files"] = plan.files
    lines = ",\n".join(json.dumps(_entry(result)) for result in linears)
    text = json.dumps(head, indent=2, ensure_ascii=False)
    return text.removesuffix("\n}") + f',\n  "linears": [\n{lines}\n]}}\n'


def _entry(result: LinearResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "role": result.role,
        "shape": list(result.shape),
        "global_scale": result.global_scale,
        "amax": result.amax,
        "relative_error": float(f"{result.relative_error:.4g}"),
    }
