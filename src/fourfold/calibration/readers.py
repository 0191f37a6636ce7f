"""Files and datasets as records, read one by one: nobody's corpus has to fit in memory.

    .jsonl .json .ndjson    one JSON object a line
    .parquet                one record a row (pyarrow)
    any other file          text; whole paragraphs of about `characters` make a record
    org/name[:config][:split]   a dataset of the hub, streamed (datasets)

A record is a mapping with one of: `input_ids` (and, if it likes, `attention_mask`), `messages`
(and `tools`), `prompt` and `completion`, `text`. Other keys are nobody's business and are left
out; a record with none of these is an error that lists what it has.
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

EMBEDDED = "the embedded mixed text"

JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})
KEYS = ("input_ids", "attention_mask", "messages", "tools", "prompt", "completion", "text")

MAX_LINE_BYTES = 1 << 26
"""A longer line of JSON is no record but a whole file on one line."""

ROWS_AT_ONCE = 64

_FILE_SUFFIXES = JSON_SUFFIXES | {".parquet", ".txt", ".md", ".csv", ".gz", ".zst"}
"""A name that ends like this is a file's, not a dataset's."""

_DATASET = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<one>[^:/\\]+))?(:(?P<two>[^:/\\]+))?")


@dataclass(frozen=True)
class Record:
    """One document before it is tokenized: where it lies, and those of `KEYS` that it has."""

    where: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Corpus:
    """A file, a dataset or the embedded text: a name for messages, and records, read lazily."""

    name: str
    records: Iterator[Record]


def open_corpora(names: Iterable[str], characters: int) -> list[Corpus]:
    """What `--calib` names, in order; without a name, the embedded text.

    Everything that can be known without reading is checked here: `CalibrationError` for a folder,
    a file that is missing or empty, a library that is not installed.
    """
    return [_open(name, characters) for name in names] or [_embedded()]


def _embedded() -> Corpus:
    records = calibration_records()
    return Corpus(EMBEDDED, (_record(f"{EMBEDDED}, {each['name']}", each) for each in records))


def _open(name: str, characters: int) -> Corpus:
    path = Path(name).expanduser()
    if not path.exists():
        return _dataset(name)
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder. Give the files in it, one by one.")
    if not path.is_file():
        raise CalibrationError(f"{path}: is no file. Save the text to a file first.")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{path}: is empty. Give a file that holds text.")
    if path.suffix.lower() in JSON_SUFFIXES:
        return Corpus(path.name, _json_records(path))
    if path.suffix.lower() == ".parquet":
        return Corpus(path.name, _parquet_records(path))
    return Corpus(path.name, _text_records(path, characters))


def _record(where: str, content: Mapping[str, Any]) -> Record:
    """The keys that matter. A null is what Parquet puts where a record lacks the key."""
    known = {key: content[key] for key in KEYS if content.get(key) is not None}
    if known.keys() & {"input_ids", "messages", "text"} or {"prompt", "completion"} <= known.keys():
        return Record(where, known)
    found = [f"{key} (null)" if content[key] is None else str(key) for key in content]
    raise CalibrationError(
        f"{where}: has {', '.join(sorted(found)[:8]) or 'no key'}. "
        "It needs text, prompt and completion, messages, or input_ids."
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
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error


def text_pieces(file: TextIO, characters: int) -> Iterator[str]:
    """The text in pieces that end with a paragraph, once they have `characters`.

    A paragraph without end is cut at the end of a line, a line without end anywhere, so that no
    piece has more than three times `characters`. The pieces, joined, are the text.
    """
    piece, length = [], 0
    while line := file.readline(characters):
        piece.append(line)
        length += len(line)
        if length >= characters and (not line.strip() or length >= 2 * characters):
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def _not_utf8(where: str, error: UnicodeDecodeError) -> CalibrationError:
    byte = error.object[error.start]
    return CalibrationError(
        f"{where}: is not UTF-8 (it holds the byte 0x{byte:02x}). Save it as plain text in UTF-8."
    )


# --- JSON lines ---------------------------------------------------------------------------


def _json_records(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if line.strip():
                    yield _parse_line(f"{path.name}, line {number}", line)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_line(where: str, line: bytes) -> Record:
    if len(line) == MAX_LINE_BYTES:
        raise CalibrationError(
            f"{where}: is longer than {MAX_LINE_BYTES >> 20} MiB. Write one JSON object a line."
        )
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except json.JSONDecodeError as error:
        raise CalibrationError(
            f"{where}: is not JSON ({error.msg} at character {error.pos}). "
            "Write one JSON object a line."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers without end, brackets without end
        raise CalibrationError(f"{where}: cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CalibrationError(
            f"{where}: holds a JSON {kind}, not an object. Write one JSON object a line."
        )
    return _record(where, content)


# --- Parquet and datasets -----------------------------------------------------------------


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(
            f'{path}: Parquet needs pyarrow: pip install "fourfold[data]". Or give JSONL.'
        ) from None
    rows = enumerate(_parquet_rows(path, parquet), start=1)
    return (_record(f"{path.name}, row {number}", row) for number, row in rows)


def _parquet_rows(path: Path, parquet: Any) -> Iterator[dict[str, Any]]:
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in KEYS] or names[:8]
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are these
        raise CalibrationError(f"{path}: cannot be read as Parquet: {_cause(error)}") from error


def _dataset(name: str) -> Corpus:
    found = _DATASET.fullmatch(name)
    if not found or name.startswith(".") or Path(name).suffix.lower() in _FILE_SUFFIXES:
        raise CalibrationError(
            f"{name}: no such file. Give text, JSONL or Parquet; a dataset's name is "
            "org/name, org/name:split or org/name:config:split."
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f'{name}: no such file; for the dataset of that name, pip install "fourfold[data]".'
        ) from None
    config, split = (found["one"], found["two"]) if found["two"] else (None, found["one"])
    load = partial(load_dataset, found["path"], config, split=split or "train", streaming=True)
    rows = enumerate(_dataset_rows(name, load), start=1)
    return Corpus(name, (_record(f"{name}, record {number}", row) for number, row in rows))


def _dataset_rows(name: str, load: Callable[[], Iterable[Any]]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from load()
    except Exception as error:  # the hub client and datasets raise errors of many libraries
        raise CalibrationError(
            f"{name}: no such file, and the hub does not give the dataset: {_cause(error)}"
        ) from error


def _cause(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
