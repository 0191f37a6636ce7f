# SPDX-License-Identifier: Apache-2.0
"""The checkpoint against its source: copied bits, and the error of each dequantized weight.

    relative error   e = ‖W − Ŵ‖ / ‖W‖  (Frobenius),  SQNR = −20·log₁₀ e  dB

**The bound.** It must let pass whatever a legal quantizer does, and catch what is in the wrong
place: another expert, another row order, swapped gate and up, swapped nibbles, a wrong scale. For
two unrelated weights, e = √2; for a wrong global scale f·S, e = |f − 1|.
A legal e is about 0.09, up to 0.2 with heavy tails, and some more where a quantizer looks at
activations and lets the weight's own error grow. So e ≤ 0.35 passes. But a legal e can be as
large as 1, where blocks lie so far below the group's amax that their scale ends at 2⁻⁹ and their
codes at 0. So above 0.35, the same weight is quantized here in the simplest legal way (block
scale = amax/6) with a global scale S' that this weight and its group allow, and that error e'
decides, block by block as it were:

    e ≤ max(0.35, min(3·e', 1.05))         S' = S held to [amax/2688, 1.5 · group amax/1536]

Nothing legal is worse than writing zeros (e = 1), hence 1.05. S is held to what is possible, or
else a wrong S would excuse itself.

**Outliers.** Experts that were made of one dense layer resemble each other, and a swap of two
stays below the bound. So an e above 0.15 and 1.8 times its siblings' median is compared with e',
too, and warned of above 2·e'.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fourfold.formats.nvfp4 import (
    FLOAT_DTYPES,
    GLOBAL_SCALE_MAX,
    GLOBAL_SCALE_MIN,
    error_energy,
)
from fourfold.storage.non_finite import NonFinite, find_non_finite
from fourfold.storage.source import Source
from fourfold.verification import fp8
from fourfold.verification.checkpoint import NVFP4, Checkpoint, QuantizedLinear
from fourfold.verification.fp8 import FP8Linear
from fourfold.verification.groups import fused_groups, input_site
from fourfold.verification.match import Copy, Matching, Pair
from fourfold.verification.readers.base import BLOCK_SCALE, GLOBAL_SCALE, WEIGHT
from fourfold.verification.rules import Finding, finding
from fourfold.verification.streaming import CHUNK_BYTES, Workers

BOUND = 0.35
REFERENCE_FACTOR = 3.0
WORST_LEGAL = 1.05
ROUNDS_TO_ZERO = 2.0**-11
"""A weight below this part of its global scale becomes 0 with every block scale: half of the
smallest code times the smallest block scale. The energies of such weights may underflow."""

OUTLIER, OUTLIER_OF_MEDIAN, OUTLIER_OF_REFERENCE = 0.15, 1.8, 2.0

_NUMBERS = re.compile(r"\d+")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class LinearError:
    """The difference between a dequantized weight and the source's."""

    name: str
    role: str
    relative_error: float
    """‖W − Ŵ‖ / ‖W‖; 0 if both are zero, infinite if only W is."""
    error_energy: float
    """Σ(W − Ŵ)²"""
    weight_energy: float
    """ΣW²"""

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB; infinite if there is no error."""
        return sqnr_db(self.relative_error)


def sqnr_db(relative_error: float) -> float:
    """Return −20·log₁₀ of a relative error; infinite if the error is 0."""
    return math.inf if relative_error == 0 else -20 * math.log10(relative_error)


@dataclass(frozen=True, slots=True)
class _Slab:
    """A slab of a raw tensor and the pairs in it. `row` is its first row within the pair."""

    key: str
    start: int
    stop: int
    pairs: tuple[Pair, ...]
    row: int
    nbytes: int
    """Bytes read to compare it, of both sides."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `start:stop` (first dimension) of a copied tensor."""

    copy: Copy
    start: int
    stop: int
    nbytes: int
    """Bytes read to compare it, of both sides."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A weight whose error needs an explanation. `usual` is the median of its siblings."""

    pair: Pair
    group: tuple[Pair, ...]
    error: LinearError
    usual: float
    nbytes: int = 0
    """Bytes that count as progress: none, since they are read a second time."""


