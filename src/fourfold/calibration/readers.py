# SPDX-License-Identifier: Apache-2.0
"""Reads files and datasets record by record, so that a corpus need not fit in memory.

    .jsonl .json .ndjson    one JSON object per line, or a JSON array of them
    .parquet                one record per row (needs pyarrow)
    any other file          text; whole paragraphs of about `characters` make a record
    org/name[:config][:split]   a dataset of the hub, streamed (needs datasets)

Files other than Parquet may be compressed (.gz, .bz2, .xz, .zst).

A record is a mapping with one of: `input_ids` (optionally with `attention_mask`), `messages` or
`conversations` (optionally with `tools`), `prompt` and `completion`, `text`. Other keys are
ignored. A record with none of these is an error that lists the keys it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from fourfold.calibration.files import (
    COMPRESSED_SUFFIXES,
    kind_of,
    not_utf8,
    open_bytes,
    open_text,
    read_head,
)
from fourfold.embedded import calibration_records
from fourfold.errors import CalibrationError
from fourfold.models.internals import one_line

EMBEDDED = "the embedded mixed text"

JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson", ".jsonlines"})

FORMS = frozenset({"input_ids", "messages", "conversations", "text"})
"""The keys that make a record; `prompt` and `completion` together make one, too."""

KEYS = (*sorted(FORMS), "attention_mask", "tools", "system", "prompt", "completion")

MAX_LINE_BYTES = 1 << 26
"""A longer line of JSON is a whole file on one line, which would not fit in memory."""

BATCH_ROWS = 64
"""Rows of a Parquet file that are decoded together."""

PIECE = 1 << 16
"""Characters of a JSON array that are read at a time."""

_FILE_SUFFIXES = JSON_SUFFIXES | COMPRESSED_SUFFIXES | {".parquet", ".txt", ".md", ".csv"}
"""A name with one of these suffixes is the name of a file, not of a dataset."""

_DATASET = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<one>[^:/\\]+))?(:(?P<two>[^:/\\]+))?")


@dataclass(frozen=True)
class Record:
    """One document before it is tokenized."""

    where: str
    """The file and line, for messages."""
    content: Mapping[str, Any]
    """Those of `KEYS` that the record has."""


@dataclass(frozen=True)
class Corpus:
    """A file, a dataset or the embedded text."""

    name: str
    """The name for messages."""
    records: Iterator[Record]
    """Read lazily."""
    is_file: bool = True


def open_corpora(names: Iterable[str], characters: int) -> list[Corpus]:
    """Open files and datasets, or the embedded text if there are no names.

    Args:
        names: Paths of files, or names of datasets.
        characters: The approximate length of a record of a text file.

    Raises:
        CalibrationError: A name is a folder or does not exist, a file of text is not in UTF-8, or a
            library is missing. The same error is raised for broken contents when they are read.
    """
    if corpora := [_open(name, characters) for name in names]:
        return corpora
    records = (_record(f"{EMBEDDED}, {entry['name']}", entry) for entry in calibration_records())
    return [Corpus(EMBEDDED, records)]


def check_names(names: Iterable[str]) -> None:
    """Raise `CalibrationError` for what can be seen without the model: names, first records."""
    for name in names:
        corpus = _open(name, 1)
        if corpus.is_file:
            next(corpus.records, None)


def _open(name: str, characters: int) -> Corpus:
    path = Path(name).expanduser()
    if not path.exists():
        return _dataset(name)
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder. Give the files in it, one by one.")
    if not path.is_file():  # a pipe could not be read again by other ranks or when a run resumes
        raise CalibrationError(f"{path}: is not a regular file. Save the text to a file first.")
    if kind_of(path) == ".parquet":
        return Corpus(path.name, _parquet_records(path))
    head = read_head(path)
    if kind_of(path) not in JSON_SUFFIXES:
        return Corpus(path.name, _text_records(path, characters))
    is_array = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return Corpus(path.name, (_array_records if is_array else _line_records)(path))


def _record(where: str, content: Mapping[str, Any]) -> Record:
    # In Parquet, a record without a key has null there.
    known = {key: content[key] for key in KEYS if content.get(key) is not None}
    if known.keys() & FORMS or {"prompt", "completion"} <= known.keys():
        return Record(where, known)
    keys = sorted(f"{key} (null)" if value is None else key for key, value in content.items())
    raise CalibrationError(
        f"{where}: has {', '.join(keys[:8]) or 'no key'}. "
        "Give text, prompt and completion, messages, or input_ids."
    )


# --- text ---------------------------------------------------------------------------------


def _text_records(path: Path, characters: int) -> Iterator[Record]:
    with open_text(path) as file:
        try:
            for piece in text_pieces(file, characters):
                yield Record(path.name, {"text": piece})
        except UnicodeDecodeError as error:
            raise not_utf8(str(path), error) from None


def text_pieces(file: TextIO, characters: int) -> Iterator[str]:
    """Cut a text into pieces that end with a paragraph.

    Pieces have `characters` at least, but for the last, and less than three times as many. A
    paragraph that is too long is cut at the end of a line, and a line that is too long anywhere.
    """
    lines: list[str] = []
    length = 0
    while line := file.readline(characters):
        lines.append(line)
        length += len(line)
        if length >= characters and (not line.strip() or length >= 2 * characters):
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


# --- JSON ---------------------------------------------------------------------------------


def _line_records(path: Path) -> Iterator[Record]:
    with open_bytes(path) as file:
        lines = iter(partial(file.readline, MAX_LINE_BYTES), b"")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(f"{path.name}, line {number}", line)


def _parse_line(where: str, line: bytes) -> Record:
    if len(line) == MAX_LINE_BYTES:
        raise _too_long(where)
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from None
    return _json_record(where, content)


def _array_records(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        array = _JsonArray(file, path.name)
        for content in array:
            yield _json_record(array.where, content)


class _JsonArray:
    """Reads the items of a JSON array one by one, so that the file need not fit in memory."""

    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name
        self._text = ""
        """The text that was read and is not parsed yet."""
        self._line, self._item = 1, 0
        self.where = name
        """The item that is parsed, and the line in which it begins."""

    def __iter__(self) -> Iterator[Any]:
        self._skip("[")
        if self._next() != "]":
            yield self._value()
            while self._next() == ",":
                self._skip(",")
                yield self._value()
        self._skip("]")
        if self._next():
            raise CalibrationError(
                f"{self._name}, line {self._line}: is not the end, although its JSON array ends "
                "before. Give one array, or write one JSON object per line."
            )

    def _value(self) -> Any:
        self._next()
        self._item += 1
        self.where = f"{self._name}, item {self._item}, line {self._line}"
        while True:
            if len(self._text) >= 2 * MAX_LINE_BYTES:
                raise _too_long(self.where)
            try:
                value, end = json.JSONDecoder().raw_decode(self._text)
            except (ValueError, RecursionError) as error:
                if not self._read_on():
                    raise _not_json(self.where, error) from None
                continue
            if end >= MAX_LINE_BYTES:
                raise _too_long(self.where)
            self._drop(end)
            return value

    def _next(self) -> str:
        """Skip space; return the next character, or an empty string at the end."""
        while True:
            self._drop(len(self._text) - len(self._text.lstrip()))
            if self._text or not self._read_on():
                return self._text[:1]

    def _skip(self, character: str) -> None:
        if self._next() != character:
            error = json.JSONDecodeError(f"Expecting '{character}'", self._text, 0)
            raise _not_json(self.where, error)
        self._drop(1)

    def _drop(self, characters: int) -> None:
        self._line += self._text.count("\n", 0, characters)
        self._text = self._text[characters:]

    def _read_on(self) -> bool:
        try:
            piece = self._file.read(max(PIECE, len(self._text)))
        except UnicodeDecodeError as error:
            raise not_utf8(f"{self._name}, after line {self._line}", error) from None
        self._text += piece
        return bool(piece)


def _json_record(where: str, content: Any) -> Record:
    if isinstance(content, str):
        content = {"text": content}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CalibrationError(
            f"{where}: contains a JSON {kind}, not an object. Write one JSON object per line."
        )
    return _record(where, content)


def _not_json(where: str, error: ValueError | RecursionError) -> CalibrationError:
    cause = one_line(error)
    if isinstance(error, json.JSONDecodeError):
        cause = f"{error.msg} at character {error.pos}"
    return CalibrationError(f"{where}: is not JSON ({cause}). Write one JSON object per line.")


def _too_long(where: str) -> CalibrationError:
    return CalibrationError(
        f"{where}: is longer than {MAX_LINE_BYTES >> 20} MiB. Write one JSON object per line."
    )


# --- Parquet and datasets -----------------------------------------------------------------


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(
            f'{path}: Parquet needs pyarrow. Run pip install "fourfold[data]", or give JSONL.'
        ) from None
    rows = enumerate(_parquet_rows(path, parquet), start=1)
    return (_row(f"{path.name}, row {number}", row) for number, row in rows)


def _parquet_rows(path: Path, parquet: Any) -> Iterator[dict[str, Any]]:
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in KEYS] or names[:8]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # the base classes of pyarrow's errors
        raise CalibrationError(
            f"{path}: cannot be read as Parquet ({one_line(error)}). Give a Parquet file, or "
            "another suffix."
        ) from error


def _without_nulls(value: Any) -> Any:
    """Drop keys that are null: a column gives each of its objects the keys of all others."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(entry) for k, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _row(where: str, row: Mapping[str, Any]) -> Record:
    return _record(where, {key: _without_nulls(value) for key, value in row.items()})


def _dataset(name: str) -> Corpus:
    match = _DATASET.fullmatch(name)
    if not match or name.startswith(".") or Path(name).suffix.lower() in _FILE_SUFFIXES:
        raise CalibrationError(
            f"{name}: no such file. Give a text, JSONL or Parquet file, or the name of a dataset: "
            "org/name, org/name:split or org/name:config:split."
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{name}: no such file, and datasets of the hub need the package datasets. "
            'Run pip install "fourfold[data]".'
        ) from None
    config, split = (match["one"], match["two"]) if match["two"] else (None, match["one"])
    load = partial(load_dataset, match["path"], config, split=split or "train", streaming=True)
    rows = enumerate(_dataset_rows(name, load), start=1)
    records = (_row(f"{name}, record {number}", row) for number, row in rows)
    return Corpus(name, records, is_file=False)


def _dataset_rows(name: str, load: Callable[[], Iterable[Any]]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from load()
    except Exception as error:  # the hub client and datasets raise errors of many libraries
        raise CalibrationError(
            f"{name}: no such file, and the dataset cannot be read from the hub "
            f"({one_line(error)}). Check the name and the network."
        ) from error
