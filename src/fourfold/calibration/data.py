"""Calibration data: what the model reads while its activations are observed.

    names ──▶ records ──▶ documents (token ids) ──▶ samples ──▶ batches
      readers.py    encoding.py     pool, shuffle, pack or pad

**Pool.** Documents are read in turn, one from each file, until there are `POOL` times as many
tokens (padded: documents) as are wanted, and no further: a corpus may be far larger than the
machine. The seed shuffles the pool; what comes first is taken.

**Packed.** Documents are joined, the end-of-text token between them, and cut into samples of
exactly `seq` tokens. If the tokenizer begins every text with a token, each sample begins with it:
models with such a token are not themselves without it.

**Padded.** A document is a sample, cut at `seq`, padded on the right to the longest of its batch.

The order comes from SHA-256 of seed and position, not from a random generator: the same files,
options and seed give the same `digest` under every Python.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

import torch

from fourfold.calibration.encoding import Encoder
from fourfold.calibration.readers import Corpus, open_corpora
from fourfold.config import CalibrationConfig
from fourfold.errors import CalibrationError, UsageError
from fourfold.models.internals import quiet

DEFAULT_SIZE = 128
DEFAULT_SEQ = 512

POOL = 4
"""How many times more is read than is wanted, so that a seed has something to choose from."""

CHARACTERS_PER_TOKEN = 4
"""How long a piece of a text file is, for each token of a sample."""

SHOWN_NAMES = 4

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Batch:
    """Samples that pass the model together: B samples of S tokens, padded on the right."""

    input_ids: torch.Tensor
    """int64 [B, S]."""
    attention_mask: torch.Tensor
    """int64 [B, S]: 1 where there is a token."""


@dataclass(frozen=True)
class CalibrationData:
    """All samples, in batches, and what they are."""

    batches: tuple[Batch, ...]
    digest: str
    """SHA-256 of ids, masks and shapes: equal where the model reads the same."""
    samples: int
    seq: int
    tokens: int
    """Without pads."""
    origin: str
    """Where the text is from, for messages: names without their folders."""
    is_embedded: bool
    beginning: str = ""
    """How the first sample begins, as `preview` shows it."""

    def preview(self, tokenizer: Any, characters: int = 200) -> str:
        """The beginning of the first sample as text, without pads and special tokens.

        Characters that would move a terminal's cursor are replaced. Without a tokenizer (None),
        the ids.
        """
        first = self.batches[0]
        ids: list[int] = first.input_ids[0][first.attention_mask[0].bool()].tolist()
        if tokenizer is None:
            text = " ".join(map(str, ids))
        else:
            ids = list(dropwhile(lambda each: each == tokenizer.pad_token_id, ids))
            with quiet():
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        shown = _CONTROLS.sub("\ufffd", text)
        return shown if len(shown) <= characters else shown[:characters].rstrip() + "…"


def load_calibration(
    folder: Path,
    config: CalibrationConfig,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    trust_remote_code: bool = False,
    no_tokenizer: str | None = None,
) -> CalibrationData:
    """Read what `config` names, or the embedded text, for the model in `folder`.

    `vocab_size` is the number of rows of its embedding, `max_positions` the longest sequence it
    takes; its tokenizer is loaded if a record needs one. Where it is known to have none,
    `no_tokenizer` says so, and what to do.

    Raises `CalibrationError` for data that cannot be read, does not fit the model, or is less than
    `options` ask for; `UsageError` for a sample longer than the model takes.
    """
    seq = _sample_length(config, max_positions)
    encoder = Encoder(folder, vocab_size, trust_remote_code, no_tokenizer)
    corpora = open_corpora(config.files, seq * CHARACTERS_PER_TOKEN)
    documents = shuffled(_pool(corpora, encoder, config, seq), config.seed)
    if config.packing == "packed":
        samples = pack(documents, seq, encoder.first)
    else:
        samples = [document[:seq] for document in documents]
    origin = _origin(corpora)
    chosen = _enough(samples, documents, config, seq, origin)
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
    return replace(data, beginning=data.preview(encoder.loaded))


def _sample_length(config: CalibrationConfig, max_positions: int | None) -> int:
    longest = max_positions or DEFAULT_SEQ
    if config.calib_seq is None:
        return min(DEFAULT_SEQ, longest)
    if max_positions is not None and config.calib_seq > max_positions:
        raise UsageError(
            f"`calib_seq={config.calib_seq}`: the model takes {max_positions} tokens at most "
            f"(max_position_embeddings). Give `calib_seq={max_positions}` or less."
        )
    return config.calib_seq


# --- documents ----------------------------------------------------------------------------


def _pool(
    corpora: list[Corpus], encoder: Encoder, config: CalibrationConfig, seq: int
) -> list[list[int]]:
    """Documents as ids, in turn from each corpus: the embedded text whole, of others enough."""
    packed = config.packing == "packed"
    wanted = POOL * (config.calib_size or DEFAULT_SIZE) * (seq if packed else 1)
    pool: list[list[int]] = []
    found = 0
    for turn in _turns([_documents(corpus, encoder, close=packed) for corpus in corpora]):
        pool += turn
        found += sum(map(len, turn)) if packed else len(turn)
        if found >= wanted and config.files:
            break
    return pool


def _documents(corpus: Corpus, encoder: Encoder, close: bool) -> Iterator[list[int]]:
    """The documents of a corpus that hold something: one at least."""
    empty = True
    for record in corpus.records:
        if ids := encoder.encode(record, close):
            empty = False
            yield ids
    if empty:
        raise CalibrationError(f"{corpus.name}: holds no text. Give a file that holds text.")


def _turns(each: list[Iterator[list[int]]]) -> Iterator[list[list[int]]]:
    """The next of each iterator, until none has one."""
    while turn := [found for one in each if (found := next(one, None)) is not None]:
        yield turn


def shuffled(documents: list[list[int]], seed: int) -> list[list[int]]:
    """The documents in the order of SHA-256 of "seed:position"."""

    def key(position: int) -> bytes:
        return hashlib.sha256(f"{seed}:{position}".encode()).digest()

    return [documents[position] for position in sorted(range(len(documents)), key=key)]


# --- samples and batches ------------------------------------------------------------------


def pack(documents: list[list[int]], seq: int, first: list[int]) -> list[list[int]]:
    """All documents one after the other, cut into samples of `seq` ids that begin with `first`.

    What is left over at the end and fills no sample is left out.
    """
    stream = list(chain.from_iterable(documents))
    assert len(first) < seq, "a sample has room for more than its beginning"
    samples: list[list[int]] = []
    at = 0
    while True:
        begin = [] if stream[at : at + len(first)] == first else first
        sample = begin + stream[at : at + seq - len(begin)]
        if len(sample) < seq:
            return samples
        samples.append(sample)
        at += seq - len(begin)


def _enough(
    samples: list[list[int]],
    documents: list[list[int]],
    config: CalibrationConfig,
    seq: int,
    origin: str,
) -> list[list[int]]:
    """As many samples as are wanted. An error where that was asked for and is not there."""
    size = config.calib_size or DEFAULT_SIZE
    if len(samples) >= size or (samples and config.calib_size is None):
        return samples[:size]
    if config.packing == "padded":
        raise CalibrationError(
            f"{origin}: {len(documents):,} documents; {size:,} padded samples take one each. "
            f"Give more, or `calib_size={len(documents)}`."
        )
    tokens = sum(map(len, documents))
    remedy = f"`calib_size={len(samples)}`" if samples else "a smaller `calib_seq`"
    raise CalibrationError(
        f"{origin}: {tokens:,} tokens make {len(samples):,} samples of {seq:,}; "
        f"{size:,} samples take {size * seq:,}. Give more text, or {remedy}."
    )


def _batches(samples: list[list[int]], batch_size: int, pad: int) -> Iterator[Batch]:
    for start in range(0, len(samples), batch_size):
        rows = samples[start : start + batch_size]
        input_ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, sample in enumerate(rows):
            input_ids[row, : len(sample)] = torch.tensor(sample)
            attention_mask[row, : len(sample)] = 1
        yield Batch(input_ids, attention_mask)


def _digest(batches: tuple[Batch, ...]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest_batch(digest, batch.input_ids, batch.attention_mask)
    return digest.hexdigest()


def digest_batch(digest: hashlib._Hash, input_ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Let a batch's ids and mask, [B, S] each in CPU memory, count for a digest."""
    digest.update(repr(tuple(input_ids.shape)).encode())
    for tensor in (input_ids, mask):
        digest.update(tensor.numpy().astype("<i8").tobytes())


def plain_text(name: str) -> str:
    """A file's name as text that can be stored: bytes that are no UTF-8 are spelled out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _origin(corpora: list[Corpus]) -> str:
    names = [plain_text(corpus.name) for corpus in corpora]
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
