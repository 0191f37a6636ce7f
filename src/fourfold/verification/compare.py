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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fourfold.formats.nvfp4.tensors import (
    FLOAT_DTYPES,
    GLOBAL_SCALE_MAX,
    GLOBAL_SCALE_MIN,
    ScaleAlgorithm,
    error_energy,
    quantize_into,
)
from fourfold.models.regions import Region
from fourfold.storage.source import Source
from fourfold.verification.checkpoint import Checkpoint, block_scales, packed_shape
from fourfold.verification.groups import fused_groups
from fourfold.verification.match import Copy, Matching, Pair
from fourfold.verification.readers.base import BLOCK_SCALE, GLOBAL_SCALE, WEIGHT
from fourfold.verification.rules import Finding, finding
from fourfold.verification.streaming import CHUNK_BYTES, Workers

BOUND = 0.35
REFERENCE_FACTOR = 3.0
WORST_LEGAL = 1.05
OUTLIER, OUTLIER_OF_MEDIAN, OUTLIER_OF_REFERENCE = 0.15, 1.8, 2.0

_NUMBERS = re.compile(r"\d+")

Bytes = npt.NDArray[np.uint8]
RowFunction = Callable[[Pair, int, Tensor], tuple[float, float]]
"""Arguments: a pair, the first row of a chunk, and that chunk of the source's weight [rows, in]."""


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
    row: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `start:stop` (first dimension) of a copied tensor."""

    copy: Copy
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A weight whose error needs an explanation. `usual` is the median of its siblings."""

    pair: Pair
    group: tuple[Pair, ...]
    error: LinearError
    usual: float


