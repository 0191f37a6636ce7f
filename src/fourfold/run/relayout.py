# SPDX-License-Identifier: Apache-2.0
"""An NVFP4 checkpoint in another layout: the same codes and scales under other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fourfold.errors import PlanError, UsageError
from fourfold.layouts import LAYOUTS
from fourfold.layouts.base import CheckpointContents
from fourfold.models.inventory import Inventory
from fourfold.models.inventory_builder import take_inventory
from fourfold.models.peculiarities import peculiarities_of
from fourfold.models.roles import Role
from fourfold.sources.claims import kv_cache_format, quantization_entries
from fourfold.sources.decoded import as_source_was
from fourfold.sources.relaid import relaid
from fourfold.sources.stacking import StackingSource
from fourfold.storage.source import Source


@dataclass(frozen=True)
class Relayout:
    """A checkpoint as another layout has it, and what its configuration files must say."""

    source: Source
    inventory: Inventory
    quantization_config: Mapping[str, Any]
    config_files: Mapping[str, Mapping[str, Any]]


def plan_relayout(source: Source, name: str) -> Relayout:
    """Present an NVFP4 checkpoint in the layout of that name.

    Raises:
        UsageError: There is no such layout.
        SourceError: The source is no NVFP4 checkpoint.
        PlanError: The layout cannot express it, or weights that engines fuse have global scales of
            their own.
    """
    if name not in LAYOUTS:
        raise UsageError(f"`layout={name}`: no such layout. Give {' or '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    whole = as_source_was(source)
    inventory = take_inventory(whole)
    attention = [x for x in inventory.linears if x.role is Role.ATTENTION and x.layer is not None]
    view = relaid(source, layout, [linear.name for linear in attention])
    peculiar = peculiarities_of(*inventory.model_types)
    layout.check(view.schemes, peculiar)
    entries = quantization_entries(view.stored)
    kv_cache = kv_cache_format(entries)
    if kv_cache is not None and kv_cache not in layout.kv_formats:
        raise PlanError(f"the {name} layout cannot state the {kv_cache} KV cache of the source.")
    _check_fused(inventory, view.group_scales)
    kept = [raw for key, raw in inventory.tensors.items() if key not in whole.decoded]
    ignore = layout.ignore(
        list(view.schemes),
        [raw.stem for raw in kept if raw.is_matrix] + list(inventory.tied_linears),
        peculiar,
    )
    stacks = layout.stacks(source.config)
    shown = StackingSource(view, stacks) if stacks else view
    raw_keys = {f"{linear.name}.weight": linear.region.key for linear in inventory.linears}
    origins = {key: raw_keys.get(origin, origin) for key, origin in shown.origins.items()}
    tensors = {
        key: replace(inventory.tensors[origins[key]], info=info)
        for key, info in shown.tensors.items()
    }
    contents = CheckpointContents(view.schemes, ignore, kv_cache, peculiar)
    return Relayout(
        shown,
        replace(inventory, tensors=tensors),
        layout.quantization_config(contents),
        layout.config_files(contents),
    )


def _check_fused(inventory: Inventory, scales: Mapping[str, float]) -> None:
    first: dict[str, str] = {}
    for linear in inventory.linears:
        if linear.name not in scales:
            continue
        other = first.setdefault(linear.scale_group, linear.name)
        if scales[other] != scales[linear.name]:
            raise PlanError(
                f"{linear.name} has the global scale {scales[linear.name]:.6g} and {other} "
                f"{scales[other]:.6g}, but engines fuse them and take one. Quantize the model "
                "again: `fourfold quantize`."
            )
