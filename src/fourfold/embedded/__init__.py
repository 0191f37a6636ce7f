# SPDX-License-Identifier: Apache-2.0
"""Data that ships with fourfold: a model of a few megabytes, and two texts.

A byte-level Qwen3-MoE as a Hugging Face folder in upstream's own layout, trained on Python's
standard library by `scripts/train_embedded.py`, and a held-out text: with these two, the whole job
can be run, measured and tested without a network (docs/embedded-model.md). The other text is mixed,
for calibrating any model (docs/calibration-data.md).
"""

from __future__ import annotations

import gzip
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

__all__ = ["calibration_records", "heldout_text", "model_dir"]


def model_dir() -> Path:
    """Return the folder of the checkpoint: config, weights, tokenizer, card and licence."""
    with as_file(files(__name__) / "model") as folder:
        return folder


def heldout_text() -> str:
    """Return about 80 kB of standard library source that the model was not trained on (PSF)."""
    return (files(__name__) / "heldout.txt").read_bytes().decode("utf-8")


def calibration_records() -> list[dict[str, Any]]:
    """Return the mixed text, about 260 kB in 144 documents.

    Returns:
        Records with a `name` and a `text`. A dialogue has `messages` as well; its `text` is for
        models without a chat template.
    """
    packed = (files(__name__) / "calibration.jsonl.gz").read_bytes()
    records = [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    for record in records:
        if "messages" in record:
            turns = (f"{turn['role'].title()}: {turn['content']}" for turn in record["messages"])
            record["text"] = "\n\n".join(turns)
    return records
