# SPDX-License-Identifier: Apache-2.0
"""The result of a verification, printed for people and as JSON."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fourfold.documents import Shown, document
from fourfold.verification.compare import LinearError, sqnr_db
from fourfold.verification.rules import Finding, Severity

_ERROR_KEYS = ("name", "role", "relative_error", "sqnr_db")

WORST = 10
SHOWN_OF_A_RULE = 20
"""At most this many findings of one rule are printed; `to_json` has them all."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The amounts that were verified."""

    tensors: int
    quantized_linears: int
    quantized_weights: int
    """Numbers in the quantized linears."""
    unquantized_linears: int
    block_scales: int
    zero_block_scales: int
    nan_block_scales: int
    negative_block_scales: int
    subnormal_block_scales: int
    input_scales: int
    kv_scales: int
    copied_tensors: int
    """Compared with the source, bit for bit."""
    compared_linears: int
    """Dequantized and compared with the source."""
    bytes_read: int
    """Tensor bytes, of both sides."""


@dataclass(frozen=True, slots=True)
class RoleError:
    """The errors of all linears of one role."""

    role: str
    linears: int
    relative_error: float
    """Of all their weights together: √(ΣΣ(W − Ŵ)² / ΣΣW²)."""
    sqnr_db: float
    largest: float
    """The largest relative error of one linear."""


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """The result of `verify`. `print` shows the same as the command."""

    folder: str
    source: str | None
    quant_algo: str | None
    findings: tuple[Finding, ...]
    counts: Counts
    relative_errors: tuple[LinearError, ...]
    """One for each quantized linear, by name; empty without a source."""
    reference: str | None = None
    reference_errors: tuple[LinearError, ...] = ()
    """The errors against the checkpoint that a quantized source was made from, if it is given."""

    @property
    def clean(self) -> bool:
        """True if there is no error; warnings are allowed."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that make an engine fail, or compute wrongly."""
        return tuple(x for x in self.findings if x.severity is Severity.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings in valid checkpoints that an engine or a tool may refuse."""
        return tuple(x for x in self.findings if x.severity is Severity.WARNING)

    @property
    def worst(self) -> tuple[LinearError, ...]:
        """The linears with the largest relative errors, at most ten."""
        return tuple(sorted(self.relative_errors, key=_by_error)[:WORST])

    @property
    def roles(self) -> tuple[RoleError, ...]:
        """The errors by role."""
        return _by_role(self.relative_errors)

    @property
    def reference_roles(self) -> tuple[RoleError, ...]:
        """The errors against the reference by role."""
        return _by_role(self.reference_errors)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that are not finite become None."""
        return document(
            "verification",
            folder=self.folder,
            source=self.source,
            quant_algo=self.quant_algo,
            clean=self.clean,
            counts=asdict(self.counts),
            findings=[asdict(finding) for finding in self.findings],
            errors=[asdict(finding) for finding in self.errors],
            warnings=[asdict(finding) for finding in self.warnings],
            roles=[_finite(asdict(role)) for role in self.roles],
            reference=self.reference,
            reference_roles=[_finite(asdict(role)) for role in self.reference_roles],
            worst=[error.name for error in self.worst],
            relative_errors=[
                _finite({name: getattr(error, name) for name in _ERROR_KEYS})
                for error in self.relative_errors
            ],
        )

    def to_json(self) -> str:
        """Return one JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _by_error(error: LinearError) -> tuple[bool, float, str]:
    e = error.relative_error
    return (not math.isnan(e), 0.0 if math.isnan(e) else -e, error.name)


def _by_role(errors: Sequence[LinearError]) -> tuple[RoleError, ...]:
    by_role: dict[str, list[LinearError]] = defaultdict(list)
    for error in errors:
        by_role[error.role].append(error)
    return tuple(_role_error(role, by_role[role]) for role in sorted(by_role))


def _role_error(role: str, errors: Sequence[LinearError]) -> RoleError:
    total = math.fsum(error.error_energy for error in errors)
    energy = math.fsum(error.weight_energy for error in errors)
    relative = math.sqrt(total / energy) if energy > 0 and total >= 0 else 0.0 * total
    largest = max((error.relative_error for error in errors), key=lambda e: (math.isnan(e), e))
    return RoleError(role, len(errors), relative, sqnr_db(relative), largest)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _lines(report: Report) -> Iterator[str]:
    counts = report.counts
    yield f"{report.folder}: {report.quant_algo}"
    yield (
        f"  {counts.tensors:,} tensors, {counts.quantized_linears:,} quantized linears "
        f"({counts.quantized_weights:,} weights), {counts.unquantized_linears:,} left as they are"
    )
    yield (
        f"  {counts.block_scales:,} block scales: {counts.zero_block_scales:,} zero, "
        f"{counts.nan_block_scales:,} NaN, {counts.negative_block_scales:,} negative, "
        f"{counts.subnormal_block_scales:,} subnormal"
    )
    yield f"  {counts.input_scales:,} input scales, {counts.kv_scales:,} KV scales"
    if report.source is not None:
        yield (
            f"  against {report.source}: {counts.copied_tensors:,} copied tensors bit for bit, "
            f"{counts.compared_linears:,} quantized linears dequantized"
        )
    yield from _error_lines(report)
    if report.reference is not None:
        yield f"  against {report.reference}, which the source was made from:"
        yield from _role_lines(report.reference_roles)
    yield from _finding_lines(report)
    yield _verdict(report)


def _error_lines(report: Report) -> Iterator[str]:
    if not report.relative_errors:
        return
    yield from _role_lines(report.roles)
    worst = report.worst
    yield f"  the {len(worst)} largest:" if len(worst) > 1 else "  the largest:"
    for error in worst:
        yield f"  {error.relative_error:14.4f} {error.sqnr_db:9.2f}  {error.name}"


def _role_lines(roles: Sequence[RoleError]) -> Iterator[str]:
    yield "  relative error   SQNR dB    largest"
    for role in roles:
        yield (
            f"  {role.relative_error:14.4f} {role.sqnr_db:9.2f} {role.largest:10.4f}  "
            f"{role.role} ({role.linears:,})"
        )


def _finding_lines(report: Report) -> Iterator[str]:
    by_rule: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_rule[finding.id].append(finding)
    for rule_id, findings in by_rule.items():
        first = findings[0]
        yield f"{first.severity} {rule_id}"
        yield f"    {first.effect}"
        for finding in findings[:SHOWN_OF_A_RULE]:
            yield f"  - {finding.tensor}: {finding.found}"
        if len(findings) > SHOWN_OF_A_RULE:
            yield f"  - and {len(findings) - SHOWN_OF_A_RULE:,} more; `to_json` lists them all"


def _verdict(report: Report) -> str:
    errors, warnings = len(report.errors), len(report.warnings)
    warned = f", {warnings:,} warning{'s' * (warnings != 1)}" if warnings else ""
    if report.clean:
        return f"clean: no errors{warned}"
    return f"not clean: {errors:,} error{'s' * (errors != 1)}{warned}"
