"""Read a checkpoint's JSON files, with errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.storage.fingerprints import Stamps, opened, read_error, reading
from fourfold.storage.git_lfs import check_no_pointer
from fourfold.storage.names import CONFIG, MEGATRON
from fourfold.storage.run_state import RUN, STATE
from fourfold.storage.safetensors_header import SHOWN_CHARACTERS, load_json, shown

MAX_JSON_BYTES = 1 << 28
"""No configuration or index is larger: room for two million tensors."""

DOWNLOAD = "Download it again."


def list_folder(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(folder.iterdir())


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
        value = load_json(raw)
    except FileNotFoundError:
        raise SourceError(f"{file}: missing. {DOWNLOAD}") from None
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not valid JSON: {error}. {DOWNLOAD}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise SourceError(f"{file}: holds a JSON {kind}, not an object. {DOWNLOAD}")
    if stamps is not None:
        stamps.add(file, status, raw)
    return value


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
        seen = [plain_name(path.name) for path in list_folder(folder)[:5]]
        inside = f"it holds {', '.join(seen)}, …" if seen else "it is empty"
        raise SourceError(f"{folder}: no config.json ({inside}). Give a checkpoint's folder.")
    return read_json(folder / CONFIG, stamps)
