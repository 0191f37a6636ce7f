# SPDX-License-Identifier: Apache-2.0
"""Read a checkpoint's JSON files, with errors that say what to do."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.storage.fingerprints import Stamps, opened, read_error, reading
from fourfold.storage.git_lfs import check_no_pointer
from fourfold.storage.names import CONFIG, MEGATRON
from fourfold.storage.run_state import RUN, STATE
from fourfold.storage.safetensors_header import (
    SHOWN_CHARACTERS,
    load_json,
    shown,
)

MAX_JSON_BYTES = 1 << 28
"""No configuration or index is larger: room for two million tensors."""

DOWNLOAD = "Download it again."


def list_folder(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(folder.iterdir())


def why_no_folder(path: Path) -> str:
    """Return what is wrong with a path that should be a folder's."""
    return "is a file" if path.exists() else "no such folder"


def plain_name(name: str) -> str:
    """Return a name as it is, or quoted if it does not fit into a line."""
    return name if name.isprintable() and len(name) <= SHOWN_CHARACTERS else shown(name)


def read_json(file: Path, stamps: Stamps | None = None) -> dict[str, Any]:
    """Read a JSON object; `stamps` remember the file. Raises `SourceError` if it holds another."""
    try:
        with opened(file) as (handle, status):
            raw = handle.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise SourceError(f"{file}: larger than {MAX_JSON_BYTES:,} bytes. {DOWNLOAD}")
        check_no_pointer(file, raw)
        _check_encoding(file, raw)
        value = load_json(raw, _consistent_pairs)
    except FileNotFoundError:
        raise SourceError(f"{file}: missing. {DOWNLOAD}") from None
    except OSError as error:
        raise read_error(file, error) from error
    except _DoubledNameError as error:
        raise SourceError(f"{file}: {error} stands there with two values. Remove one.") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not valid JSON: {error}. {DOWNLOAD}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise SourceError(f"{file}: holds a JSON {kind}, not an object. {DOWNLOAD}")
    if stamps is not None:
        stamps.add(file, status, raw)
    return value


class _DoubledNameError(ValueError):
    """A JSON object has two different values for one name."""


def _consistent_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for JSON that refuses a name with two different values."""
    result = dict(pairs)
    for name, value in pairs:
        if value != result[name]:
            raise _DoubledNameError(shown(name))
    return result


def _check_encoding(file: Path, raw: bytes) -> None:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"{file}: is in UTF-16. Save it in UTF-8.")
    if raw.startswith(codecs.BOM_UTF8):
        raise SourceError(
            f"{file}: begins with a byte-order mark, which transformers and engines refuse. "
            "Save it in UTF-8 without one."
        )


def read_config(folder: Path, stamps: Stamps | None = None) -> dict[str, Any]:
    """Read the config.json of a checkpoint's folder.

    Raises:
        SourceError: There is none. The message says what the folder holds instead.
    """
    if not os.path.lexists(folder / CONFIG):
        if (folder / STATE / RUN).is_file():
            raise SourceError(
                f"{folder}: no config.json yet, as its run is not finished. Run the command that "
                "began it again; it resumes."
            )
        if any(os.path.lexists(folder / name) for name in MEGATRON):
            raise SourceError(
                f"{folder}: a Megatron checkpoint (torch_dist), not Hugging Face's. Convert it "
                "first: `fourfold convert`; or give `hf_config` where a command has it."
            )
        if (remedy := next(_remedies(folder), None)) is not None:
            raise SourceError(f"{folder}: no config.json. {remedy}")
        seen = [plain_name(path.name) for path in list_folder(folder)[:5]]
        inside = f"it holds {', '.join(seen)}, …" if seen else "it is empty"
        raise SourceError(f"{folder}: no config.json ({inside}). Give a checkpoint's folder.")
    return read_json(folder / CONFIG, stamps)


def _remedies(folder: Path) -> Iterator[str]:
    """Yield what to do with a folder of a kind that people take for a checkpoint's."""
    revisions = [path for path in (folder / "snapshots").glob("*") if (path / CONFIG).exists()]
    if revisions:
        yield f"It is the root of a model in the hub's cache: give {revisions[0]}."
    if any(folder.glob("*.gguf")):
        yield "It holds GGUF files, which are quantized already: give the original checkpoint."
    if (folder / "params.json").exists():
        yield "It is in the model maker's own format: give the one for transformers."
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if inner:
        yield f"A checkpoint lies below it: give {inner[0]}."
