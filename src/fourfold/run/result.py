# SPDX-License-Identifier: Apache-2.0
"""The result of quantizing a model, for programs and as the closing lines of the command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fourfold.calibration.statistics import Statistics
from fourfold.documents import Shown, document
from fourfold.evaluation.generation import Generation
from fourfold.execution import LinearResult
from fourfold.planning import Plan
from fourfold.reporting.serving import Served, closing_line
from fourfold.reporting.text import plural
from fourfold.storage.names import REPORT, SUMMARY
from fourfold.storage.non_finite import NonFinite
from fourfold.storage.units import size
from fourfold.verification import Report


@dataclass(frozen=True, repr=False)
class Result(Shown):
    """The result of `quantize`. Prints as the command's closing lines."""

    out: Path
    plan: Plan
    linears: tuple[LinearResult, ...]
    report: Report | None
    """The verification; None if it was not asked for."""
    seconds: float
    peak_resident: int
    """The process's peak resident memory in bytes."""
    statistics: Statistics | None = None
    """The statistics that calibration took or was given; None if nothing was calibrated."""

    unreached_experts: Mapping[str, list[int]] = field(default_factory=dict)
    """Experts that no calibration token was routed to, by experts module."""
    ranks: int = 1
    is_part: bool = False
    """True if `out` holds only what some of the ranks wrote; `merge` joins such folders."""
    kernels: str = ""
    """The backend that quantized the weights, and why this one."""
    non_finite: tuple[NonFinite, ...] = ()
    """Copied tensors that hold NaN or Inf, as they do in the source."""
    warnings: tuple[str, ...] = ()
    """Everything that went otherwise than it was meant: a slower backend, too little GPU memory."""
    preview: Generation | None = None
    """The continuations by source and output, if `OutputConfig.preview` asked for them."""

    @property
    def repairs(self) -> dict[str, str]:
        """The repaired linear weights, and the repair of each."""
        return {x.name: x.repair for x in self.linears if x.repair is not None}

    @property
    def clean(self) -> bool:
        """True if the output was verified without an error."""
        return self.report is not None and self.report.clean

    @property
    def exact_casts(self) -> int:
        """The number of linear weights that have the source's own codes."""
        return sum(linear.exact for linear in self.linears)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return document(
            "quantization",
            out=str(self.out),
            recipe=self.plan.recipe.name,
            linear_weights_planned=len(self.plan.linears),
            linear_weights_quantized=len(self.linears),
            bytes_before=self.plan.nbytes,
            bytes_after=self.plan.nbytes_after,
            calibration=None if self.statistics is None else asdict(self.statistics.data),
            unreached_experts=dict(self.unreached_experts),
            repairs=self.repairs,
            non_finite=[asdict(entry) for entry in self.non_finite],
            decoded_from=dict(self.plan.decoded_from),
            exact_casts=self.exact_casts,
            kernels=self.kernels,
            warnings=list(self.warnings),
            seconds=round(self.seconds, 3),
            peak_resident_bytes=self.peak_resident,
            verification=None if self.report is None else self.report.to_dict(),
            preview=None if self.preview is None else self.preview.to_dict(),
        )

    def __str__(self) -> str:
        planned, done = len(self.plan.linears), len(self.linears)
        parts = [f"{done:,} / {planned:,} linear weights quantized"]
        if self.repairs:
            parts.append(f"{len(self.repairs):,} repaired")
        if self.exact_casts:
            parts.append(f"{self.exact_casts:,} cast without loss")
        if self.non_finite:
            parts.append(f"NaN or Inf in {plural(len(self.non_finite), 'copied tensor')}")
        if self.report is not None:
            counts = self.report.counts
            parts.append(f"{counts.zero_block_scales:,} zero scales of {counts.block_scales:,}")
        decoded = " decoded" if self.plan.decoded_from else ""
        parts.append(f"{size(self.plan.nbytes_after)} from {size(self.plan.nbytes)}{decoded}")
        parts.append(
            "parts: join them with `fourfold merge`" if self.is_part else verdict(self.report)
        )
        took = f"{self.seconds:,.1f} s, {size(self.peak_resident)} of memory at the peak"
        lines = [" · ".join(parts), *self._calibration_lines(), took]
        if not self.is_part and (self.report is None or self.report.clean):
            lines.append(closing_line(str(self.out), Served.of_plan(self.plan)))
        return "\n".join(lines)

    def _calibration_lines(self) -> Iterator[str]:
        if self.statistics is None:
            return
        data, total = self.statistics.data, self.plan.expert_count
        unreached = [
            f"{path}.{e}" for path, experts in self.unreached_experts.items() for e in experts
        ]
        line = f"calibrated on {data.samples:,} samples of {data.seq:,} tokens from {data.origin}"
        if total:
            line += f" · {len(unreached):,} of {total:,} experts saw no token"
        yield line
        if unreached:
            more = f", … (all of them in {SUMMARY} and {REPORT})" if len(unreached) > 5 else ""
            yield f"scales from the layer's input for {', '.join(unreached[:5])}{more}"


def verdict(report: Report | None) -> str:
    """Return what a verification found, for a command's closing line."""
    if report is None:
        return "not verified"
    return "verified" if report.clean else "NOT CLEAN: see the findings"
