# SPDX-License-Identifier: Apache-2.0
"""Values of the tensors that are not quantized: NaN and Inf in them, and heads that are tied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fourfold.models.roles import EMBEDDING_NAME
from fourfold.models.ties import Tie, tie_of
from fourfold.models.tokenizer import token_count
from fourfold.storage.non_finite import NonFinite, find_non_finite, merge
from fourfold.storage.safetensors_header import FLOATS, TensorInfo
from fourfold.verification.checkpoint import Checkpoint
from fourfold.verification.readers.base import KV_SCALES
from fourfold.verification.rules import Finding, finding
from fourfold.verification.streaming import CHUNK_BYTES, Workers


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a tensor, from `start` on."""

    info: TensorInfo
    start: int
    nbytes: int


def pieces_to_read(checkpoint: Checkpoint) -> list[_Piece]:
    """Return the pieces of every tensor of floats that is no part of a quantized linear."""
    scales = {*checkpoint.reader.scales, *KV_SCALES}
    return [
        _Piece(info, start, min(CHUNK_BYTES, info.nbytes - start))
        for name, info in checkpoint.tensors.items()
        if info.dtype in FLOATS and name.rpartition(".")[2] not in scales
        for start in range(0, info.nbytes, CHUNK_BYTES)
    ]


def read_kept(
    checkpoint: Checkpoint, pieces: list[_Piece], workers: Workers
) -> Iterator[NonFinite]:
    """Read pieces of tensors and yield the NaN and Inf in them."""

    def read(piece: _Piece) -> NonFinite | None:
        info = piece.info
        data = workers.buffers.read("kept", checkpoint, info.key, piece.start, piece.nbytes)
        return find_non_finite(info.key, data, info.dtype, info.row_bytes, piece.start)

    for _, non_finite in workers.run(read, pieces):
        if non_finite is not None:
            yield non_finite


def check_tied(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A head that is stored although the configuration ties it is the embedding, bit for bit."""
    if tie_of(checkpoint.config) is not Tie.YES:
        return
    stems = {*checkpoint.linears, *checkpoint.fp8, *checkpoint.kept}
    embeddings = [
        info
        for name, info in checkpoint.tensors.items()
        if EMBEDDING_NAME.search(name.removesuffix(".weight"))
    ]
    for stem in sorted(stem for stem in stems if stem.rpartition(".")[2] == "lm_head"):
        if stem not in checkpoint.kept:
            text = "quantized, while config.json ties it to the embedding"
            yield finding("tied-head", stem, text)
        elif embeddings and not any(
            _are_equal(checkpoint, checkpoint.tensors[f"{stem}.weight"], info)
            for info in embeddings
        ):
            text = f"other values than {embeddings[0].key}, which config.json ties it to"
            yield finding("tied-head", f"{stem}.weight", text)


def _are_equal(checkpoint: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, one.nbytes - start)
        ours, theirs = (np.empty(size, dtype=np.uint8) for _ in range(2))
        checkpoint.read(one.key, start, ours)
        checkpoint.read(other.key, start, theirs)
        if not np.array_equal(ours, theirs):
            return False
    return True


def judge_kept(
    checkpoint: Checkpoint, parts: Iterable[NonFinite], embeddings: frozenset[str]
) -> Iterator[Finding]:
    """Yield a finding for each tensor with NaN or Inf, but not for embeddings of no token.

    Args:
        checkpoint: The checkpoint.
        parts: The NaN and Inf, in order.
        embeddings: Embeddings, without `.weight`, whose names do not show it.
    """
    tensors = merge(parts)
    tokens = token_count(checkpoint.folder) if tensors else None
    is_head = tie_of(checkpoint.config) is not Tie.NO
    for non_finite in tensors:
        stem = non_finite.name.removesuffix(".weight")
        is_embedding = stem in embeddings or EMBEDDING_NAME.search(stem) is not None
        is_unused = tokens is not None and non_finite.first_row >= tokens and not is_head
        if not (is_embedding and is_unused):
            yield finding("kept-not-finite", non_finite.name, str(non_finite))


CHECKS = (check_tied,)
