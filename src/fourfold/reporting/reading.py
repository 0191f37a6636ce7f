"""Read the summary document that a quantized checkpoint brings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourfold.storage import quant_summary


def read_summary(out: str | Path) -> dict[str, Any]:
    """The summary document in the folder `out`; `SourceError` where there is none."""
    return dict(json.loads(quant_summary.read_summary(out).to_json()))
