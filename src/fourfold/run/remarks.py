# SPDX-License-Identifier: Apache-2.0
"""The warnings at the end of a run: experts without a calibration token, repaired weights, and
copied tensors with NaN or Inf.

With `strict=True` they are errors: repairs in `execution.repairs`, experts here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING

from fourfold.algorithms.base import algorithm_of
from fourfold.calibration.scales import ActivationScales
from fourfold.errors import ObservationError
from fourfold.execution import LinearResult
from fourfold.execution.repairs import FLOOR_SCALES, SCALE_OF_ONE
from fourfold.models.roles import Role
from fourfold.models.tokenizer import token_count
from fourfold.reporting.text import plural, runs
from fourfold.storage.names import SUMMARY

if TYPE_CHECKING:
    from fourfold.run.job import Job

SHOWN = 3
"""Names that a message lists."""

_MEANINGS = {
    FLOOR_SCALES: "{} too small beside what engines fuse with it, and as good as 0 there: written "
    "with the smallest scales",
    SCALE_OF_ONE: "{} with inputs that were all 0 in calibration: their input scale is 1",
}


def remarks(
    job: Job, linears: Sequence[LinearResult], scales: ActivationScales | None
) -> Iterator[str]:
    """Yield what to warn of at the end of a job, given the results of its weights and, if anything
    was calibrated, the scales."""
    if scales is not None and (remark := unreached_remark(scales)) is not None:
        yield remark
    yield from _repair_remarks(linears)
    yield from _non_finite_remarks(job)


def check_reached(scales: ActivationScales, layers: Container[int | None] | None = None) -> None:
    """Raise `ObservationError` if no calibration token reached some expert of `layers`."""
    remark = unreached_remark(scales, layers)
    if remark is not None:
        raise ObservationError(f"{remark} (An error because of `strict=True`.)")


def unreached_remark(
    scales: ActivationScales, layers: Container[int | None] | None = None
) -> str | None:
    """Return what to say, and advise, of experts that no token reached; None if there are none.

    Where every expert computed every token, all of them have scales of their own inputs.
    """
    unreached = scales.unreached(layers)
    if not unreached or scales.statistics.data.all_experts:
        return None
    number = sum(map(len, unreached.values()))
    total = scales.plan.expert_count
    count = plural(number, "expert") if layers is not None else f"{number:,} of {total:,} experts"
    schemes = [scales.plan.scheme_of(linear) for linear in scales.plan.observed]
    borrowed = [
        name
        for name, is_borrowed in (
            ("the input scales", any(scheme.observes_inputs for scheme in schemes)),
            ("the second moments", any(algorithm_of(scheme).needs for scheme in schemes)),
        )
        if is_borrowed
    ]
    where = [f"{path}: {runs(experts)}" for path, experts in unreached.items()]
    return (
        f"{count} saw no calibration token ({_listed(where, '; ')}), so {' and '.join(borrowed)} "
        "are those of the layer's other experts. Give more text or other text (`calib`, "
        "`calib_size`), or set calibration: {all_experts: true} in the recipe."
    )


def _repair_remarks(linears: Sequence[LinearResult]) -> Iterator[str]:
    """Yield a sentence for each kind of repair."""
    names: dict[str, list[str]] = defaultdict(list)
    for linear in linears:
        if linear.repair is not None:
            names[linear.repair].append(linear.name)
    for repair, repaired in names.items():
        meaning = _MEANINGS[repair].format(plural(len(repaired), "linear weight"))
        yield f"{meaning} ({_listed(repaired)})."


def _non_finite_remarks(job: Job) -> Iterator[str]:
    """Say which copied tensors hold NaN or Inf, except in embeddings of tokens that are none."""
    tensors = {x.name: x for x in job.non_finite}
    inventory = job.plan.inventory
    if not inventory.tied_linears:
        tokens = token_count(job.source.folder)
        for name, raw in inventory.tensors.items():
            is_unused = tokens is not None and name in tensors and tensors[name].first_row >= tokens
            if is_unused and raw.role is Role.EMBEDDING:
                del tensors[name]
    if tensors:
        yield (
            f"{_listed([f'{name}: {x}' for name, x in tensors.items()], '; ')}. They are copied as "
            "they are in the source: what computes with such numbers gives NaN. Is the source the "
            "result of a training or conversion that overflowed?"
        )


def _listed(names: Sequence[str], comma: str = ", ") -> str:
    more = f"{comma}… (all of them in {SUMMARY})" if len(names) > SHOWN else ""
    return comma.join(names[:SHOWN]) + more
