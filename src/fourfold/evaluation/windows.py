# SPDX-License-Identifier: Apache-2.0
"""The text that models are measured on, as windows of tokens.

Documents are joined in their order, with the end-of-text token between them, and cut into windows
of equal length. A text file is one document. If the tokenizer begins every text with a token, so
does every window. A remainder that fills no window is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.calibration.data import pack
from fourfold.calibration.encoding import Encoder
from fourfold.calibration.readers import Corpus, open_corpora
from fourfold.config import EvaluationConfig
from fourfold.errors import CalibrationError, UsageError
from fourfold.storage.names import storable

DEFAULT_LENGTH = 2048
DEFAULT_WINDOWS = 32

LONGEST_TOKEN = 16
"""Characters of a text file that are read for each token that is needed: more than any text has on
average."""


@dataclass(frozen=True)
class Windows:
    """N windows of W tokens, and where they come from."""

    ids_NW: Tensor
    """int64."""
    origin: str
    """The name of the file or dataset, without its folder."""

    @property
    def digest(self) -> str:
        """SHA-256 of shape and ids."""
        shape = repr(tuple(self.ids_NW.shape)).encode()
        return hashlib.sha256(shape + self.ids_NW.numpy().astype("<i8").tobytes()).hexdigest()


def read_windows(
    config: EvaluationConfig, encoder: Encoder, max_positions: int | None = None
) -> Windows:
    """Read the text that `config` names.

    Args:
        config: The text, and how many windows of which length.
        encoder: Of the model that the text is for.
        max_positions: The longest sequence that the model takes; None if it has no limit.

    Raises:
        CalibrationError: The text cannot be read, does not fit the model, or is too short.
        UsageError: A window would be longer than the model takes, or no window is asked for.
    """
    length = _length(config, max_positions)
    count = config.windows
    if config.tokens is not None:
        count = config.tokens // length
        if count == 0:
            raise UsageError(
                f"`tokens={config.tokens}`: fill no window of {length}. Give more, or a smaller "
                "`length`."
            )
    needed = length * (count or DEFAULT_WINDOWS)
    [corpus] = open_corpora([str(config.text)], needed * LONGEST_TOKEN)
    documents = list(_documents(corpus, encoder, needed))
    windows = pack(documents, length, encoder.first)[: count or DEFAULT_WINDOWS]
    tokens, name = sum(map(len, documents)), storable(corpus.name)
    if len(windows) < (count or 1):
        remedy = f"`windows={len(windows)}`" if windows else "a smaller `length`"
        raise CalibrationError(
            f"{name}: has {tokens:,} tokens, which fill {len(windows):,} windows of {length:,}; "
            f"{count or 1:,} are needed. Give a longer text, or {remedy}."
        )
    return Windows(torch.tensor(windows), name)


def _length(config: EvaluationConfig, max_positions: int | None) -> int:
    longest = max_positions or DEFAULT_LENGTH
    if config.length is None:
        return min(DEFAULT_LENGTH, longest)
    if max_positions is not None and config.length > max_positions:
        raise UsageError(
            f"`length={config.length}`: the model takes at most {max_positions} tokens "
            f"(max_position_embeddings). Give `length={max_positions}` or less."
        )
    return config.length


def _documents(corpus: Corpus, encoder: Encoder, needed: int) -> Iterator[list[int]]:
    """Yield the ids of documents, until they are as many as are needed."""
    tokens = 0
    for record in corpus.records:
        ids = encoder.encode(record, close=True)
        tokens += len(ids)
        yield ids
        if tokens >= needed:
            return
