# SPDX-License-Identifier: Apache-2.0
"""Read back an NVFP4 checkpoint and prove it tensor by tensor.

This works on any checkpoint, no matter which tool wrote it. Without a source, the files alone are
judged: names, dtypes, shapes, scales, groups, configuration. With a source, every copied tensor is
compared bit for bit, and every quantized weight is dequantized and compared.

Memory is a few buffers per thread, whatever the model's size.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fourfold.errors import FourfoldError, UnreadableError
from fourfold.events import OnEvent, ignore
from fourfold.models.inventory import Inventory
from fourfold.models.inventory_builder import take_inventory
from fourfold.models.roles import Role
from fourfold.sources.folded import folded_as
from fourfold.sources.opening import opened
from fourfold.storage.names import CONFIG
from fourfold.storage.source import Source
from fourfold.verification import completeness, files, fp8, groups, kept, structure, values
from fourfold.verification.checkpoint import Checkpoint, open_checkpoint
from fourfold.verification.compare import LinearError
from fourfold.verification.evidence import Evidence, ProvenComparison
from fourfold.verification.match import Linear, Matching
from fourfold.verification.readers.base import BLOCK_SCALE, INPUT_SCALE, KV_SCALES, WEIGHT
from fourfold.verification.reference import check_reference, judge_reference, reference_errors
from fourfold.verification.report import Counts, Report
from fourfold.verification.rules import RULES, Finding, Severity, finding
from fourfold.verification.streaming import Workers

CHECKS = (
    *files.CHECKS,
    *structure.CHECKS,
    *fp8.CHECKS,
    *values.CHECKS,
    *groups.CHECKS,
    *kept.CHECKS,
)
"""Checks that need the headers and the scalars only."""


def verify(
    out: Path | str,
    *,
    source: Path | str | Source | None = None,
    reference: Path | str | None = None,
    hf_config: Path | str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    evidence: Mapping[str, Evidence] | None = None,
    on_event: OnEvent = ignore,
) -> Report:
    """Verify the NVFP4 checkpoint in the folder `out`; see `api.verify`.

    `evidence` is what was found while the source was at hand, by the names of linears and copies.
    """
    workers = Workers(threads, on_event)
    try:
        with closing(open_checkpoint(Path(out).expanduser())) as checkpoint, ExitStack() as stack:
            trusted, reference_source = trust_remote_code, None
            if reference is not None:  # before anything is read
                reference_source = stack.enter_context(opened(reference, trust_remote_code=trusted))
                reference_inventory = check_reference(reference_source, _shapes(checkpoint))
            if source is None:
                report = _verify(checkpoint, None, None, workers, {})
            else:
                with opened(source, hf_config, trust_remote_code=trusted, dtype=dtype) as original:
                    inventory = take_inventory(original)
                    original = folded_as(original, inventory, checkpoint.folder)
                    report = _verify(checkpoint, original, inventory, workers, evidence or {})
            if reference_source is None:
                return report
            reference_source = folded_as(reference_source, reference_inventory, checkpoint.folder)
            errors = reference_errors(checkpoint, reference_source, reference_inventory, workers)
            place = str(reference_source.place)
            findings = [*report.findings, *judge_reference(errors, place)]
            return replace(
                report,
                findings=tuple(sorted(findings, key=_order)),
                reference=place,
                reference_errors=_by_name(errors),
            )
    except FourfoldError as error:
        raise UnreadableError(str(error)) from error


def _verify(
    checkpoint: Checkpoint,
    source: Source | None,
    inventory: Inventory | None,
    workers: Workers,
    evidence: Mapping[str, Evidence],
) -> Report:
    checks = CHECKS if source is not None else (*CHECKS, *completeness.CHECKS)
    findings = [*checkpoint.reader.check(checkpoint)]
    findings += [breach for check in checks for breach in check(checkpoint)]
    findings += groups.check_ignore(checkpoint, _embeddings(inventory))
    scales = sum(linear.parts[BLOCK_SCALE].nbytes for linear in checkpoint.sound)
    workers.total = scales
    copied, errors = 0, []
    if source is None or inventory is None:
        pieces = kept.pieces_to_read(checkpoint)
        workers.total += sum(piece.nbytes for piece in pieces)
        workers.total += sum(x.parts[WEIGHT].nbytes for x in checkpoint.fp8.values() if x.is_sound)
        workers.begin()
        counted, scale_findings = values.check_block_scales(checkpoint, workers)
        findings += values.check_fp8_codes(checkpoint, workers)
        non_finite = [*kept.read_kept(checkpoint, pieces, workers)]
    else:
        matching = Matching(checkpoint, source.tensors, inventory)
        comparison = ProvenComparison(checkpoint, source, workers, evidence)
        workers.total += comparison.total_bytes(matching)
        workers.begin()
        counted, scale_findings = values.check_block_scales(checkpoint, workers)
        errors = comparison.errors(matching.pairs)
        copied = len(matching.copies)
        findings += [*matching.findings, *comparison.copies(matching.copies)]
        findings += comparison.judge(matching.pairs, errors)
        findings += [*_config_changes(checkpoint, source), *_missing_files(checkpoint, source)]
        findings += _unplaced(checkpoint, inventory)
        non_finite = comparison.non_finite
    findings += kept.judge_kept(checkpoint, non_finite, _embeddings(inventory))
    findings += scale_findings
    return Report(
        folder=str(checkpoint.folder),
        source=None if source is None else str(source.place),
        quant_algo=checkpoint.quant.algo,
        findings=tuple(sorted(findings, key=_order)),
        counts=_counts(checkpoint, counted, copied, len(errors), workers),
        relative_errors=_by_name(errors),
    )


def _by_name(errors: Iterable[LinearError]) -> tuple[LinearError, ...]:
    return tuple(sorted(errors, key=lambda error: error.name))


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The shape [out, in] of each quantized weight that can be read."""
    linears: list[Linear] = [*checkpoint.linears.values(), *checkpoint.fp8.values()]
    return {linear.name: linear.shape for linear in linears if linear.is_sound}


