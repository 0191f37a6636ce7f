# SPDX-License-Identifier: Apache-2.0
"""Verification in two steps, for a source that is not there any more when OUT is finished.

    while a shard is written    its tensors are read back from it and compared with the source, by
                                the same comparison as always: `Prover` → `Evidence`
    when OUT is finished        the same tensors are read from OUT; if they have the digest that
                                they had then, what was found is true of them: `ProvenComparison`

A tensor without evidence, or with other bytes than then, is compared with the source itself: so
evidence can be missing, but never be wrong of what lies in OUT.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from fourfold.models.inventory import Inventory
from fourfold.storage.non_finite import NonFinite, find_non_finite
from fourfold.storage.safetensors_header import TensorInfo, read_header
from fourfold.storage.source import Source
from fourfold.verification.checkpoint import Checkpoint, Files
from fourfold.verification.compare import (
    OUTLIER,
    Comparison,
    LinearError,
    Suspect,
    bound_of,
    linear_error,
)
from fourfold.verification.match import Copy, Matching, Pair
from fourfold.verification.readers import reader_of
from fourfold.verification.rules import Finding
from fourfold.verification.streaming import CHUNK_BYTES, Result, Work, Workers


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the comparison of a tensor, or of a quantized linear, with the source has found."""

    digest: str
    """XXH3 of the bytes that were compared."""
    error: float = 0.0
    """Σ(w − ŵ)² of a linear; a copied tensor has the source's bits."""
    energy: float = 0.0
    """Σw²"""
    reference: float | None = None
    """The error e' of the simplest quantizer, if the error is so large that it may be asked for."""


class _Inline(Workers):
    """Works in the thread that calls it."""

    def run(self, function: Any, work: Sequence[Work]) -> Iterator[tuple[Work, Result]]:
        return ((piece, function(piece)) for piece in work)


class Prover:
    """Compares the tensors of a shard that is being written with the source.

    Safe for many threads.
    """

    def __init__(
        self,
        file: Path,
        config: Mapping[str, Any],
        source: Source,
        inventory: Inventory,
        keys: Iterable[str],
    ) -> None:
        """Open a shard, whose header is written.

        Args:
            file: The shard, under its temporary name.
            config: The contents that config.json will have.
            source, inventory: The source, and what is known of it.
            keys: The raw tensors that the shard is made from.
        """
        reader = reader_of(file.parent, config)
        files = Files([file], None, None)
        self.checkpoint = Checkpoint(file.parent, config, reader, files, read_header(file))
        self._comparison = Comparison(self.checkpoint, source, _Inline(1))
        matching = Matching(self.checkpoint, {key: source.tensors[key] for key in keys}, inventory)
        self._pairs = {pair.linear.name: pair for pair in matching.pairs}
        self._copies = {copy.name: copy for copy in matching.copies}

    def prove(self, linears: Sequence[str], copies: Sequence[str]) -> dict[str, Evidence]:
        """Compare what one job has written; return the evidence of what is as it should be.

        Args:
            linears: The quantized linears of one scale group, or none.
            copies: Names of copied tensors.
        """
        evidence: dict[str, Evidence] = {}
        pairs = [self._pairs[name] for name in linears if name in self._pairs]
        for pair, error in zip(pairs, self._comparison.errors(pairs), strict=True):
            reference = None
            if error.relative_error > min(OUTLIER, bound_of(pair)):
                suspect = Suspect(pair, tuple(pairs), error, 0.0)
                reference = self._comparison.reference_error(suspect)
            digest = digest_of(self._comparison, pair.linear.compared)
            sums = error.error_energy, error.weight_energy
            evidence[pair.linear.name] = Evidence(digest, *sums, reference)
        for copy in [self._copies[name] for name in copies if name in self._copies]:
            if not [*self._comparison.copies([copy])]:
                info = self.checkpoint.tensors[copy.name]
                evidence[copy.name] = Evidence(digest_of(self._comparison, [info]))
        return evidence

    def close(self) -> None:
        """Close the shard."""
        self.checkpoint.close()


