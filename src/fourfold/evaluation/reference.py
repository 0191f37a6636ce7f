# SPDX-License-Identifier: Apache-2.0
"""What the source predicts, in a compact form and in a file.

A vocabulary of 150,000 tokens makes 600 kB of log-probabilities for each position. Here the `top`
likeliest tokens are kept one by one, in float32, and the probability of all others as one number:

    KL over these = Σ_top P·ln(P/Q) + P_rest·ln(P_rest/Q_rest)  ≤  KL over the vocabulary

It falls short by P_rest times the divergence among the others; a vocabulary of no more than `top`
tokens is kept whole, and nothing is lost. The same numbers are used whether the file is new or was
written by an earlier run.

Shapes: N windows, W positions, V vocabulary, K = min(top, V).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourfold.errors import ModelError
from fourfold.evaluation.windows import Windows
from fourfold.storage.disk import check_disk, writing
from fourfold.storage.safetensors_header import TORCH_DTYPES, nbytes_of
from fourfold.storage.shard_file import ShardFile
from fourfold.storage.source import Source
from fourfold.storage.temporary import TemporaryFolder

VERSION = 1
"""Raised when the file's contents mean something else."""

ELEMENTS = 1 << 24
"""Numbers that are handled at a time: some rows of logits."""


@dataclass(frozen=True)
class Prediction:
    """What a model predicts at W positions."""

    ids_WK: Tensor
    """int32: the source's likeliest tokens, the likeliest first."""
    log_probs_WK: Tensor
    """float32: ln P of these tokens."""
    rest_W: Tensor
    """float32: the probability of all others."""
    nll_W: Tensor
    """float32: −ln P of the token that follows; 0 at the last position, which none follows."""


