"""The tokenizer in a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.models.internals import quiet


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies in `folder`. Raises `SourceError` where there is none that works."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # files that are missing or broken, custom code, absent libraries
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        own = "" if trust_remote_code else " (--trust-remote-code if it brings its own code)"
        raise SourceError(
            f"{folder}: its tokenizer cannot be loaded: {cause}. Put its files there{own}."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes without files
        raise SourceError(f"{folder}: has no tokenizer. Put the tokenizer's files there.")
    return tokenizer
