"""The model that ships with fourfold: a byte-level Qwen3-MoE of a few megabytes.

A Hugging Face folder in upstream's own layout, trained on Python's standard library by
`scripts/train_embedded.py`, and a text that it was not trained on. With them the whole job can
be run, measured and tested without a network. `docs/embedded-model.md` tells the rest.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["heldout_text", "model_dir"]


def model_dir() -> Path:
    """The folder of the checkpoint: config, weights, tokenizer, card and licence."""
    with as_file(files(__name__) / "model") as folder:
        return folder


def heldout_text() -> str:
    """Standard library source that the model was not trained on (PSF licence), about 80 kB."""
    return (files(__name__) / "heldout.txt").read_bytes().decode("utf-8")
