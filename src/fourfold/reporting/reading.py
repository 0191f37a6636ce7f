"""Read the summary document that a quantized checkpoint brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourfold.errors import SourceError

SUMMARY = "quant_summary.json"


def read_summary(out: str | Path) -> dict[str, Any]:
    """The summary document in the folder `out`; `SourceError` where there is none."""
    folder = Path(out).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise SourceError(f"{folder}: {what}. Give the folder that `fourfold quantize` wrote.")
    file = folder / SUMMARY
    if not file.is_file():
        raise SourceError(
            f"{folder}: no {SUMMARY}, which `fourfold quantize` writes. For a checkpoint that "
            "something else wrote, `fourfold inspect` and `fourfold verify` say what lies in it."
        )
    return _parsed(file)


def _parsed(file: Path) -> dict[str, Any]:
    from fourfold.storage.json_files import read_json

    try:
        summary = read_json(file)
    except SourceError as error:
        raise SourceError(f"{error}. Quantize again, or fetch the file again.") from error
    if not isinstance(summary.get("linears"), list):
        raise SourceError(f"{file}: lists no linear weights, so fourfold did not write it.")
    return summary
