# SPDX-License-Identifier: Apache-2.0
"""A quantized checkpoint, presented as the BF16, FP16 or FP32 checkpoint that it was made from.

    stored     experts.0.gate_proj.{weight, weight_scale, weight_scale_2}, experts.0.up_proj. …
    presented  experts.gate_up_proj   BF16 [experts, in, 2·out]     (if the source was like that)

The configuration says nothing of quantization, weights are decoded a range of rows at a time while
they are read, and every other tensor is as it lies in the checkpoint. So a model can be built, run,
streamed, compared and quantized from it as from any other source.

Codecs (`fourfold.sources.codecs`) say which stored tensors make a weight. If fourfold itself has
quantized the checkpoint, its `quant_summary.json` says where each weight lay in the source, and
the source's fused tensors are put together again; otherwise each weight is a tensor of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from fourfold.errors import DamagedError, NonFiniteError, SourceError, UsageError
from fourfold.formats.kv_cache import KVFormat
from fourfold.layouts.recognition import without_quantization
from fourfold.sources.claims import (
    Claims,
    check_converted_whole,
    check_none_left,
    claim,
    kv_cache_format,
    quantization_entries,
)
from fourfold.sources.codecs.base import (
    REMEDY,
    EncodedWeight,
    InputRounding,
    MXFP4Codec,
    TensorCodec,
    in_dtype,
    slabs_for,
)
from fourfold.sources.pieces import Piece, pieces_of
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import CARD, CONFIG, REPORT, STATISTICS, SUMMARY
from fourfold.storage.non_finite import find_non_finite
from fourfold.storage.quant_summary import QuantSummary, find_summary
from fourfold.storage.safetensors_header import COMPUTE_DTYPES, DTYPE_NAMES, TensorInfo
from fourfold.storage.side_files import SideFiles
from fourfold.storage.source import (
    Bytes,
    FP8Weight,
    MXFP4Weight,
    Source,
    SourceView,
    read_rounded,
    renamed,
)
from fourfold.storage.units import size


def open_decoded(
    folder: str | Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> DecodedSource:
    """Open a quantized checkpoint as the source that it was made from.

    Args:
        folder: The checkpoint's folder, or a hub name.
        dtype: The dtype of decoded weights: bfloat16, float16, or float32, which does not round
            them. By default each has the dtype that it had in its source.
        trust_remote_code: True if code that the checkpoint brings may run.

    Raises:
        SourceError: The folder cannot be read, no codec claims any of its tensors, or it holds
            quantized tensors that no codec can read.
        UsageError: Weights cannot have this dtype.
    """
    name = None if dtype is None else DTYPE_NAMES.get(dtype)
    if dtype is not None and name not in COMPUTE_DTYPES:
        raise UsageError(f"weights of {dtype} cannot be made; give bfloat16, float16 or float32")
    stored = open_source(folder)
    stored.trust_remote_code = trust_remote_code
    claims = claim(stored)
    if not claims.weights:
        raise SourceError(
            f"{stored.folder}: holds no quantized weights that can be decoded here. Give a folder "
            "that fourfold wrote; transformers' from_pretrained loads others."
        )
    check_none_left(claims)
    return DecodedSource(stored, claims, summary=find_summary(stored.folder), dtype=name)


def decoded_to_quantize(stored: Source) -> Source:
    """Return a checkpoint as a source of weights: decoded, if codecs claim any of its tensors.

    Raises:
        SourceError: Some of its tensors are quantized in a form that no codec can read, or it
            seems to be converted in part.
    """
    claims = claim(stored)
    if not claims.weights:
        return stored
    check_none_left(claims)
    check_converted_whole(stored, claims)
    return DecodedSource(stored, claims)


def as_source_was(source: Source) -> Source:
    """Present a decoded checkpoint that fourfold wrote with the fused tensors of its source."""
    summary = find_summary(source.folder) if isinstance(source, DecodedSource) else None
    if not isinstance(source, DecodedSource) or summary is None:
        return source
    whole = DecodedSource(source.source, claim(source.source), summary=summary)
    whole.trust_remote_code = source.trust_remote_code
    return whole


class DecodedSource(SourceView):
    """A quantized checkpoint, decoded while it is read. Safe for many threads.

    Attributes:
        weights: Every quantized weight under the name that it is presented under.
        hidden: The stored tensors that are not presented.
    """

    def __init__(
        self,
        stored: Source,
        claims: Claims,
        *,
        summary: QuantSummary | None = None,
        dtype: str | None = None,
    ) -> None:
        """Present `stored`; see `open_decoded`.

        Args:
            stored: The checkpoint as it lies on disk. It is closed with this source.
            claims: What codecs claim of it.
            summary: The record of the run that wrote the checkpoint, if there is one.
            dtype: Of the decoded weights, as in safetensors headers; None for their own.
        """
        super().__init__(stored)
        self.config = without_quantization(stored.config)
        self._is_ours, self.hidden = summary is not None, claims.hidden
        self.weights, self._codecs = dict(claims.weights), dict(claims.codecs)
        dtypes = {} if summary is None else {f"{x.name}.weight": x.dtype for x in summary.linears}
        for key, weight in self.weights.items():
            info = in_dtype(weight.info, dtype or dtypes.get(key) or weight.info.dtype)
            self.weights[key] = replace(weight, info=info)
        parts = {name for weight in claims.weights.values() for name in weight.stored}
        self._left_out = len(set(claims.hidden) - parts)
        self._pieces = {} if summary is None else pieces_of(summary)
        self.tensors = self._present(claims.hidden, self._fused_infos(summary, dtype))
        self._check_pieces()

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """The shape [out, in] of every quantized linear layer, by its name."""
        return {key.removesuffix(".weight"): x.info.shape for key, x in self.weights.items()}

    @cached_property
    def input_roundings(self) -> Mapping[str, InputRounding]:
        """How engines round the inputs of quantized linear layers, by name; those are missing whose
        inputs keep 16 bits."""
        roundings = {
            key.removesuffix(".weight"): codec.input_rounding(self.weights[key], self.source.slab)
            for key, codec in self._codecs.items()
        }
        return {name: rounding for name, rounding in roundings.items() if rounding is not None}

    @property
    def input_scales(self) -> Mapping[str, float]:
        """The static scales of NVFP4 activations by linear layer; empty for W4A16."""
        return {
            name: rounding.scale
            for name, rounding in self.input_roundings.items()
            if rounding.format == "nvfp4" and rounding.scale is not None
        }

    @cached_property
    def kv_cache(self) -> KVFormat | None:
        """The format of the KV cache that the checkpoint asks engines for."""
        return kv_cache_format(quantization_entries(self.source))

    @cached_property
    def kv_scales(self) -> Mapping[str, float]:
        """The scales of keys and values, by the tensors' names."""
        return {
            name: float(self.source.slab(name, 0, info.rows).float().reshape(()))
            for name, info in self.source.tensors.items()
            if name.endswith((".k_scale", ".v_scale")) and info.numel == 1
        }

    @property
    def notes(self) -> tuple[str, ...]:
        counts = Counter(codec.title for codec in self._codecs.values())
        forms = " and ".join(f"{count:,} weights from {x}" for x, count in counts.items())
        dtypes = ", ".join(sorted({weight.info.dtype for weight in self.weights.values()}))
        remarks = dict.fromkeys(codec.remark for codec in self._codecs.values() if codec.remark)
        stored = sum(
            self.source.tensors[key].nbytes for x in self.weights.values() for key in x.stored
        )
        note = (
            f"decoded to {dtypes} while they are read: {forms} ({size(stored)} on disk); sizes and "
            "errors are those of the decoded values"
        )
        if self._left_out:
            note += f"; {self._left_out:,} static scales of activations and KV caches are left out"
        return (note, *remarks, *self.source.notes)

    @property
    def decoded(self) -> Mapping[str, str]:
        titles = {key: codec.title for key, codec in self._codecs.items()}
        fused = {key: titles.get(pieces[0].key) for key, pieces in self._pieces.items()}
        return titles | {key: title for key, title in fused.items() if title is not None}

    def mxfp4(self, key: str) -> MXFP4Weight | None:
        codec = self._codecs.get(key)
        if not isinstance(codec, MXFP4Codec):
            return None
        weight, read = self.weights[key], self.source.slab
        return MXFP4Weight(
            lambda expert, rows: codec.codes(weight, expert, rows, read),
            lambda expert, rows: codec.exponents(weight, expert, rows, read),
        )

    def fp8(self, key: str) -> FP8Weight | None:
        codec = self._codecs.get(key)
        return None if codec is None else codec.fp8(self.weights[key], self.source.slab)

    def rename(self, names: Mapping[str, str]) -> None:
        plain = {key: name for key, name in names.items() if not self._is_decoded(key)}
        self.source.rename(plain)
        self.tensors = renamed(self.tensors, names)
        self.weights = {names.get(key, key): weight for key, weight in self.weights.items()}
        self._codecs = {names.get(key, key): codec for key, codec in self._codecs.items()}

    def codec_of(self, key: str) -> TensorCodec | None:
        """Return the codec of a weight; None for a tensor that is not decoded."""
        return self._codecs.get(key)

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        if not self._is_decoded(key):
            return self.source.slab(key, start, stop, out)
        info = self.tensors[key]
        buffer = np.empty((stop - start) * info.row_bytes, dtype=np.uint8) if out is None else out
        rows = torch.from_numpy(buffer).view(info.torch_dtype)
        rows = rows.view((stop - start, *info.shape[1:]))
        if key in self._pieces:
            for piece in self._pieces[key]:
                self._place(piece, start, rows)
        else:
            self._decode(key, start, stop, rows)
        return rows

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        if self._is_decoded(key):
            read_rounded(partial(self.slab, key), self.tensors[key].row_bytes, start, out)
        else:
            self.source.read_bytes(key, start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        slabs = [(key, start, stop)]
        if key in self._pieces:
            pieces = [piece for piece in self._pieces[key] if piece.rows_within(start, stop)]
            slabs = [(piece.key, 0, piece.region.shape[0]) for piece in pieces]
        for slab in slabs:
            weight, rows = self.weights.get(slab[0]), slab[1:]
            parts = [slab] if weight is None else slabs_for(weight, *rows, self.source.tensors)
            for part in parts:
                self.source.will_need(*part)

    def stored_keys(self, keys: Iterable[str]) -> Iterable[str]:
        for key in keys:
            for part in [piece.key for piece in self._pieces.get(key, ())] or [key]:
                weight = self.weights.get(part)
                yield from self.source.stored_keys([part] if weight is None else weight.stored)

    def side_files(self) -> SideFiles:
        """As the source's: without the files that a quantization run writes beside the weights."""
        own = {SUMMARY, REPORT, STATISTICS, *([CARD] if self._is_ours else [])}
        return self.source.side_files().without(own)

    def _is_decoded(self, key: str) -> bool:
        return key in self._pieces or key in self.weights

    def _present(
        self, hidden: Collection[str], fused: Mapping[str, TensorInfo]
    ) -> dict[str, TensorInfo]:
        """Every tensor, in the order in which their first parts lie in the checkpoint."""
        places = {next(iter(weight.parts.values())): key for key, weight in self.weights.items()}
        fused_of = {x.key: fused[key] for key, pieces in self._pieces.items() for x in pieces}
        tensors: dict[str, TensorInfo] = {}
        for name, stored in self.source.tensors.items():
            key = places.get(name, name)
            if key in fused_of:
                info = replace(fused_of[key], file=stored.file, start=stored.start)
                tensors.setdefault(info.key, in_dtype(info, info.dtype))
            elif name in places:
                tensors[key] = self.weights[key].info
            elif name not in hidden:
                tensors[name] = stored
        return tensors

    def _fused_infos(
        self, summary: QuantSummary | None, dtype: str | None
    ) -> dict[str, TensorInfo]:
        """The source's fused tensors, without a place; weights in `dtype`, if it is given."""
        entries = {} if summary is None else {entry.key: entry for entry in summary.raw_tensors}
        infos: dict[str, TensorInfo] = {}
        for key, pieces in self._pieces.items():
            if key not in entries:
                raise _misfit(self.folder, key, "has no dtype and shape in raw_tensors")
            is_weight = pieces[0].key in self.weights
            info = TensorInfo(key, entries[key].dtype, entries[key].shape, Path(), 0, 0)
            infos[key] = in_dtype(info, dtype if dtype and is_weight else info.dtype)
        return infos

    def _check_pieces(self) -> None:
        """Raise `SourceError` if the record of the run is not that of these tensors."""
        infos = {**self.source.tensors, **{key: x.info for key, x in self.weights.items()}}
        for key, pieces in self._pieces.items():
            if key not in self.tensors:
                raise _misfit(self.folder, pieces[0].key, "is not in the checkpoint")
            shape = self.tensors[key].shape
            for piece in pieces:
                info = infos.get(piece.key)
                if info is None:
                    raise _misfit(self.folder, piece.key, "is not in the checkpoint")
                if info.shape != piece.region.shape or not piece.fits(shape):
                    text = f"{list(info.shape)} does not fit {key} {list(shape)}"
                    raise _misfit(self.folder, piece.key, text)
            total = sum(math.prod(piece.region.shape) for piece in pieces)
            if total != math.prod(shape):
                text = f"its parts have {total:,} of {math.prod(shape):,} elements"
                raise _misfit(self.folder, key, text)

    def _decode(self, key: str, start: int, stop: int, out: torch.Tensor) -> None:
        weight = self.weights[key]
        self._codecs[key].decode(weight, start, stop, self.source.slab, out)
        _check_finite(weight, start, out)
        if len(out) and not (out[0].any() or out.any()):
            self._check_scales(key, start, stop)

    def _check_scales(self, key: str, start: int, stop: int) -> None:
        """Check that rows which decode to zeros do so by their codes.

        A row of scales that are too small for their dtype is legal. So the scales of a whole
        matrix must be 0, or of whole experts.

        Raises:
            DamagedError: Scales are 0, and codes are not.
        """
        weight, zeros = self.weights[key], list[str]()
        codes, *others = weight.parts.values()

        def read(name: str, first: int, last: int) -> torch.Tensor:
            rows = self.source.slab(name, first, last)
            if name not in others or not rows.is_floating_point() or rows.float().any():
                return rows
            if len(weight.info.shape) == 2 and self.source.read(name).float().any():
                return rows
            zeros.append(name)
            return torch.ones(rows.shape).to(rows.dtype)

        out = torch.empty((stop - start, *weight.info.shape[1:]))
        self._codecs[key].decode(weight, start, stop, read, out)
        if zeros and out.any():
            raise DamagedError(
                f"{zeros[0]}: nothing but zeros, while the codes in {codes} are not. {REMEDY}"
            )

    def _place(self, piece: Piece, start: int, slab: torch.Tensor) -> None:
        """Write into `slab`, rows of a fused tensor from `start` on, what it has of a piece."""
        rows = piece.rows_within(start, start + len(slab))
        if not rows:
            return
        target = piece.region.view(slab[rows[0] - start : rows[-1] - start + 1])
        first, last = piece.rows_to_decode(rows)
        if piece.key not in self.weights:
            part = self.source.slab(piece.key, first, last)
        elif target.is_contiguous() and target.shape == (last - first, *piece.region.shape[1:]):
            self._decode(piece.key, first, last, target)
            return
        else:
            part = torch.empty((last - first, *piece.region.shape[1:]), dtype=slab.dtype)
            self._decode(piece.key, first, last, part)
        if part.shape != target.shape:  # some columns of a transposed weight
            part = part.narrow(1, piece.first_dimension.index(rows[0]), len(rows))
        target.copy_(part)


def _check_finite(weight: EncodedWeight, start: int, rows: torch.Tensor) -> None:
    """Check that decoded rows, from `start` on, hold neither NaN nor Inf.

    Raises:
        NonFiniteError: They do.
    """
    info, dtype = weight.info, DTYPE_NAMES[rows.dtype]
    data, row = rows.view(torch.uint8).reshape(-1).numpy(), rows[:1].nbytes
    bad = find_non_finite(info.key, data, dtype, row, start * row)
    if bad is None:
        return
    remedy = REMEDY
    if dtype == "F16":
        remedy = (
            f'If they are too large for it, set dtype in {CONFIG} to "bfloat16"; else: {REMEDY}'
        )
    raise NonFiniteError(
        f"{info.key} in {info.file.name}: {bad}, decoded to {dtype} from "
        f"{', '.join(weight.parts.values())}. {remedy}"
    )


def _misfit(folder: Path, name: str, what: str) -> SourceError:
    return SourceError(
        f"{folder / SUMMARY}: {name}: {what}. The file belongs to another checkpoint, or was "
        "changed; quantize the model again."
    )
