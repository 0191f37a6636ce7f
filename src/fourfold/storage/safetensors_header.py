# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: read a header without trusting it, build one from a list.

    8 bytes   N, little-endian, length of the header
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ..}
    rest      the tensors' bytes, offsets counted from here, without gaps or overlaps

We read it ourselves, not through the `safetensors` package, because we want the byte ranges:
tensors are read with `pread` into buffers that are used again, and written in any order to
places that the plan has fixed beforehand. The format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fourfold.errors import SourceError
from fourfold.storage.fingerprints import Stamps, opened, read_error
from fourfold.storage.git_lfs import check_no_pointer

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation; a longer header is refused there, too."""

MAX_DIMENSIONS = 64
"""The limit of NumPy and PyTorch."""

_LIMIT = 1 << 63
SHOWN_CHARACTERS = 200

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "BF16": 16, "F16": 16, "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

COMPUTE_DTYPES = ("BF16", "F16", "F32")
"""Dtypes that models compute in, and that can be quantized."""

FLOATS = (*COMPUTE_DTYPES, "F64")
"""Dtypes of weights that are not quantized."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, known without reading its data.

    `start` and `stop` are byte positions in `file`, the header included.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """The size of the first dimension; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of the whole tensor if it has none."""
        return self.nbytes // (self.rows or 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        try:
            return TORCH_DTYPES[self.dtype]
        except KeyError:
            raise SourceError(
                f"{self.key} in {self.file.name}: PyTorch has no dtype for {self.dtype}"
            ) from None


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor of this dtype and shape takes in a file."""
    return (math.prod(shape) * BITS[dtype] + 7) // 8


def read_header(file: Path, stamps: Stamps | None = None) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, in the file's order; `stamps` remember the file.

    Raises `SourceError` where the file is missing, truncated, or its header contradicts itself.
    """
    try:
        with opened(file) as (handle, status):
            raw, tensors = header_in(file, handle, status.st_size)
    except FileNotFoundError:
        raise SourceError(f"{file}: shard is missing. Download the checkpoint again.") from None
    except OSError as error:
        raise read_error(file, error) from error
    if stamps is not None:
        stamps.add(file, status, raw)
    return tensors


def header_in(file: Path, handle: BinaryIO, size: int) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header's JSON and the tensors of a file of `size` bytes, whose beginning `handle` reads.

    Raises `SourceError` where the file is too short, or its header contradicts itself.
    """
    raw = _raw_header(file, handle, size)
    header, base = _parse(file, raw), 8 + len(raw)
    infos = {key: _tensor(file, key, entry, base, size) for key, entry in header.items()}
    _check_cover(file, infos.values(), base, size)
    return raw, infos


def _raw_header(file: Path, handle: BinaryIO, size: int) -> bytes:
    """Read the header's JSON. Raises if the file is too small for the length that it states."""
    first = handle.read(8)
    if len(first) < 8:
        raise _broken(file, f"{size} bytes are too few for a header")
    length: int = struct.unpack("<Q", first)[0]
    if length > MAX_HEADER_BYTES or 8 + length > size:
        check_no_pointer(file, first + handle.read(64))
        raise _broken(file, f"header of {length:,} bytes in a file of {size:,}")
    return handle.read(length)


def shown(name: object) -> str:
    """Return a name from a file as messages show it: on one line, and cut off if it is long."""
    try:
        text = repr(name)
    except (ValueError, RecursionError):  # thousands of digits, lists in lists
        text = f"a {type(name).__name__} that is too long"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _broken(file: Path, what: str) -> SourceError:
    return SourceError(f"{file}: truncated or not safetensors ({what}). Download the file again.")


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = load_json(raw)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"header: {error}") from None
    if not isinstance(header, dict):
        raise _broken(file, "header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise _broken(file, "__metadata__ is not a JSON object of strings")
    return header


PairsHook = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for JSON that refuses a name given twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        count = Counter(name for name, _ in pairs)
        twice = next(name for name, times in count.items() if times > 1)
        raise ValueError(f"{shown(twice)} stands there twice")
    return result


def load_json(raw: bytes, pairs_hook: PairsHook = unique_pairs) -> Any:
    """JSON in UTF-8 whose names are unique and whose text can be written again.

    Raises `ValueError` for anything else, `RecursionError` where it is nested too deeply.
    """
    value = json.loads(raw.decode(), object_pairs_hook=pairs_hook)
    if b"\\u" in raw:
        json.dumps(value, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    return value


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LIMIT


def _is_shape(shape: Sequence[Any]) -> bool:
    """True if a tensor can have this shape: its size and its strides are 64-bit numbers."""
    fits = len(shape) <= MAX_DIMENSIONS and all(map(_is_index, shape))
    return fits and math.prod(int(size) for size in shape if size) < _LIMIT


def _tensor(file: Path, key: str, entry: Any, base: int, size: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            _is_shape(shape) and _is_index(begin) and _is_index(end)
        ):
            pass
        case _:
            raise _broken(file, f"entry of {shown(key)} is malformed: {shown(entry)}")
    if dtype not in BITS:
        raise _broken(file, f"{shown(key)} has unknown dtype {shown(dtype)}")
    if end - begin != nbytes_of(dtype, shape):
        raise _broken(
            file, f"{shown(key)} spans {end - begin:,} bytes, its shape {shape} needs others"
        )
    if base + end > size:
        raise _broken(file, f"{shown(key)} ends at byte {base + end:,} of {size:,}")
    return TensorInfo(key, dtype, tuple(shape), file, base + begin, base + end)


def _check_cover(file: Path, infos: Iterable[TensorInfo], base: int, size: int) -> None:
    position = base
    for info in sorted(infos, key=lambda info: (info.start, info.stop)):
        if info.start != position:
            raise _broken(file, f"{shown(info.key)} overlaps another tensor or leaves a gap")
        position = info.stop
    if position != size:
        raise _broken(file, f"tensors end at byte {position:,}, the file at {size:,}")


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds `tensors` (name → dtype, shape), and where each lies.

    In the file, wider dtypes come first, so that each tensor is aligned to its element, then it
    goes by name; the header lists them in the order of `tensors`. Returns the header, its length
    included, padded to 8 bytes, and the absolute byte position of each tensor.
    """
    offset, begins = 0, {}
    for name in sorted(tensors, key=lambda name: (-BITS[tensors[name][0]], name)):
        begins[name], offset = offset, offset + nbytes_of(*tensors[name])
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, (dtype, shape) in tensors.items():
        offsets = [begins[name], begins[name] + nbytes_of(dtype, shape)]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    base = 8 + len(body)
    return struct.pack("<Q", len(body)) + body, {name: base + at for name, at in begins.items()}
