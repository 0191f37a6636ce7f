# SPDX-License-Identifier: Apache-2.0
"""Calibration data: the text that the model reads while its activations are observed.

    names ──▶ records ──▶ documents (token ids) ──▶ samples ──▶ batches
      readers.py    encoding.py     pool, shuffle, pack or pad

**Pool.** One document is read from each file in turn, until the pool holds `POOL` times as many
tokens (padded: documents) as the samples need. Nothing more is read, since a corpus may be far
larger than the machine. The seed shuffles the pool, and the samples are made from its beginning.

**Packed.** Documents are joined, with the end-of-text token between them, and cut into samples of
exactly `seq` tokens. If the tokenizer begins every text with a token, every sample begins with it,
because models that have such a token behave differently without it.

**Padded.** Each document is one sample. It is cut at `seq` tokens and padded on the right to the
longest sample of its batch.

The order comes from SHA-256 of seed and position, not from a random generator, so that the same
files, options and seed give the same `digest` under every version of Python.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, dropwhile, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fourfold.calibration.encoding import Encoder
from fourfold.calibration.readers import Corpus, open_corpora
from fourfold.config import CalibrationConfig
from fourfold.errors import CalibrationError, UsageError
from fourfold.models.internals import quiet
from fourfold.storage.names import storable

DEFAULT_SIZE = 128
DEFAULT_SEQ = 512

POOL = 4
"""How many times more is read than is needed, so that the seed has something to choose from."""

CHARACTERS_PER_TOKEN = 4
"""A text file is cut into pieces of about this many characters for each token of a sample."""

SHOWN_NAMES = 4
"""How many files `CalibrationData.origin` names before it only counts them."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Batch:
    """B samples that pass the model together, each padded on the right to S tokens."""

    input_ids: torch.Tensor
    """int64 [B, S]."""
    attention_mask: torch.Tensor
    """int64 [B, S]: 1 for a token, 0 for padding."""


@dataclass(frozen=True)
class CalibrationData:
    """All samples in batches, and a description of them."""

    batches: tuple[Batch, ...]
    digest: str
    """SHA-256 of ids, masks and shapes. It is equal if the model reads the same."""
    samples: int
    seq: int
    """Tokens of a sample; padded samples may have fewer."""
    tokens: int
    """Tokens of all samples, without padding."""
    origin: str
    """The names of the files or datasets, without their folders, for messages."""
    is_embedded: bool
    """True if this is the text that comes with fourfold."""
    beginning: str = ""
    """The beginning of the first sample, as `preview` returns it."""

    @property
    def first(self) -> list[int]:
        """The ids of the first sample, without padding."""
        batch = self.batches[0]
        ids: list[int] = batch.input_ids[0][batch.attention_mask[0].bool()].tolist()
        return ids

    def preview(self, tokenizer: Any, characters: int = 200) -> str:
        """Return the beginning of the first sample, without padding and special tokens.

        Without a tokenizer, the ids themselves are the text. Control characters, which could move
        a terminal's cursor, are replaced.
        """
        ids = self.first
        if tokenizer is None:
            text = " ".join(map(str, ids))
        else:
            ids = list(dropwhile(lambda token: token == tokenizer.pad_token_id, ids))
            with quiet():
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        printable = _CONTROLS.sub("\ufffd", text)
        is_short = len(printable) <= characters
        return printable if is_short else printable[:characters].rstrip() + "…"


def load_calibration(
    folder: Path,
    config: CalibrationConfig,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    trust_remote_code: bool = False,
    tokenizer_hint: str | None = None,
    pads: frozenset[int] = frozenset(),
) -> CalibrationData:
    """Read the files and datasets that `config` names, or the embedded text if it names none.

    Args:
        folder: The model's folder. Its tokenizer is loaded if a record needs it.
        config: The names, sizes, packing and seed.
        vocab_size: The number of rows of the model's embedding.
        max_positions: The longest sequence that the model takes; None if it has no limit.
        trust_remote_code: True if the tokenizer's own code may run.
        tokenizer_hint: See `Source.tokenizer_hint`.
        pads: Ids that may serve as pads, besides the tokenizer's; see `padding`.

    Raises:
        CalibrationError: If the data cannot be read, does not fit the model, or is less than
            `config` asks for.
        UsageError: If a sample would be longer than the model takes.
    """
    seq = _sample_length(config, max_positions)
    encoder = Encoder(folder, vocab_size, trust_remote_code, tokenizer_hint, pads)
    corpora = open_corpora(config.files, seq * CHARACTERS_PER_TOKEN)
    documents = shuffled(_pool(corpora, encoder, config, seq), config.seed)
    if config.packing == "packed":
        samples = pack(documents, seq, encoder.first)
    else:
        samples = [document[:seq] for document in documents]
    origin = _origin(corpora)
    chosen = _choose(samples, documents, config, seq, origin)
    batches = tuple(_batches(chosen, config.batch_size, encoder.pad))
    data = CalibrationData(
        batches=batches,
        digest=_digest(batches),
        samples=len(chosen),
        seq=seq,
        tokens=sum(map(len, chosen)),
        origin=origin,
        is_embedded=not config.files,
    )
    return replace(data, beginning=data.preview(encoder.optional))