def predict(
    model: str,
    window: int,
    logits_WV: Tensor,
    tokens_W: Tensor,
    ids_WK: Tensor | None,
    top: int = 0,
) -> Prediction:
    """Return what a model's logits for a window say of the tokens in `ids_WK`.

    Args:
        model, window: For messages.
        logits_WV: The logits.
        tokens_W: The tokens of the window.
        ids_WK: The tokens to look at; None for the `top` likeliest ones.
        top: How many that are.

    Raises:
        ModelError: The logits hold NaN or Inf. −Inf marks tokens that a model never predicts.
    """
    following_W = torch.cat([tokens_W[1:], tokens_W[-1:]]).to(logits_WV.device)
    rows = max(1, ELEMENTS // logits_WV.shape[-1])
    parts = []
    for start in range(0, len(logits_WV), rows):
        logp_RV = torch.log_softmax(logits_WV[start : start + rows].float(), dim=-1)
        if ids_WK is None:
            ids_RK = logp_RV.topk(min(top, logp_RV.shape[-1])).indices
        else:
            ids_RK = ids_WK[start : start + rows].long().to(logits_WV.device)
        nll_R = -logp_RV.gather(-1, following_W[start : start + rows, None])[:, 0]
        logp_RK = logp_RV.gather(-1, ids_RK)
        rest_R = logp_RV.exp_().scatter_(-1, ids_RK, 0.0).sum(-1)
        parts.append((ids_RK.int(), logp_RK, rest_R, nll_R))
    ids_WK, log_probs_WK, rest_W, nll_W = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
    if bool(torch.isnan(log_probs_WK).any() | torch.isnan(rest_W).any()):  # of any logit in a row
        raise ModelError(
            f"{model}: predicts NaN or Inf in window {window}. `fourfold verify` and `fourfold "
            "inspect` name weights and scales that are not finite."
        )
    nll_W[-1] = 0.0
    return Prediction(ids_WK, log_probs_WK, rest_W, nll_W)


class Reference:
    """The predictions of the source, window by window, in a file."""

    def __init__(self, file: Path) -> None:
        """Open a file that `writing_reference` made; `SafetensorError` if it is none."""
        opened: Any = safe_open(file, framework="pt")
        self.file = file
        self._slices = {name: opened.get_slice(name) for name in _specs((1, 1), 1)}

    def __getitem__(self, window: int) -> Prediction:
        """The predictions for a window."""
        return Prediction(*(self._slices[name][window] for name in self._slices))

    @property
    def rest_NW(self) -> Tensor:
        """`Prediction.rest_W` of all windows."""
        rest: Tensor = self._slices["rest"][:]
        return rest

    @property
    def nll_NW(self) -> Tensor:
        """`Prediction.nll_W` of all windows."""
        nll: Tensor = self._slices["nll"][:]
        return nll

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the file's tensors."""
        return {name: tuple(tensor.get_shape()) for name, tensor in self._slices.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.file.stat().st_size


def _specs(shape: Sequence[int], kept: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a file for windows [N, W], in the order of the fields of `Prediction`."""
    shape_NW = tuple(shape)
    return {
        "ids": ("I32", (*shape_NW, kept)),
        "log_probs": ("F32", (*shape_NW, kept)),
        "rest": ("F32", shape_NW),
        "nll": ("F32", shape_NW),
    }


class ReferenceWriter:
    """Writes the predictions of the source into a file, window by window."""

    def __init__(self, file: Path, windows: Windows, kept: int) -> None:
        """Create the file in a temporary folder beside its place, where `finish` puts it.

        Raises:
            ResourceError: The disk has no room for it.
            OutputError: The folder cannot be written.
        """
        self.file, self.ids_NW = file, windows.ids_NW
        self.specs = _specs(windows.ids_NW.shape, kept)
        check_disk(file.parent, sum(nbytes_of(*spec) for spec in self.specs.values()))
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryFolder(file.parent)
        self._shard = ShardFile(self._folder.path / file.name, self.specs)

    def add(self, window: int, logits_WV: Tensor) -> None:
        """Write what the source predicts for a window."""
        kept = self.specs["ids"][1][-1]
        prediction = predict("the source", window, logits_WV, self.ids_NW[window], None, kept)
        for (name, (dtype, shape)), tensor in zip(
            self.specs.items(), vars(prediction).values(), strict=True
        ):
            assert tensor.dtype == TORCH_DTYPES[dtype]
            row = nbytes_of(dtype, shape[1:])
            self._shard.write(name, tensor.contiguous().numpy(), window * row)

    def finish(self) -> None:
        """Put the file, which is whole, into its place."""
        self._shard.finish()
        with writing(self.file):
            self._shard.path.replace(self.file)

    def close(self) -> None:
        """Remove what is not finished."""
        self._shard.close()
        self._folder.remove()


# --- the cache ----------------------------------------------------------------------------


def default_folder() -> Path:
    """Return the folder for predictions of sources in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fourfold" / "evaluation"


def identity_of(source: Source, windows: Windows, **options: Any) -> str | None:
    """Return a digest of all that predictions depend on; None if the source has no files."""
    stamps = source.stamps()
    if stamps is None:
        return None
    facts = {
        "version": VERSION,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "files": {name: [x.size, x.mtime_ns, x.digest] for name, x in stamps.items()},
        "hub": source.fetching.revision,
        "windows": windows.digest,
        **options,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def find_reference(file: Path, windows: Windows, kept: int) -> Reference | None:
    """Return the predictions in a file; None if there is none, or it is not what it should be."""
    try:
        reference = Reference(file)
    except (OSError, SafetensorError):
        return None
    specs = _specs(windows.ids_NW.shape, kept)
    is_whole = reference.shapes == {name: shape for name, (_, shape) in specs.items()}
    return reference if is_whole else None


@contextmanager
def writing_reference(file: Path, windows: Windows, kept: int) -> Iterator[ReferenceWriter]:
    """Write predictions; the file is there, and whole, if the context ends without an error."""
    with closing(ReferenceWriter(file, windows, kept)) as writer:
        yield writer
        writer.finish()
