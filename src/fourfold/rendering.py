"""Plans, inspections and results as tables for people, by rich. Nothing is computed here."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fourfold.inspection import Inspection
from fourfold.machine import threads_available
from fourfold.planning import Action, Plan, Row

PLAIN_WIDTH = 110


def plain(value: Any) -> str:
    """What rich would print of `value`, without colors."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, no_color=True)
    console.print(value)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO given above
    return str(text).rstrip("\n")


def size(nbytes: int) -> str:
    """Bytes for people: 11.2 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes} B"


def render_plan(plan: Plan) -> Group:
    """The plan for people: roles × counts × bytes, what will load where, what to know."""
    memory = plan.memory(threads_available())
    return Group(
        Text.assemble(
            (str(plan.source), "bold"),
            f": {plan.inventory.architecture} → recipe {plan.recipe.name}",
        ),
        _role_table(plan),
        *_tensor_parallel_lines(plan),
        Text(
            f"{len(plan.rows):,} tensors in, {sum(len(s.tensors) for s in plan.shards):,} out in "
            f"{len(plan.shards)} shards · {len(plan.linears):,} linear weights to quantize · "
            f"{len(plan.ignore):,} ignore entries"
        ),
        Text(f"disk {size(plan.nbytes_after)} · memory about {size(memory)} and the interpreter"),
        *(Text(f"note: {note}", style="yellow") for note in plan.notes),
    )


def _role_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("role")
    table.add_column("what happens")
    for name in ("linear weights", "tensors", "before", "after", "bits/weight"):
        table.add_column(name, justify="right")
    for (role, action), rows in _by_role(plan.rows):
        table.add_row(role, action, *_figures(rows))
    table.add_section()
    table.add_row("total", "", *_figures(plan.rows), style="bold")
    return table


def _by_role(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        what = "quantized" if row.action is Action.QUANTIZE else "kept bit for bit"
        found[row.role.value, what].append(row)
    return sorted(found.items(), key=lambda item: (-sum(row.nbytes for row in item[1]), item[0]))


def _figures(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    before, after = sum(row.nbytes for row in rows), sum(row.nbytes_after for row in rows)
    linears, numel = sum(row.linears for row in rows), sum(row.numel for row in rows)
    bits = f"{after * 8 / numel:.2f}" if numel else ""
    return [f"{linears:,}" if linears else "", f"{len(rows):,}", size(before), size(after), bits]


def _tensor_parallel_lines(plan: Plan) -> Iterable[Text]:
    fine = [str(count) for count, obstacle in plan.tensor_parallel.items() if not obstacle]
    yield Text(f"tensor-parallel sizes that load everywhere: {', '.join(fine) or 'none'}")
    obstacles = [(count, why) for count, why in plan.tensor_parallel.items() if why]
    if obstacles:
        yield Text("  not " + "; not ".join(f"{n}: {why}" for n, why in obstacles), style="dim")


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs: everything, one entry for each source tensor."""
    return {
        "source": str(plan.source),
        "architecture": plan.inventory.architecture,
        "model_types": list(plan.inventory.model_types),
        "recipe": plan.recipe.model_dump(mode="json"),
        "bytes_before": plan.nbytes,
        "bytes_after": plan.nbytes_after,
        "memory_bytes": plan.memory(threads_available()),
        "linear_weights": len(plan.linears),
        "tensor_parallel": {str(n): why or "loads" for n, why in plan.tensor_parallel.items()},
        "notes": list(plan.notes),
        "side_files": [str(path) for path in plan.side_files],
        "dropped_files": [str(path) for path in plan.dropped_files],
        "quantization_config": plan.quantization_config,
        "tensors": [
            {
                "name": row.key,
                "role": row.role.value,
                "action": row.action.value,
                "reason": row.reason,
                "bytes_before": row.nbytes,
                "bytes_after": row.nbytes_after,
                "linear_weights": row.linears,
            }
            for row in plan.rows
        ],
        "shards": [
            {"file": name, "unit": shard.unit, "tensors": len(shard.tensors), "bytes": shard.nbytes}
            for name, shard in zip(plan.shard_names, plan.shards, strict=True)
        ],
    }


def render_inspection(inspection: Inspection) -> Group:
    """An inspection for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tensors", "dtype", "shape"):
        table.add_column(name, overflow="fold")
    for name in ("count", "bytes", "scales"):
        table.add_column(name, justify="right")
    for kind in inspection.kinds:
        shape = "×".join(map(str, kind.shape)) or "scalar"
        scales = "" if kind.scales is None else f"{kind.scales[0]:.3g} … {kind.scales[1]:.3g}"
        table.add_row(kind.pattern, kind.dtype, shape, f"{kind.count:,}", size(kind.nbytes), scales)
    how = inspection.quantization or "not quantized"
    ignored = f", {inspection.ignored:,} ignore entries" if inspection.ignored else ""
    return Group(
        Text.assemble((inspection.folder, "bold"), f": {inspection.model_type}, {how}{ignored}"),
        table,
        Text(
            f"{inspection.tensors:,} tensors in {inspection.files} files, {size(inspection.nbytes)}"
        ),
    )