def digest_of(comparison: Comparison, infos: Iterable[TensorInfo]) -> str:
    """Return the digest of the bytes of some tensors of the checkpoint, one after the other."""
    digest = xxhash.xxh3_128()
    for _, piece in _stored_bytes(comparison, infos):
        digest.update(piece)
    return digest.hexdigest()


def _stored_bytes(comparison: Comparison, infos: Iterable[TensorInfo]) -> Iterator[tuple[int, Any]]:
    """The bytes of tensors of the checkpoint in pieces, and where in its tensor each begins."""
    buffers = comparison.workers.buffers
    for info in infos:
        for start in range(0, info.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, info.nbytes - start)
            yield start, buffers.read("proven", comparison.checkpoint, info.key, start, size)


@dataclass(frozen=True, slots=True)
class _Proven:
    """A tensor or a linear of the checkpoint, with the evidence for it."""

    name: str
    infos: tuple[TensorInfo, ...]
    evidence: Evidence

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)


class ProvenComparison(Comparison):
    """Compares a checkpoint with a source by evidence, and with the source where there is none."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: Source,
        workers: Workers,
        evidence: Mapping[str, Evidence],
    ) -> None:
        """Take the evidence for linears, by their names, and for copied tensors, by theirs."""
        super().__init__(checkpoint, source, workers)
        self._evidence = evidence
        self._holds: set[str] = set()

    def total_bytes(self, matching: Matching) -> int:
        rest = [pair for pair in matching.pairs if pair.linear.name not in self._evidence]
        copies = [copy for copy in matching.copies if copy.name not in self._evidence]
        work = [*self._of_linears(matching.pairs), *self._of_copies(matching.copies)]
        rest_bytes = sum(slab.nbytes for slab in self._slabs(rest))
        rest_bytes += sum(piece.nbytes for piece in self._pieces(copies))
        return sum(x.nbytes for x in work) + rest_bytes

    def errors(self, pairs: Sequence[Pair]) -> list[LinearError]:
        for proven, holds in self.workers.run(self._is_same, self._of_linears(pairs)):
            if holds:
                self._holds.add(proven.name)
        rest = [pair for pair in pairs if pair.linear.name not in self._holds]
        errors = {error.name: error for error in super().errors(rest)}
        for pair in pairs:
            if pair.linear.name in self._holds:
                evidence = self._evidence[pair.linear.name]
                errors[pair.linear.name] = linear_error(pair, evidence.error, evidence.energy)
        return [errors[pair.linear.name] for pair in pairs]

    def copies(self, copies: Sequence[Copy]) -> Iterator[Finding]:
        work = self._of_copies(copies)
        for proven, (holds, non_finite) in self.workers.run(self._is_same_copy, work):
            if holds:
                self._holds.add(proven.name)
                self.non_finite += non_finite
        yield from super().copies([copy for copy in copies if copy.name not in self._holds])

    def reference_error(self, suspect: Suspect) -> float:
        name = suspect.pair.linear.name
        known = self._evidence[name].reference if name in self._holds else None
        return super().reference_error(suspect) if known is None else known

    def _of_linears(self, pairs: Iterable[Pair]) -> list[_Proven]:
        return [
            _Proven(
                pair.linear.name,
                pair.linear.compared,
                self._evidence[pair.linear.name],
            )
            for pair in pairs
            if pair.linear.name in self._evidence
        ]

    def _of_copies(self, copies: Iterable[Copy]) -> list[_Proven]:
        tensors = self.checkpoint.tensors
        return [
            _Proven(copy.name, (tensors[copy.name],), self._evidence[copy.name])
            for copy in copies
            if copy.name in self._evidence
        ]

    def _is_same(self, proven: _Proven) -> bool:
        return digest_of(self, proven.infos) == proven.evidence.digest

    def _is_same_copy(self, proven: _Proven) -> tuple[bool, list[NonFinite]]:
        """Whether a copied tensor has the bytes that were compared, and its NaN and Inf."""
        digest, (info,), non_finite = xxhash.xxh3_128(), proven.infos, []
        for start, piece in _stored_bytes(self, proven.infos):
            digest.update(piece)
            entry = find_non_finite(info.key, piece, info.dtype, info.row_bytes, start)
            non_finite += [] if entry is None else [entry]
        return digest.hexdigest() == proven.evidence.digest, non_finite
