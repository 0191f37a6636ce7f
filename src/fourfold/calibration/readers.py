"""Reads files and datasets record by record, so that a corpus need not fit in memory.

    .jsonl .json .ndjson    one JSON object per line
    .parquet                one record per row (needs pyarrow)
    any other file          text; whole paragraphs of about `characters` make a record
    org/name[:config][:split]   a dataset of the hub, streamed (needs datasets)

A record is a mapping with one of: `input_ids` (optionally with `attention_mask`), `messages`
(optionally with `tools`), `prompt` and `completion`, `text`. Other keys are ignored. A record with
none of these is an error that lists the keys it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from fourfold.embedded import calibration_records
from fourfold.errors import CalibrationError
from fourfold.models.internals import one_line

EMBEDDED = "the embedded mixed text"

JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})
KEYS = ("input_ids", "attention_mask", "messages", "tools", "prompt", "completion", "text")

MAX_LINE_BYTES = 1 << 26
"""A longer line of JSON is a whole file on one line, which would not fit in memory."""

BATCH_ROWS = 64
"""Rows of a Parquet file that are decoded together."""

_FILE_SUFFIXES = JSON_SUFFIXES | {".parquet", ".txt", ".md", ".csv", ".gz", ".zst"}
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


def open_corpora(names: Iterable[str], characters: int) -> list[Corpus]:
    """Open files and datasets, or the embedded text if there are no names.

    Args:
        names: Paths of files, or names of datasets.
        characters: The approximate length of a record of a text file.

    Raises:
        CalibrationError: A name is a folder or does not exist, or a library is missing. The same
            error is raised for broken contents when they are read.
    """
    if corpora := [_open(name, characters) for name in names]:
        return corpora
    records = (_record(f"{EMBEDDED}, {entry['name']}", entry) for entry in calibration_records())
    return [Corpus(EMBEDDED, records)]


def _open(name: str, characters: int) -> Corpus:
    path = Path(name).expanduser()
    if not path.exists():
        return _dataset(name)
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder. Give the files in it, one by one.")
    if not path.is_file():  # a pipe could not be read again by other ranks or when a run resumes
        raise CalibrationError(f"{path}: is not a regular file. Save the text to a file first.")
    if path.suffix.lower() in JSON_SUFFIXES:
        return Corpus(path.name, _json_records(path))
    if path.suffix.lower() == ".parquet":
        return Corpus(path.name, _parquet_records(path))
    return Corpus(path.name, _text_records(path, characters))


def _record(where: str, content: Mapping[str, Any]) -> Record:
    # In Parquet, a record without a key has null there.
    known = {key: content[key] for key in KEYS if content.get(key) is not None}
    if known.keys() & {"input_ids", "messages", "text"} or {"prompt", "completion"} <= known.keys():
        return Record(where, known)
    keys = sorted(f"{key} (null)" if value is None else key for key, value in content.items())
    raise CalibrationError(
        f"{where}: has {', '.join(keys[:8]) or 'no key'}. "
        "Give text, prompt and completion, messages, or input_ids."
    )


# --- text ---------------------------------------------------------------------------------


def _text_records(path: Path, characters: int) -> Iterator[Record]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for piece in text_pieces(file, characters):
                yield Record(path.name, {"text": piece})
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from None
    except OSError as error:
        raise _unreadable(path, error) from error


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


def _not_utf8(where: str, error: UnicodeDecodeError) -> CalibrationError:
    byte = error.object[error.start]
    return CalibrationError(
        f"{where}: is not UTF-8 (it contains the byte 0x{byte:02x}). Save it as text in UTF-8."
    )


def _unreadable(path: Path, error: OSError) -> CalibrationError:
    return CalibrationError(f"{path}: cannot be read ({error.strerror}). Make it readable.")


# --- JSON lines ---------------------------------------------------------------------------


def _json_records(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            lines = iter(partial(file.readline, MAX_LINE_BYTES), b"")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_line(f"{path.name}, line {number}", line)
    except OSError as error:
        raise _unreadable(path, error) from error


def _parse_line(where: str, line: bytes) -> Record:
    if len(line) == MAX_LINE_BYTES:
        raise CalibrationError(
            f"{where}: is longer than {MAX_LINE_BYTES >> 20} MiB. Write one JSON object per line."
        )
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{where}: is not JSON ({error.msg} at character {error.pos}). "
            "Write one JSON object per line."
        ) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CalibrationError(
            f"{where}: contains a JSON {kind}, not an object. Write one JSON object per line."
        )
    return _record(where, content)


# --- Parquet and datasets -----------------------------------------------------------------


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(
            f'{path}: Parquet needs pyarrow. Run pip install "fourfold[data]", or give JSONL.'
        ) from None
    rows = enumerate(_parquet_rows(path, parquet), start=1)
    return (_record(f"{path.name}, row {number}", row) for number, row in rows)


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
    return Corpus(name, (_record(f"{name}, record {number}", row) for number, row in rows))


def _dataset_rows(name: str, load: Callable[[], Iterable[Any]]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from load()
    except Exception as error:  # the hub client and datasets raise errors of many libraries
        raise CalibrationError(
            f"{name}: no such file, and the dataset cannot be read from the hub "
            f"({one_line(error)}). Check the name and the network."
        ) from error
