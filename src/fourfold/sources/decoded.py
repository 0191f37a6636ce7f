"""An NVFP4 checkpoint, presented as the source that it was made of: a `Source` like any other.

It has the source's names, shapes and dtypes, and a configuration that says nothing of
quantization; weights are dequantized when they are read, everything else is as it lies there.
So a model can be built, run, streamed or compared from it as from a checkpoint in BF16.

    OUT   experts.0.gate_proj.{weight, weight_scale, weight_scale_2, input_scale}, experts.0.up_…
    here  experts.gate_up_proj   BF16 [experts, in, 2·out]     (where the source was like that)

How the source lay on disk is written in `quant_summary.json`: for each linear weight its dtype,
and, unless it was all of a tensor, the tensor, rows and columns that it was cut out of. The
record is not trusted: what it says must fit the tensors and cover the source's exactly. A
checkpoint without one (ModelOpt's own) is presented with a weight for each linear layer.

Scales of the KV cache and of inputs are not tensors of the source: the latter are `input_scales`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourfold.errors import SourceError, UsageError
from fourfold.formats import nvfp4
from fourfold.layouts.modelopt import (
    BLOCK_SCALE,
    BLOCK_SIZE,
    CODES,
    GLOBAL_SCALE,
    INPUT_SCALE,
    K_SCALE,
    PARTS,
    V_SCALE,
)
from fourfold.sources.safetensors import SafetensorsFolder, open_source
from fourfold.storage.fingerprints import FileStamp
from fourfold.storage.json_files import read_json
from fourfold.storage.names import REPORT, STATISTICS, SUMMARY
from fourfold.storage.safetensors_header import TORCH_DTYPES, TensorInfo, nbytes_of
from fourfold.storage.source import Bytes, Source

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class DequantizedFolder(Source):
    """A folder in the ModelOpt layout, dequantized. Safe for many threads."""

    def __init__(
        self,
        out: str | Path,
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`dtype`: of the dequantized weights; by default each has the dtype of its source.

        float32 gives their values unrounded. Raises SourceError where the folder cannot be read,
        holds no NVFP4 weight, or holds what cannot be dequantized.
        """
        self._packed = open_source(out)
        self.folder, self.trust_remote_code = self._packed.folder, trust_remote_code
        self.config = _without_quantization(self._packed.config)
        self.linears: Mapping[str, tuple[int, int]] = _find_linears(self._packed)
        """Every linear layer in NVFP4 by its name: [out, in]."""
        layout = _Layout(self._packed, self.linears, dtype)
        self._pieces = layout.pieces
        self.tensors = layout.tensors
        self._global_scales: dict[str, float] = {}

    @cached_property
    def input_scales(self) -> Mapping[str, float]:
        """Static scales of quantized activations (W4A4), by linear layer; none for W4A16."""
        names = (f"{linear}.{INPUT_SCALE}" for linear in self.linears)
        return {
            name.removesuffix(f".{INPUT_SCALE}"): self._scalar(name)
            for name in names
            if name in self._packed.tensors
        }

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        pieces = self._pieces.get(key)
        if pieces is None:
            return self._packed.slab(key, start, stop, out)
        info = self.tensors[key]
        shape = (stop - start, *info.shape[1:])
        buffer = np.empty(nbytes_of(info.dtype, shape), dtype=np.uint8) if out is None else out
        slab = torch.from_numpy(buffer).view(info.torch_dtype).view(shape)
        for piece in pieces:
            self._fill(slab, start, piece)
        return slab

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        if key in self._pieces:
            super().read_bytes(key, start, out)
        else:
            self._packed.read_bytes(key, start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        if key not in self._pieces:
            self._packed.will_need(key, start, stop)
            return
        for piece in self._pieces[key]:
            if piece.rows_inside(start, stop):
                for part in (CODES, BLOCK_SCALE) if piece.is_linear else ("bias",):
                    self._packed.will_need(f"{piece.name}.{part}", 0, piece.shape[0])

    def side_files(self) -> tuple[list[Path], list[Path]]:
        """As the source's: without what a quantization run puts beside the weights."""
        own = {Path(name) for name in (SUMMARY, REPORT, STATISTICS)}
        copied, dropped = self._packed.side_files()
        return [p for p in copied if p not in own], [p for p in dropped if p not in own]

    def stamps(self) -> Mapping[str, FileStamp] | None:
        return self._packed.stamps()

    def check_unchanged(self) -> None:
        self._packed.check_unchanged()

    def close(self) -> None:
        self._packed.close()

    def _fill(self, slab: torch.Tensor, start: int, piece: _Piece) -> None:
        """Write what of a piece lies in the raw tensor's rows from `start` on, into `slab`."""
        rows = piece.rows_inside(start, start + len(slab))
        if not rows:
            return
        target = piece.view(slab[rows[0] - start : rows[-1] - start + 1])
        if piece.is_linear:
            self._dequantize(piece, rows, target)
        else:
            bias = self._packed.slab(f"{piece.name}.bias", 0, piece.shape[0])
            target.copy_(piece.part(bias, rows))

    def _dequantize(self, piece: _Piece, rows: range, target: torch.Tensor) -> None:
        """The rows of the raw tensor that are `rows`, into `target`: a view of a piece's shape."""
        first, last = piece.rows_needed(rows)
        codes = self._packed.slab(f"{piece.name}.{CODES}", first, last)
        scales = self._packed.slab(f"{piece.name}.{BLOCK_SCALE}", first, last)
        scale = self._global_scale(piece.name)
        is_all = target.shape == (last - first, piece.shape[1]) and target.is_contiguous()
        if is_all and target.dtype in (torch.float32, torch.bfloat16):
            nvfp4.dequantize_into(codes, scales, scale, target)
        else:
            weight = nvfp4.dequantize(codes, scales, scale, target.dtype)
            target.copy_(piece.part(weight, rows) if piece.transposed else weight)

    def _global_scale(self, linear: str) -> float:
        if linear not in self._global_scales:
            self._global_scales[linear] = self._scalar(f"{linear}.{GLOBAL_SCALE}")
        return self._global_scales[linear]

    def _scalar(self, name: str) -> float:
        value = float(self._packed.read(name))
        if not (math.isfinite(value) and value > 0):
            raise SourceError(
                f"{name}: {value}; a scale must be positive and finite. Quantize the model again."
            )
        return value


@dataclass(frozen=True, slots=True)
class _Piece:
    """A linear weight `[out, in]` or a bias `[out]` of OUT, as a part of a tensor of the source.

    `expert` indexes the tensor's first dimension; None where it has no such dimension. `rows` and
    `cols` are spans of the last two dimensions (of the last one for a bias).
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None
    rows: range
    cols: range | None
    transposed: bool

    @property
    def is_linear(self) -> bool:
        return self.cols is not None

    @property
    def first_dimension(self) -> range:
        """Where it lies in the raw tensor's first dimension."""
        return self.rows if self.expert is None else range(self.expert, self.expert + 1)

    def rows_inside(self, start: int, stop: int) -> range:
        """Which indices of the first dimension, of those it has, are within `start:stop`."""
        mine = self.first_dimension
        first, last = (max(0, -(-(at - mine.start) // mine.step)) for at in (start, stop))
        return mine[first:last]

    def view(self, slab: torch.Tensor) -> torch.Tensor:
        """This piece as a view of a slab that begins and ends with a row of it."""
        rows = slab[:: self.rows.step] if self.expert is None else slab[0][_slice(self.rows)]
        if self.cols is None:
            return rows
        matrix = rows[:, _slice(self.cols)]
        return matrix.T if self.transposed else matrix

    def part(self, whole: torch.Tensor, rows: range) -> torch.Tensor:
        """Of all of the piece, what lies in `rows` of the first dimension."""
        if self.expert is not None or len(rows) == len(self.rows):
            return whole
        first = self.rows.index(rows[0])
        return whole.narrow(1 if self.transposed else 0, first, len(rows))

    def meets(self, other: _Piece) -> bool:
        """Whether another piece of the same expert may have an element in common."""
        rows = _meet(self.rows, other.rows)
        return rows and (self.cols is None or other.cols is None or _meet(self.cols, other.cols))

    def rows_needed(self, rows: range) -> tuple[int, int]:
        """The rows of the linear weight to dequantize for `rows` of the first dimension."""
        if self.expert is not None or self.transposed:
            return 0, self.shape[0]
        first = self.rows.index(rows[0])
        return first, first + len(rows)


def _slice(span: range) -> slice:
    return slice(span.start, span.stop, span.step)


def _meet(one: range, other: range) -> bool:
    in_step = (one.start - other.start) % math.gcd(one.step, other.step) == 0
    return in_step and one.start < other.stop and other.start < one.stop


class _Layout:
    """What the source's tensors were, and which pieces of OUT they are put together of."""

    def __init__(
        self,
        packed: SafetensorsFolder,
        linears: Mapping[str, tuple[int, int]],
        dtype: torch.dtype | None,
    ) -> None:
        self.packed, self.linears = packed, linears
        self.record = _Record(packed.folder)
        self.dtype = _name_of(dtype) if dtype is not None else None
        self.usual = _usual_dtype(packed.config)
        self.pieces: dict[str, tuple[_Piece, ...]] = self._find_pieces()
        self.tensors = self._present()

    def _find_pieces(self) -> dict[str, tuple[_Piece, ...]]:
        found: dict[str, list[_Piece]] = defaultdict(list)
        for name, (rows, cols) in self.linears.items():
            raw = self.record.raw_of(name)
            if raw is None:
                key = f"{name}.{CODES}"
                whole = _Piece(name, (rows, cols), None, range(rows), range(cols), False)
                found[key].append(whole)
            else:
                key, piece = self.record.piece(name, (rows, cols), raw)
                found[key].append(piece)
        for name, raw in self.record.biases.items():
            info = self.packed.tensors.get(f"{name}.bias")
            if info is None:
                raise self.record.broken(f"{name}.bias", "is not in the checkpoint")
            key, piece = self.record.piece(name, info.shape, raw)
            found[key].append(piece)
        return {key: tuple(pieces) for key, pieces in found.items()}

    def _present(self) -> dict[str, TensorInfo]:
        """The source's tensors, in the order of their first bytes in OUT."""
        becomes = {
            f"{piece.name}.{CODES if piece.is_linear else 'bias'}": key
            for key, pieces in self.pieces.items()
            for piece in pieces
        }
        found: dict[str, TensorInfo] = {}
        for name, info in self.packed.tensors.items():
            stem, _, leaf = name.rpartition(".")
            if name in becomes:
                key = becomes[name]
                if key not in found:
                    found[key] = self._info(key, info)
            elif leaf not in {K_SCALE, V_SCALE} and not (stem in self.linears and leaf in PARTS):
                found[name] = info
        return found

    def _info(self, key: str, first: TensorInfo) -> TensorInfo:
        """What a tensor of the source was. It lies nowhere: its place is that of its first part."""
        pieces = self.pieces[key]
        dtype, shape = self._dtype_and_shape(key, pieces)
        if key in self.packed.tensors and key != first.key:
            raise self.record.broken(key, "is in the checkpoint, whole, and in parts")
        if pieces[0].is_linear and self.dtype is not None:
            dtype = self.dtype
        return TensorInfo(
            key, dtype, shape, first.file, first.start, first.start + nbytes_of(dtype, shape)
        )

    def _dtype_and_shape(self, key: str, pieces: tuple[_Piece, ...]) -> tuple[str, tuple[int, ...]]:
        if key == f"{pieces[0].name}.{CODES}":
            return self.record.dtype_of(pieces[0].name) or self.usual, pieces[0].shape
        dtype, shape = self.record.raw_tensor(key)
        self.record.check_cover(key, shape, pieces)
        return dtype, shape


class _Record:
    """`quant_summary.json`: what fourfold wrote of the source's layout. Empty without one."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / SUMMARY
        document = read_json(self.file) if self.file.is_file() else {}
        self._linears = self._by(document, "linears", "name")
        self._tensors = self._by(document, "raw_tensors", "key")
        self.biases = {
            name: entry.get("raw") for name, entry in self._by(document, "biases", "name").items()
        }

    def broken(self, name: str, what: str) -> SourceError:
        return SourceError(
            f"{self.file}: {name}: {what}. The file belongs to another checkpoint, or was changed; "
            "quantize the model again."
        )

    def dtype_of(self, linear: str) -> str | None:
        """The dtype that a linear weight had in the source."""
        dtype = self._linears.get(linear, {}).get("dtype")
        if dtype is not None and dtype not in FLOATS:
            raise self.broken(linear, f"dtype {dtype!r}")
        return dtype

    def raw_of(self, linear: str) -> Any:
        """Where a linear weight lay; None for all of a tensor of its own."""
        return self._linears.get(linear, {}).get("raw")

    def raw_tensor(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor of the source that was cut."""
        match self._tensors.get(key):
            case {"dtype": str(dtype), "shape": [*shape]} if dtype in FLOATS and _are_sizes(shape):
                return dtype, tuple(shape)
        raise self.broken(key, "has no dtype and shape in raw_tensors")

    def piece(self, name: str, shape: tuple[int, ...], raw: Any) -> tuple[str, _Piece]:
        """A linear weight or bias of this shape, and the key of the tensor that it was part of."""
        match raw:
            case {
                "key": str(key),
                "expert": expert,
                "rows": [*rows],
                "cols": cols,
                "transposed": bool(transposed),
            } if (expert is None or _are_sizes([expert])) and _is_span(rows):
                if _is_span(cols) if len(shape) == 2 else cols is None:
                    columns = None if cols is None else range(*cols)
                    piece = _Piece(name, shape, expert, range(*rows), columns, transposed)
                    self._check_place(key, piece)
                    return key, piece
        raise self.broken(name, f"its place in the source makes no sense: {str(raw)[:120]}")

    def _check_place(self, key: str, piece: _Piece) -> None:
        """A piece has its own shape there, and lies inside its tensor."""
        _, shape = self.raw_tensor(key)
        spans = [piece.rows] if piece.cols is None else [piece.rows, piece.cols]
        sizes = tuple(len(span) for span in spans)
        lead = [] if piece.expert is None else [range(piece.expert, piece.expert + 1)]
        fits = len(shape) == len(lead) + len(spans) and all(
            span.stop <= size for span, size in zip([*lead, *spans], shape, strict=True)
        )
        if not fits or piece.shape != (sizes[::-1] if piece.transposed else sizes):
            raise self.broken(piece.name, f"{list(piece.shape)} does not fit {key} {list(shape)}")

    def check_cover(self, key: str, shape: tuple[int, ...], pieces: Sequence[_Piece]) -> None:
        """Every element of a tensor comes from one piece: as many as it has, and none twice."""
        by_expert: dict[int | None, list[_Piece]] = defaultdict(list)
        for piece in pieces:
            by_expert[piece.expert].append(piece)
        for group in by_expert.values():
            for one, other in combinations(group, 2):
                if one.meets(other):
                    raise self.broken(key, f"{one.name} and {other.name} overlap")
        total = sum(math.prod(piece.shape) for piece in pieces)
        if total != math.prod(shape) or len({piece.is_linear for piece in pieces}) > 1:
            raise self.broken(key, f"its parts have {total:,} of {math.prod(shape):,} elements")

    def _by(self, document: Mapping[str, Any], name: str, key: str) -> dict[str, dict[str, Any]]:
        entries = document.get(name, [])
        if not isinstance(entries, list):
            raise self.broken(name, "is no list")
        if not all(
            isinstance(entry, dict) and isinstance(entry.get(key), str) for entry in entries
        ):
            raise self.broken(name, f"an entry has no {key}")
        twice = [x for x, times in Counter(entry[key] for entry in entries).items() if times > 1]
        if twice:
            raise self.broken(twice[0], f"stands twice in {name}")
        return {entry[key]: entry for entry in entries}


def _are_sizes(values: Iterable[Any]) -> bool:
    return all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in values)


def _is_span(value: Any) -> bool:
    """Whether it is a start, a stop and a step of at least one element."""
    is_triple = isinstance(value, list) and len(value) == 3 and _are_sizes(value)
    return is_triple and value[2] > 0 and len(range(*value)) > 0


def _find_linears(packed: SafetensorsFolder) -> dict[str, tuple[int, int]]:
    """The linear layers in NVFP4; everything that looks like one must be one."""
    linears = {}
    for name in packed.tensors:
        linear, _, leaf = name.rpartition(".")
        if linear not in linears and leaf in PARTS and _is_nvfp4(packed.tensors, linear):
            linears[linear] = _shape_of(packed.tensors, linear)
    if not linears:
        raise SourceError(
            f"{packed.folder}: holds no NVFP4 weights in the ModelOpt layout. Give a folder that "
            "fourfold wrote; transformers' from_pretrained loads others."
        )
    for name, info in packed.tensors.items():
        stem, _, leaf = name.rpartition(".")
        is_scale = leaf in PARTS - {K_SCALE, V_SCALE}
        is_packed = leaf == CODES and info.dtype.startswith(("U", "I", "F8", "F6", "F4"))
        if stem not in linears and (is_scale or is_packed):
            raise SourceError(
                f"{name} in {info.file.name}: {info.dtype}, of a layer that is quantized otherwise "
                "than to NVFP4. It cannot be dequantized here."
            )
    return linears


def _is_nvfp4(tensors: Mapping[str, TensorInfo], linear: str) -> bool:
    """By its global scale; where that is lost, by the dtypes of the others."""
    infos = [tensors.get(f"{linear}.{part}") for part in (CODES, BLOCK_SCALE)]
    dtypes = [None if info is None else info.dtype for info in infos]
    return f"{linear}.{GLOBAL_SCALE}" in tensors or dtypes == ["U8", "F8_E4M3"]


def _shape_of(tensors: Mapping[str, TensorInfo], linear: str) -> tuple[int, int]:
    """[out, in] of a linear layer in NVFP4, whose parts must fit each other."""
    parts = {}
    for part in (CODES, BLOCK_SCALE, GLOBAL_SCALE):
        name = f"{linear}.{part}"
        if name not in tensors:
            raise SourceError(
                f"{name}: missing, while other parts of that layer are there. "
                "The checkpoint is incomplete: quantize the model again."
            )
        parts[part] = tensors[name]
    codes, scales, single = parts.values()
    rows, half = codes.shape if len(codes.shape) == 2 else (0, 0)
    dtypes = (codes.dtype, scales.dtype, single.dtype)
    fits = half % (BLOCK_SIZE // 2) == 0 and scales.shape == (rows, half * 2 // BLOCK_SIZE)
    if dtypes != ("U8", "F8_E4M3", "F32") or not fits or not rows * half or single.numel != 1:
        raise SourceError(
            f"{linear}: codes {codes.dtype} {list(codes.shape)}, block scales {scales.dtype} "
            f"{list(scales.shape)}, global scale {single.dtype} {list(single.shape)}: not NVFP4. "
            "Quantize the model again."
        )
    return rows, half * 2


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it was before, in its nested parts, too."""
    return {
        key: _without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _usual_dtype(config: Mapping[str, Any]) -> str:
    """What a configuration says weights are; BF16 where it says nothing."""
    names = {name: dtype for dtype, name in FLOATS.items()}
    return next((names[name] for name in _dtype_names(config) if name in names), "BF16")


def _dtype_names(config: Mapping[str, Any]) -> Iterator[str]:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        yield from (str(part[key]) for key in ("dtype", "torch_dtype") if key in part)


def _name_of(dtype: torch.dtype) -> str:
    for name in FLOATS:
        if TORCH_DTYPES[name] == dtype:
            return name
    raise UsageError(f"weights of {dtype} cannot be made; give bfloat16, float16 or float32")