class Comparison:
    """Compares a checkpoint with its source."""

    def __init__(self, checkpoint: Checkpoint, source: Source, workers: Workers) -> None:
        self.checkpoint, self.source, self.workers = checkpoint, source, workers

    def total_bytes(self, matching: Matching) -> int:
        """Return the number of bytes that the comparison reads, of both sides."""
        pieces = (piece for copy in matching.copies for piece in self._pieces(copy))
        slabs = self.slabs(matching.pairs)
        return sum(map(self.piece_bytes, pieces)) + sum(map(self.slab_bytes, slabs))

    # ------------------------------------------------------------------------- copied tensors

    def copies(self, copies: Sequence[Copy]) -> Iterator[Finding]:
        """Compare copied tensors bit for bit."""
        differing: dict[str, tuple[Copy, int]] = {}
        pieces = [piece for copy in copies for piece in self._pieces(copy)]
        for piece, count in self.workers.run(self._compare_bits, pieces, self.piece_bytes):
            if count:
                before = differing.get(piece.copy.name, (piece.copy, 0))[1]
                differing[piece.copy.name] = (piece.copy, before + count)
        for name, (copy, count) in differing.items():
            info = self.checkpoint.tensors[name]
            text = f"{count:,} of {info.nbytes:,} bytes differ from {copy.key} in the source"
            yield finding("copied-bits-differ", name, text)

    def _pieces(self, copy: Copy) -> Iterator[_Piece]:
        if copy.region is not None:
            yield _Piece(copy, *copy.region.slab)
            return
        info = self.source.tensors[copy.key]
        if not info.nbytes:
            return
        step = max(1, CHUNK_BYTES // max(1, self._row_bytes(copy.key)))
        for start in range(0, info.rows, step):
            yield _Piece(copy, start, min(start + step, info.rows))

    def _row_bytes(self, key: str) -> int:
        return self.source.tensors[key].row_bytes

    def piece_bytes(self, piece: _Piece) -> int:
        """Return the number of bytes read to compare `piece`, of both sides."""
        theirs = self._row_bytes(piece.copy.key) * (piece.stop - piece.start)
        region = piece.copy.region
        return 2 * theirs if region is None else theirs + self._copy_bytes(piece.copy)

    def _copy_bytes(self, copy: Copy) -> int:
        return self.checkpoint.tensors[copy.name].nbytes

    def _compare_bits(self, piece: _Piece) -> int:
        """The number of bytes that differ."""
        copy, region = piece.copy, piece.copy.region
        row = self._row_bytes(copy.key)
        if region is None:
            first = piece.start * row
            bits = self.workers.buffers.take("slab", row * (piece.stop - piece.start))
            self.source.read_bytes(copy.key, first, bits)
        else:
            first, slab = 0, self._read_slab(copy.key, piece.start, piece.stop)
            bits = region.view(slab).contiguous().reshape(-1).view(torch.uint8).numpy()
        ours = self.workers.buffers.read(
            "copied", self.checkpoint, copy.name, first, first + len(bits)
        )
        return _count_different(ours, bits)

    def _read_slab(self, key: str, start: int, stop: int) -> Tensor:
        buffer = self.workers.buffers.take("slab", self._row_bytes(key) * (stop - start))
        return self.source.slab(key, start, stop, buffer)

    # ---------------------------------------------------------------------- quantized weights

    def errors(self, pairs: Sequence[Pair]) -> list[LinearError]:
        """Return the error of each pair, in order."""
        sums: dict[str, list[float]] = {pair.linear.name: [0.0, 0.0] for pair in pairs}
        for slab, energies in self.workers.run(self._energies, self.slabs(pairs), self.slab_bytes):
            for pair, (error, energy) in zip(slab.pairs, energies, strict=True):
                sums[pair.linear.name][0] += error
                sums[pair.linear.name][1] += energy
        return [_linear_error(pair, *sums[pair.linear.name]) for pair in pairs]

    def slabs(self, pairs: Iterable[Pair]) -> list[_Slab]:
        """Return the slabs to read: one for pairs that share it, several for a plain matrix."""
        by_slab: dict[tuple[str, int, int], list[Pair]] = defaultdict(list)
        for pair in pairs:
            by_slab[pair.region.key, *pair.region.slab].append(pair)
        slabs: list[_Slab] = []
        for (key, start, stop), group in by_slab.items():
            region, step = group[0].region, stop - start
            if len(group) == 1 and _is_plain(region):
                step = max(1, CHUNK_BYTES // max(1, self._row_bytes(key)))
            slabs += [
                _Slab(key, first, min(first + step, stop), tuple(group), first - start)
                for first in range(start, stop, step)
            ]
        return slabs

    def slab_bytes(self, slab: _Slab) -> int:
        """Return the number of bytes read to compare `slab`, of both sides."""
        theirs = self._row_bytes(slab.key) * (slab.stop - slab.start)
        packed = (pair.linear.parts[part] for pair in slab.pairs for part in (WEIGHT, BLOCK_SCALE))
        ours = sum(info.nbytes for info in packed)
        whole = sum(self._row_bytes(slab.key) * len(p.region.rows) for p in slab.pairs)
        return theirs + (ours * theirs // whole if _is_plain(slab.pairs[0].region) else ours)

    def _energies(self, slab: _Slab) -> list[tuple[float, float]]:
        """(Σ(w − ŵ)², Σw²) of each pair's rows in the slab."""
        raw = self._read_slab(slab.key, slab.start, slab.stop)
        return [self._sum(slab, raw, pair, self._energy) for pair in slab.pairs]

    def _sum(
        self, slab: _Slab, raw: Tensor, pair: Pair, function: RowFunction
    ) -> tuple[float, float]:
        """The sum of `function(pair, first row, weight rows)` over chunks of the pair's rows."""
        matrix = pair.region.view(raw)
        step = max(1, CHUNK_BYTES // (matrix.shape[1] * matrix.element_size()))
        first = second = 0.0
        for row in range(0, matrix.shape[0], step):
            w_OI = matrix[row : row + step].contiguous()
            w_OI = w_OI if w_OI.dtype in FLOAT_DTYPES else w_OI.float()
            a, b = function(pair, slab.row + row, w_OI)
            first, second = first + a, second + b
        return first, second

    def _energy(self, pair: Pair, row: int, w_OI: Tensor) -> tuple[float, float]:
        codes = self._rows(pair, WEIGHT, row, w_OI.shape[0])
        scales = self._rows(pair, BLOCK_SCALE, row, w_OI.shape[0])
        return error_energy(w_OI, codes, scales, self._global_scale(pair))

    def _rows(self, pair: Pair, part: str, row: int, count: int) -> Tensor:
        info = pair.linear.parts[part]
        width = info.shape[1]
        data = self.workers.buffers.read(
            part, self.checkpoint, info.key, row * width, (row + count) * width
        )
        return torch.from_numpy(data).view(count, width)

    def _global_scale(self, pair: Pair) -> float:
        return self.checkpoint.scale(pair.linear, GLOBAL_SCALE)

    # ------------------------------------------------------------------------------- judgement

    def judge(self, pairs: Sequence[Pair], errors: Sequence[LinearError]) -> Iterator[Finding]:
        """Yield the errors that no legal quantizer explains. Only suspects are read again."""
        by_name = {pair.linear.name: pair for pair in pairs}
        groups = {name: group for group in fused_groups(by_name) for name in group}
        medians = _medians(errors)
        suspects: list[_Suspect] = []
        for error in errors:
            e, usual = error.relative_error, medians[_kind(error.name)]
            if not math.isfinite(error.weight_energy):
                yield finding("source-not-finite", error.name, f"ΣW² = {error.weight_energy}")
            elif e > WORST_LEGAL:
                yield finding("weight-error", error.name, _figures(error, WORST_LEGAL))
            elif e > BOUND or e > max(OUTLIER, OUTLIER_OF_MEDIAN * usual):
                group = groups.get(error.name, (error.name,))
                members = tuple(by_name[name] for name in group)
                suspects.append(_Suspect(by_name[error.name], members, error, usual))
        for suspect, reference in self.workers.run(self._reference_error, suspects, lambda _: 0):
            yield from _judge(suspect.error, reference, suspect.usual)

    def _reference_error(self, suspect: _Suspect) -> float:
        """The error e' that the docstring of this module defines."""
        pair, group, error = suspect.pair, suspect.group, suspect.error
        amax = self._amax(pair)
        highest = max(self._amax(member) for member in group)
        stored = self._global_scale(pair)
        low, high = amax / 2688, 1.5 * highest / 1536
        scale = min(max(stored, low), high) if math.isfinite(stored) else low
        scale = min(max(scale, GLOBAL_SCALE_MIN), GLOBAL_SCALE_MAX)

        def energy(pair: Pair, row: int, w_OI: Tensor) -> tuple[float, float]:
            rows, width = w_OI.shape
            codes = torch.empty(packed_shape((rows, width)), dtype=torch.uint8)
            scales = torch.empty(block_scales((rows, width)), dtype=torch.uint8)
            stats = quantize_into(w_OI, codes, scales, scale=ScaleAlgorithm.MAX, global_scale=scale)
            return stats.sum_sq_err, stats.sum_sq_w

        return math.sqrt(self._sum_again(pair, energy) / error.weight_energy)

    def _amax(self, pair: Pair) -> float:
        def amax(_pair: Pair, _row: int, w_OI: Tensor) -> tuple[float, float]:
            maxima.append(float(w_OI.abs().amax()))
            return 0.0, 0.0

        maxima: list[float] = []
        self._sum_again(pair, amax)
        return max(maxima)

    def _sum_again(self, pair: Pair, function: RowFunction) -> float:
        """Read a pair's matrix again, in this thread: the sum of the function's first result."""
        total = 0.0
        for slab in self.slabs([pair]):
            raw = self._read_slab(slab.key, slab.start, slab.stop)
            total += self._sum(slab, raw, pair, function)[0]
        return total


def _count_different(first: Bytes, second: Bytes) -> int:
    """The number of bytes that differ. Words of eight bytes are compared first, for speed."""
    words = len(first) // 8 * 8
    same = np.array_equal(first[:words].view(np.uint64), second[:words].view(np.uint64))
    tail = first[words:] != second[words:]
    return int(tail.sum()) if same else int((first != second).sum())


def _is_plain(region: Region) -> bool:
    """True if a range of its rows is a range of the raw tensor's first dimension."""
    return region.expert is None and not region.transposed and region.rows.step == 1


def _linear_error(pair: Pair, error: float, energy: float) -> LinearError:
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


def _judge(error: LinearError, reference: float, usual: float) -> Iterator[Finding]:
    e = error.relative_error
    bound = max(BOUND, min(REFERENCE_FACTOR * reference, WORST_LEGAL))
    if e > bound:
        yield finding("weight-error", error.name, _figures(error, bound))
    elif e > BOUND:
        yield finding("weight-ruined", error.name, _figures(error, BOUND))
    elif e > max(OUTLIER, OUTLIER_OF_MEDIAN * usual, OUTLIER_OF_REFERENCE * reference):
        text = f"relative error {e:.3f}, its siblings have {usual:.3f}"
        yield finding("weight-error-outlier", error.name, text)


def _figures(error: LinearError, bound: float) -> str:
    return f"relative error {error.relative_error:.3f}, the bound is {bound:.2f}"