def _order(breach: Finding) -> tuple[bool, int, str, str]:
    """Sort errors first, then by the table of rules."""
    return breach.severity is Severity.WARNING, _PLACES[breach.id], breach.tensor, breach.found


_PLACES = {rule_id: place for place, rule_id in enumerate(RULES)}


def _counts(
    checkpoint: Checkpoint,
    scales: Mapping[str, int],
    copied: int,
    compared: int,
    workers: Workers,
) -> Counts:
    sound: list[Linear] = [*checkpoint.sound, *(x for x in checkpoint.fp8.values() if x.is_sound)]
    return Counts(
        tensors=len(checkpoint.stored),
        quantized_linears=len(checkpoint.quantized),
        quantized_weights=sum(outs * ins for outs, ins in (q.shape for q in sound)),
        unquantized_linears=len(checkpoint.kept),
        **scales,
        input_scales=sum(INPUT_SCALE in linear.parts for linear in sound),
        kv_scales=sum(name.rpartition(".")[2] in KV_SCALES for name in checkpoint.tensors),
        copied_tensors=copied,
        compared_linears=compared,
        bytes_read=workers.done,
    )


def _embeddings(inventory: Inventory | None) -> frozenset[str]:
    """Embeddings, including those whose names do not show it."""
    if inventory is None:
        return frozenset()
    return frozenset(
        key.removesuffix(".weight")
        for key, tensor in inventory.tensors.items()
        if tensor.role is Role.EMBEDDING
    )


def _config_changes(checkpoint: Checkpoint, source: Source) -> Iterator[Finding]:
    """config.json is the source's, except for the quantization."""
    ours, theirs = dict(checkpoint.config), dict(source.config)
    for config in (ours, theirs):
        config.pop("quantization_config", None)
    wrong = sorted(_contradictions(ours, theirs))
    if wrong:
        yield finding("config-contradicts", CONFIG, f"differs in {', '.join(wrong[:8])}")
    changed = sorted(
        key
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key) and not any(x.split(".")[0] == key for x in wrong)
    )
    if changed:
        yield finding("config-changed", CONFIG, f"differs in {', '.join(changed[:8])}")


def _unplaced(checkpoint: Checkpoint, inventory: Inventory) -> Iterator[Finding]:
    """The tensors of the source that the architecture has no parameter for, where they are."""
    for key in inventory.unplaced:
        if key in checkpoint.tensors:
            text = f"no place in {inventory.architecture}, as the source's config.json describes it"
            yield finding("tensor-unplaced", key, text)


_SIZES = re.compile(r"^(num_|n_)\w+$|_(size|dim|layers|rank|heads)$|^(architectures|model_type)$")


def _contradictions(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Sizes, counts and names that both sides state, but differently."""
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], Mapping) and isinstance(theirs[key], Mapping):
            yield from (f"{key}.{inner}" for inner in _contradictions(ours[key], theirs[key]))
        elif _SIZES.search(key) and ours[key] != theirs[key]:
            yield key


def _missing_files(checkpoint: Checkpoint, source: Source) -> Iterator[Finding]:
    """The source's side files (tokenizer, chat template, …) exist; they are not compared."""
    for path in source.side_files().copied:
        if not (checkpoint.folder / path).is_file():
            yield finding("side-file-missing", path.as_posix(), "lies in the source's folder only")
