# SPDX-License-Identifier: Apache-2.0
"""Opens files of text, compressed or not, and says what a file is that holds no UTF-8."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from fourfold.errors import CalibrationError
from fourfold.storage.git_lfs import is_pointer

COMPRESSED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})

HEAD_BYTES = 4096

_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def _open_zstd(path: Path) -> BufferedIOBase:
    try:
        import pyarrow
    except ImportError:
        raise CalibrationError(
            f'{path}: zstd needs pyarrow. Run pip install "fourfold[data]", or decompress it '
            "(zstd -d)."
        ) from None
    return BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
"""How files that begin like this are decompressed."""


def kind_of(path: Path) -> str:
    """Return the suffix in lower case that says what a file holds: ".jsonl" of "a.jsonl.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed. Its errors within the context are `CalibrationError`s.

    What a file is compressed with is seen from its beginning, not from its name.
    """
    try:
        with path.open("rb") as raw:
            beginning = raw.read(8)
        opener = next((o for magic, o in _OPENERS.items() if beginning.startswith(magic)), None)
        with path.open("rb") if opener is None else opener(path) as file:
            yield cast("BinaryIO", file)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CalibrationError(
            f"{path}: cannot be decompressed ({error}). Compress it again, or give it as it is."
        ) from None
    except OSError as error:
        cause = error.strerror or str(error)
        raise CalibrationError(f"{path}: cannot be read ({cause}). Make it readable.") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file as `open_bytes` does, as text in UTF-8 with or without a byte order mark."""
    with open_bytes(path) as file, TextIOWrapper(file, "utf-8-sig") as text:
        yield text


def read_head(path: Path) -> bytes:
    """Return the beginning of a file of text, decompressed.

    Raises:
        CalibrationError: It cannot be read, or is not text in UTF-8 as far as can be seen there.
    """
    with open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
    if is_pointer(head):
        raise CalibrationError(
            f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder."
        )
    if encoding := _marked_encoding(head):
        raise CalibrationError(f"{path}: {_as_another(head[0], encoding)}")
    if b"\0" in head:
        nulls = max(head[0::2].count(0), head[1::2].count(0))
        if nulls > len(head) // 4:
            raise CalibrationError(f"{path}: {_as_another(0, 'UTF-16')}")
        raise CalibrationError(
            f"{path}: is not text (it contains zero bytes). Give text, JSONL or Parquet."
        )
    return head


def not_utf8(where: str, error: UnicodeDecodeError) -> CalibrationError:
    """Return an error that names the byte and the likely encoding."""
    near = error.object[max(0, error.start - 100) : error.start + 100]
    is_sparse = sum(byte >= 0x80 for byte in near) < len(near) / 3
    encoding = _marked_encoding(error.object[:4]) or (
        "Latin-1 or Windows-1252" if is_sparse else "GB18030, Shift-JIS or another encoding"
    )
    return CalibrationError(f"{where}: {_as_another(error.object[error.start], encoding)}")


def _marked_encoding(head: bytes) -> str | None:
    """Return the encoding that a byte order mark names, other than UTF-8."""
    marks = (name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark))
    return next(marks, None)


def _as_another(byte: int, encoding: str) -> str:
    return (
        f"is not UTF-8 (it contains the byte 0x{byte:02x}), but probably {encoding}. "
        "Save it as text in UTF-8 (iconv -f … -t UTF-8)."
    )
