# SPDX-License-Identifier: Apache-2.0
"""Load the tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.models.internals import quiet
from fourfold.storage.json_files import read_json


def token_count(folder: Path) -> int | None:
    """Return one more than the largest token id; None without a tokenizer.json that says so.

    The file is read as JSON, and only a regular file is: the tokenizers library waits for a pipe.
    """
    try:
        contents = read_json(folder / "tokenizer.json")
    except SourceError:
        return None
    model, added = contents.get("model"), contents.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = (
        [entry.get("id") for entry in added if isinstance(entry, dict)]
        if isinstance(added, list)
        else []
    )
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    else:
        return None
    return 1 + max((number for number in ids if isinstance(number, int)), default=-1)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a checkpoint's folder; nothing is downloaded.

    Raises:
        SourceError: if there is no tokenizer, or it does not load.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # missing or broken files, custom code, missing libraries
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "" if trust_remote_code else " (`trust_remote_code=True` if it brings its own code)"
        raise SourceError(
            f"{folder}: its tokenizer cannot be loaded: {cause}. Put its files there{hint}."
        ) from error
    # Without files, transformers returns a tokenizer that has special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SourceError(f"{folder}: has no tokenizer. Put the tokenizer's files there.")
    return tokenizer
