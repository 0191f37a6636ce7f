"""What ships with fourfold: a model of a few megabytes, and text.

A byte-level Qwen3-MoE as a Hugging Face folder in upstream's own layout, trained on Python's
standard library by `scripts/train_embedded.py`, and a text that it was not trained on. With them
the whole job can be run, measured and tested without a network. `docs/embedded-model.md` tells
the rest.

And a mixed text, on which any model can be calibrated: `docs/calibration-data.md`.
"""

from __future__ import annotations

import gzip
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

__all__ = ["calibration_records", "heldout_text", "model_dir"]


def model_dir() -> Path:
    """The folder of the checkpoint: config, weights, tokenizer, card and licence."""
    with as_file(files(__name__) / "model") as folder:
        return folder


def heldout_text() -> str:
    """Standard library source that the model was not trained on (PSF licence), about 80 kB."""
    return (files(__name__) / "heldout.txt").read_bytes().decode("utf-8")


def calibration_records() -> list[dict[str, Any]]:
    """The mixed text, about 260 kB in 144 documents: each a `name` and a `text`.

    A dialogue has its `messages`, too; its `text` is for models without a chat template.
    """
    packed = (files(__name__) / "calibration.jsonl.gz").read_bytes()
    records = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    for record in records:
        if "messages" in record:
            turns = (f"{turn['role'].title()}: {turn['content']}" for turn in record["messages"])
            record["text"] = "\n\n".join(turns)
    return records
