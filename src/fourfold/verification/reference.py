# SPDX-License-Identifier: Apache-2.0
"""The errors of a checkpoint against the reference: what its quantized source was made from.

Nothing else is compared with a reference, so one of another model must show here: before anything
is read by names and shapes, and then by errors that no chain of quantizers leaves behind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median_low

from fourfold.errors import SourceError
from fourfold.models.inventory import Inventory
from fourfold.models.inventory_builder import take_inventory
from fourfold.storage.safetensors_header import FLOATS
from fourfold.storage.source import Source
from fourfold.verification.checkpoint import Checkpoint
from fourfold.verification.compare import WORST_LEGAL, Comparison, LinearError
from fourfold.verification.match import Matching
from fourfold.verification.rules import Finding, finding
from fourfold.verification.streaming import Workers

UNLIKE = 0.9


def check_reference(reference: Source, shapes: Mapping[str, tuple[int, int]]) -> Inventory:
    """Check that the reference has the linear weights of these names and shapes [out, in].

    Returns:
        Its inventory.

    Raises:
        SourceError: A weight is missing, of another shape, or no floating-point tensor.
    """
    inventory = take_inventory(reference)
    held: dict[str, tuple[str, tuple[int, ...]]] = {
        raw.stem: (raw.info.dtype, raw.info.shape) for raw in inventory.tensors.values()
    }
    held |= {linear.name: (linear.dtype, linear.shape) for linear in inventory.linears}
    wrong = [
        name
        for name, shape in shapes.items()
        if name not in held or held[name][0] not in FLOATS or held[name][1] != shape
    ]
    if wrong:
        name = min(wrong)
        dtype, shape = held.get(name, ("no weight of this name", ()))
        found = f"{dtype} {list(shape)}" if name in held else dtype
        raise SourceError(
            f"{reference.place}: {name}: {found}, where the output has a weight "
            f"{list(shapes[name])} ({len(wrong):,} such weights in all). Give as `reference` the "
            "checkpoint that the source was quantized from."
        )
    return inventory


def reference_errors(
    checkpoint: Checkpoint, reference: Source, inventory: Inventory, workers: Workers
) -> list[LinearError]:
    """Return the error of each quantized weight against the reference."""
    pairs = Matching(checkpoint, reference.tensors, inventory).pairs
    workers.total = workers.done + sum(math.prod(pair.linear.shape) * 2 for pair in pairs)
    return Comparison(checkpoint, reference, workers).errors(pairs)


def judge_reference(errors: Sequence[LinearError], place: object) -> Iterator[Finding]:
    """Yield the weights whose values in the reference cannot be what the source was made from.

    A weight that has nothing in common with the reference's has an error of at least 1, as zeros
    have. So a single one may be ruined, but not most of them.
    """
    usual = median_low([error.relative_error for error in errors]) if errors else 0.0
    worst = WORST_LEGAL if usual <= UNLIKE else UNLIKE
    for error in errors:
        if error.relative_error <= worst:
            continue
        found = f"relative error {error.relative_error:.3f}"
        if not math.isfinite(error.weight_energy):
            found = "NaN or Inf"
        elif not error.weight_energy:
            found = "nothing but zeros"
        yield finding("reference-differs", error.name, f"{found} in {place}")