def _sample_length(config: CalibrationConfig, max_positions: int | None) -> int:
    longest = max_positions or DEFAULT_SEQ
    if config.calib_seq is None:
        return min(DEFAULT_SEQ, longest)
    if max_positions is not None and config.calib_seq > max_positions:
        raise UsageError(
            f"`calib_seq={config.calib_seq}`: the model takes at most {max_positions} tokens "
            f"(max_position_embeddings). Give `calib_seq={max_positions}` or less."
        )
    return config.calib_seq


# --- documents ----------------------------------------------------------------------------


def _pool(
    corpora: list[Corpus], encoder: Encoder, config: CalibrationConfig, seq: int
) -> list[list[int]]:
    """Read enough documents, one from each corpus in turn. The embedded text is read whole."""
    is_packed = config.packing == "packed"
    needed = POOL * (config.calib_size or DEFAULT_SIZE) * (seq if is_packed else 1)
    pool: list[list[int]] = []
    size = 0
    for turn in zip_longest(*(_documents(corpus, encoder, close=is_packed) for corpus in corpora)):
        documents = [document for document in turn if document is not None]
        pool += documents
        size += sum(map(len, documents)) if is_packed else len(documents)
        if size >= needed and config.files:
            break
    return pool


def _documents(corpus: Corpus, encoder: Encoder, close: bool) -> Iterator[list[int]]:
    """Yield the documents of a corpus that are not empty. A corpus without any is an error."""
    is_empty = True
    for record in corpus.records:
        if ids := encoder.encode(record, close):
            is_empty = False
            yield ids
    if is_empty:
        raise CalibrationError(f"{corpus.name}: contains no text. Give a file that contains text.")


def shuffled(documents: list[list[int]], seed: int) -> list[list[int]]:
    """Return the documents in the order of SHA-256 of "seed:position"."""

    def key(position: int) -> bytes:
        return hashlib.sha256(f"{seed}:{position}".encode()).digest()

    return [documents[position] for position in sorted(range(len(documents)), key=key)]


# --- samples and batches ------------------------------------------------------------------


def pack(documents: list[list[int]], seq: int, first: list[int]) -> list[list[int]]:
    """Join the documents, and cut them into samples of `seq` ids that begin with `first`.

    Ids at the end that do not fill a sample are dropped.
    """
    stream = list(chain.from_iterable(documents))
    samples: list[list[int]] = []
    start = 0
    while True:
        prefix = [] if stream[start : start + len(first)] == first else first
        sample = prefix + stream[start : start + seq - len(prefix)]
        if len(sample) < seq:
            return samples
        samples.append(sample)
        start += seq - len(prefix)


def _choose(
    samples: list[list[int]],
    documents: list[list[int]],
    config: CalibrationConfig,
    seq: int,
    origin: str,
) -> list[list[int]]:
    """Return the first samples, as many as are needed or `calib_size` lets there be."""
    size = config.calib_size or DEFAULT_SIZE
    if len(samples) >= size or (samples and config.calib_size is None):
        return samples[:size]
    if config.packing == "padded":
        raise CalibrationError(
            f"{origin}: has {len(documents):,} documents, and {size:,} padded samples need one "
            f"each. Give more documents, or `calib_size={len(documents)}`."
        )
    tokens = sum(map(len, documents))
    remedy = f"`calib_size={len(samples)}`" if samples else "a smaller `calib_seq`"
    raise CalibrationError(
        f"{origin}: has {tokens:,} tokens, which make {len(samples):,} samples of {seq:,}; "
        f"{size:,} samples need {size * seq:,}. Give more text, or {remedy}."
    )


def _batches(samples: list[list[int]], batch_size: int, pad: int) -> Iterator[Batch]:
    for start in range(0, len(samples), batch_size):
        rows = [torch.tensor(sample) for sample in samples[start : start + batch_size]]
        masks = [torch.ones_like(row) for row in rows]
        yield Batch(pad_sequence(rows, True, pad), pad_sequence(masks, True))


def _digest(batches: tuple[Batch, ...]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest_batch(digest, batch.input_ids, batch.attention_mask)
    return digest.hexdigest()


def digest_batch(digest: hashlib._Hash, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Add a batch, ids and mask `[B, S]` in CPU memory, to a digest."""
    digest.update(repr(tuple(input_ids.shape)).encode())
    for tensor in (input_ids, mask):
        digest.update(tensor.numpy().astype("<i8").tobytes())


def _origin(corpora: list[Corpus]) -> str:
    names = [storable(corpus.name) for corpus in corpora]
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