class Comparison:
    """Compares a checkpoint with its source."""

    def __init__(self, checkpoint: Checkpoint, source: Source, workers: Workers) -> None:
        self.checkpoint, self.source, self.workers = checkpoint, source, workers
        self.non_finite: list[NonFinite] = []
        self._amaxes: dict[str, float] = {}

    def total_bytes(self, matching: Matching) -> int:
        """Return the number of bytes that the comparison reads, of both sides."""
        copied = sum(piece.nbytes for piece in self._pieces(matching.copies))
        return copied + sum(slab.nbytes for slab in self._slabs(matching.pairs))

    # ------------------------------------------------------------------------- copied tensors

    def copies(self, copies: Sequence[Copy]) -> Iterator[Finding]:
        """Compare copied tensors bit for bit; note the NaN and Inf in them in `non_finite`."""
        differing: Counter[Copy] = Counter()
        for piece, (count, non_finite) in self.workers.run(
            self._compare_bits, [*self._pieces(copies)]
        ):
            differing[piece.copy] += count
            self.non_finite += [] if non_finite is None else [non_finite]
        for copy, count in differing.items():
            if count:
                nbytes = self.checkpoint.tensors[copy.name].nbytes
                text = f"{count:,} of {nbytes:,} bytes differ from {copy.key} in the source"
                yield finding("copied-bits-differ", copy.name, text)

    def _pieces(self, copies: Sequence[Copy]) -> Iterator[_Piece]:
        for copy in copies:
            info = self.source.tensors[copy.key]
            if copy.region is not None:
                start, stop = copy.region.slab
                ours = self.checkpoint.tensors[copy.name].nbytes
                yield _Piece(copy, start, stop, info.row_bytes * (stop - start) + ours)
            elif info.nbytes:
                for start, stop in _cut(0, info.rows, info.row_bytes):
                    yield _Piece(copy, start, stop, 2 * info.row_bytes * (stop - start))

    def _compare_bits(self, piece: _Piece) -> tuple[int, NonFinite | None]:
        """The number of bytes that differ, and the NaN and Inf among ours."""
        copy, region = piece.copy, piece.copy.region
        if region is None:
            row = self.source.tensors[copy.key].row_bytes
            first = piece.start * row
            bits = self.workers.buffers.take("slab", row * (piece.stop - piece.start))
            self.source.read_bytes(copy.key, first, bits)
        else:
            first, slab = 0, self._read_slab(copy.key, piece.start, piece.stop)
            bits = region.view(slab).contiguous().reshape(-1).view(torch.uint8).numpy()
        ours = self.workers.buffers.read("copied", self.checkpoint, copy.name, first, len(bits))
        info = self.checkpoint.tensors[copy.name]
        non_finite = find_non_finite(copy.name, ours, info.dtype, info.row_bytes, first)
        return _count_different(ours, bits), non_finite

    def _read_slab(self, key: str, start: int, stop: int) -> Tensor:
        nbytes = self.source.tensors[key].row_bytes * (stop - start)
        return self.source.slab(key, start, stop, self.workers.buffers.take("slab", nbytes))

    # ---------------------------------------------------------------------- quantized weights

    def errors(self, pairs: Sequence[Pair]) -> list[LinearError]:
        """Return the error of each pair, in order."""
        sums: dict[str, list[float]] = {pair.linear.name: [0.0, 0.0] for pair in pairs}
        for slab, energies in self.workers.run(self._energies, self._slabs(pairs)):
            for pair, (error, energy) in zip(slab.pairs, energies, strict=True):
                sums[pair.linear.name][0] += error
                sums[pair.linear.name][1] += energy
        return [linear_error(pair, *sums[pair.linear.name]) for pair in pairs]

    def _slabs(self, pairs: Iterable[Pair]) -> list[_Slab]:
        """The slabs to read: one for pairs that share it, several for a plain matrix."""
        by_slab: dict[tuple[str, int, int], list[Pair]] = defaultdict(list)
        for pair in pairs:
            by_slab[pair.region.key, *pair.region.slab].append(pair)
        slabs: list[_Slab] = []
        for (key, start, stop), group in by_slab.items():
            row, members = self.source.tensors[key].row_bytes, tuple(group)
            ours = sum(info.nbytes for x in group for info in x.linear.compared)
            is_cut = len(group) == 1 and group[0].region.is_plain
            for first, last in _cut(start, stop, row) if is_cut else [(start, stop)]:
                share = ours * (last - first) // (stop - start) if is_cut else ours
                nbytes = row * (last - first) + share
                slabs.append(_Slab(key, first, last, members, first - start, nbytes))
        return slabs

    def _energies(self, slab: _Slab) -> list[tuple[float, float]]:
        """(Σ(w − ŵ)², Σw²) of each pair's rows in the slab."""
        raw = self._read_slab(slab.key, slab.start, slab.stop)
        return [self._energy(pair, slab, raw) for pair in slab.pairs]

    def _energy(self, pair: Pair, slab: _Slab, raw: Tensor) -> tuple[float, float]:
        linear, error, energy = pair.linear, 0.0, 0.0
        for row, w_OI in _chunks(pair, slab, raw):
            if isinstance(linear, FP8Linear):
                sums = fp8.error_sums(self.checkpoint, linear, w_OI, row)
            else:
                sums = self._nvfp4_sums(linear, w_OI, row)
            error, energy = error + sums[0], energy + sums[1]
        return error, energy

    def _nvfp4_sums(self, linear: QuantizedLinear, w_OI: Tensor, row: int) -> tuple[float, float]:
        codes, scales = (self._rows(linear, x, row, len(w_OI)) for x in (WEIGHT, BLOCK_SCALE))
        return error_energy(w_OI, codes, scales, self.checkpoint.scale(linear, GLOBAL_SCALE))

    def _rows(self, linear: QuantizedLinear, part: str, row: int, count: int) -> Tensor:
        info = linear.parts[part]
        width = info.shape[1]
        data = self.workers.buffers.read(
            part, self.checkpoint, info.key, row * width, count * width
        )
        return torch.from_numpy(data).view(count, width)

    # ------------------------------------------------------------------------------- judgement

    def judge(self, pairs: Sequence[Pair], errors: Sequence[LinearError]) -> Iterator[Finding]:
        """Yield the errors that no legal quantizer explains. Only suspects are read again."""
        by_name = {pair.linear.name: pair for pair in pairs}
        groups = self._groups(by_name)
        medians = _medians(errors)
        suspects: list[Suspect] = []
        for error in errors:
            e, usual = error.relative_error, medians[_kind(error.name)]
            if not math.isfinite(error.weight_energy):
                yield finding("source-not-finite", error.name, f"ΣW² = {error.weight_energy}")
            elif not math.isfinite(error.error_energy):
                yield finding("weight-error", error.name, "it holds NaN or Inf")
            elif e > WORST_LEGAL:
                yield finding("weight-error", error.name, _figures(error, WORST_LEGAL))
            elif e > bound_of(by_name[error.name]) or e > max(OUTLIER, OUTLIER_OF_MEDIAN * usual):
                group = groups.get(error.name, (error.name,))
                members = tuple(by_name[name] for name in group)
                suspects.append(Suspect(by_name[error.name], members, error, usual))
        for suspect, reference in self.workers.run(self.reference_error, suspects):
            yield from _judge(suspect, reference)

    def _groups(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The groups that share a global scale, by each member: what engines fuse, or all experts
        of a layer, if the checkpoint has one scale for all of them."""
        fused = fused_groups(names, self.checkpoint.peculiar)
        groups = {name: group for group in fused for name in group}
        sites: dict[str, list[str]] = defaultdict(list)
        for name in names:
            if (site := input_site(name)) is not None:
                sites[site].append(name)
        for members in sites.values():
            linears = [x for x in map(self.checkpoint.linears.get, members) if x is not None]
            if len({self.checkpoint.scale(linear, GLOBAL_SCALE) for linear in linears}) == 1:
                groups |= dict.fromkeys(members, tuple(members))
        return groups

    def reference_error(self, suspect: Suspect) -> float:
        """Return the error e' that the docstring of this module defines."""
        linear, amax = suspect.pair.linear, self._amax(suspect.pair)
        if isinstance(linear, FP8Linear):
            lost = (fp8.rounding_error(w_OI, amax) for w_OI in self._read_again(suspect.pair))
            return math.sqrt(sum(lost) / suspect.error.weight_energy)
        highest = max(map(self._amax, suspect.group))
        stored = self.checkpoint.scale(linear, GLOBAL_SCALE)
        low, high = amax / 2688, 1.5 * highest / 1536
        scale = min(max(stored, low), high) if math.isfinite(stored) else low
        scale = min(max(scale, GLOBAL_SCALE_MIN), GLOBAL_SCALE_MAX)
        if amax < ROUNDS_TO_ZERO * scale:
            return 1.0
        error = 0.0
        for w_OI in self._read_again(suspect.pair):
            parts = NVFP4.row_parts((w_OI.shape[0], w_OI.shape[1]))
            out = {name: torch.empty(size, dtype=torch.uint8) for name, (_, size) in parts.items()}
            error += NVFP4.quantize(w_OI, out, scale="max", group_scale=scale, name="")[0]
        return math.sqrt(error / suspect.error.weight_energy)

    def _amax(self, pair: Pair) -> float:
        name = pair.linear.name
        if name not in self._amaxes:
            self._amaxes[name] = max(float(w.abs().amax()) for w in self._read_again(pair))
        return self._amaxes[name]

    def _read_again(self, pair: Pair) -> Iterator[Tensor]:
        """Chunks of a pair's matrix in the source, read in this thread."""
        for slab in self._slabs([pair]):
            raw = self._read_slab(slab.key, slab.start, slab.stop)
            yield from (w_OI for _, w_OI in _chunks(pair, slab, raw))


def _cut(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of at most `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def _chunks(pair: Pair, slab: _Slab, raw: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cut the pair's rows in a slab: the first row, and the source's weight [rows, in]."""
    matrix = pair.region.view(raw)
    for row, stop in _cut(0, matrix.shape[0], matrix.shape[1] * matrix.element_size()):
        w_OI = matrix[row:stop].contiguous()
        yield slab.row + row, w_OI if w_OI.dtype in FLOAT_DTYPES else w_OI.float()


def _count_different(first: Bytes, second: Bytes) -> int:
    """The number of bytes that differ. Words of eight bytes are compared first, for speed."""
    words = len(first) // 8 * 8
    same = np.array_equal(first[:words].view(np.uint64), second[:words].view(np.uint64))
    tail = first[words:] != second[words:]
    return int(tail.sum()) if same else int((first != second).sum())


def linear_error(pair: Pair, error: float, energy: float) -> LinearError:
    """Return the error of a pair from Σ(w − ŵ)² and Σw²."""
    if energy > 0:
        relative = math.sqrt(error / energy) if error >= 0 else math.nan
    else:
        relative = math.nan if math.isnan(error + energy) else math.inf if error else 0.0
    return LinearError(pair.linear.name, pair.role, relative, error, energy)


def _kind(name: str) -> str:
    """Siblings: one projection of all experts of a layer, or one linear of all layers."""
    head, dot, tail = name.rpartition("experts.")
    return head + dot + _NUMBERS.sub("#", tail) if dot else _NUMBERS.sub("#", name)


def _medians(errors: Iterable[LinearError]) -> dict[str, float]:
    """The median error of each kind; infinite for a kind of fewer than four."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for error in errors:
        kinds[_kind(error.name)].append(error.relative_error)
    return {
        kind: median_low(values)
        if len(values) >= 4 and all(map(math.isfinite, values))
        else math.inf
        for kind, values in kinds.items()
    }


def bound_of(pair: Pair) -> float:
    """Return the relative error of a linear that needs no explanation."""
    return fp8.BOUND if isinstance(pair.linear, FP8Linear) else BOUND


def _judge(suspect: Suspect, reference: float) -> Iterator[Finding]:
    error, usual, usually_legal = suspect.error, suspect.usual, bound_of(suspect.pair)
    e = error.relative_error
    bound = max(usually_legal, min(REFERENCE_FACTOR * reference, WORST_LEGAL))
    if e > bound:
        yield finding("weight-error", error.name, _figures(error, bound))
    elif e > usually_legal:
        yield finding("weight-ruined", error.name, _figures(error, usually_legal))
    elif e > max(OUTLIER, OUTLIER_OF_MEDIAN * usual, OUTLIER_OF_REFERENCE * reference):
        text = f"relative error {e:.3f}, its siblings have {usual:.3f}"
        yield finding("weight-error-outlier", error.name, text)


def _figures(error: LinearError, bound: float) -> str:
    return f"relative error {error.relative_error:.3f}, the bound is {bound:.2f}"
