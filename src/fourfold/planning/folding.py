# SPDX-License-Identifier: Apache-2.0
"""The folds that a plan searches factors for, and what to say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fourfold.models.folds import Fold, Kind, find_folds
from fourfold.models.inventory import Inventory
from fourfold.planning.rows import ScaleGroup, keeps_codes
from fourfold.storage.source import Source

SHOWN = 4
"""Reasons that the note lists."""


def plan_folds(
    source: Source, inventory: Inventory, groups: Sequence[ScaleGroup]
) -> tuple[Mapping[str, Fold], str]:
    """Return the folds whose readers are quantized, by name, and a note on them.

    Weights whose codes a quantized source has already are not scaled: they are kept exactly.
    """
    all_folds = find_folds(inventory, source.config)
    quantized = {linear.name for group in groups for linear in group.linears}
    stored = {
        linear.region.key
        for group in groups
        if keeps_codes(source, group)
        for linear in group.linears
    }
    folds: dict[str, Fold] = {}
    left_alone = Counter(all_folds.left_alone)
    for name, fold in all_folds.folds.items():
        if not any(linear.name in quantized for linear in fold.linears):
            continue
        if stored.intersection(region.key for region in (*fold.writers, *fold.readers)):
            left_alone["weights whose codes the source has"] += 1
        else:
            folds[name] = fold
    kinds = Counter(fold.kind for fold in folds.values())
    note = f"folds: factors are searched for {kinds[Kind.NORM]:,} norms and {kinds[Kind.UP]:,} ups"
    reasons = [f"{reason} ({count:,})" for reason, count in left_alone.most_common(SHOWN)]
    hidden = len(left_alone) - len(reasons)
    more = f", and for {hidden} more reasons" if hidden > 0 else ""
    return folds, note + (f"; left alone: {'; '.join(reasons)}{more}" if reasons else "")
