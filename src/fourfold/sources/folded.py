# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in which factors per channel are moved from activations into the weights.

    norm (or rows of up) · 2⁻ᵏ   →   columns of all its readers · 2ᵏ

The factors are powers of two: only exponents change, so that every product of the model is the same
number, and so are all tensors that stay as they are. Calibration, quantization, copying and
verification see this source as theirs, and know nothing of folds. `models.folds` says which tensors
belong together.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import SourceError
from fourfold.models.folds import Fold, find_folds
from fourfold.models.inventory import Inventory
from fourfold.models.regions import Region, as_slice
from fourfold.storage.fingerprints import reading
from fourfold.storage.names import FOLDS, SUMMARY
from fourfold.storage.run_state import read_record
from fourfold.storage.source import (
    Bytes,
    FP8Weight,
    MXFP4Weight,
    Source,
    SourceView,
    read_rounded,
)

FORMAT = "fourfold folds 1"

MOST = 16
"""The largest exponent, and the smallest times -1, that a file may hold."""


@dataclass(frozen=True)
class Factors:
    """The factors of a model, as a file holds them.

    Attributes:
        exponents: By name of the fold, int8 `[channels]`: what writes the activation is divided by
            2 to the power of these.
        origin: A digest of what they were chosen from, which a run that resumes compares.
        texts: The calibration data that they were chosen on, and
        choices: how, as plain data for the summary.
    """

    exponents: Mapping[str, Tensor] = field(default_factory=dict)
    origin: str = ""
    texts: Mapping[str, Any] = field(default_factory=dict)
    choices: Sequence[Mapping[str, Any]] = ()

    def to_bytes(self) -> bytes:
        """Return the contents of the file; the same factors give the same bytes."""
        from safetensors.torch import save

        head = {"origin": self.origin, "texts": dict(self.texts), "choices": list(self.choices)}
        metadata = {FORMAT: json.dumps(head)}
        return bytes(save(dict(sorted(self.exponents.items())), metadata=metadata))

    @classmethod
    def from_bytes(cls, data: bytes) -> Factors:
        """Parse what `to_bytes` returned. Raises many kinds of errors for anything else."""
        from safetensors.torch import load

        exponents: dict[str, Tensor] = load(data)
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get(FORMAT)
        if head is None:
            raise ValueError(f"it is no {FORMAT!r}")
        for name, tensor in exponents.items():
            if tensor.dtype != torch.int8 or tensor.ndim != 1 or bool((tensor.abs() > MOST).any()):
                raise ValueError(f"{name} holds other numbers than exponents")
        return cls(exponents, **json.loads(head))

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Scaling:
    """Some part of a raw tensor, and the exponents that are added to those of its values."""

    region: Region
    exponents: Tensor
    """int8, for each output of the region, or for each input."""
    of_inputs: bool


class FoldedSource(SourceView):
    """Another source on disk, with some of its weights scaled. Safe for many threads."""

    def __init__(self, source: Source, folds: Mapping[str, Fold], factors: Factors) -> None:
        """Present `source`.

        Args:
            source: A checkpoint whose inventory was taken.
            folds: Its folds, by name; those without exponents are not used.
            factors: The factors.

        Raises:
            SourceError: The factors are those of another model.
        """
        super().__init__(source)
        self.factors = factors
        self._scalings: dict[str, list[_Scaling]] = defaultdict(list)
        for name, of_fold in factors.exponents.items():
            fold = folds.get(name)
            if fold is None or of_fold.shape != (fold.channels,):
                raise SourceError(
                    f"{name}: {FOLDS} has {list(of_fold.shape)} factors for it, which do not fit "
                    f"{source.place}. Give the checkpoint that OUT was made from."
                )
            for region in fold.writers:
                self._scalings[region.key].append(_Scaling(region, -of_fold, of_inputs=False))
            for region in fold.readers:
                self._scalings[region.key].append(_Scaling(region, of_fold, of_inputs=True))

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> Tensor:
        if key not in self._scalings:
            return self.source.slab(key, start, stop, out)
        rows = self.source.slab(key, start, stop, out)
        if out is None:
            rows = rows.clone()  # the source may own the memory
        for scaling in self._scalings[key]:
            _scale(rows, scaling, start, stop)
        return rows

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        if key in self._scalings:
            read_rounded(partial(self.slab, key), self.tensors[key].row_bytes, start, out)
        else:
            self.source.read_bytes(key, start, out)

    def mxfp4(self, key: str) -> MXFP4Weight | None:
        return None if key in self._scalings else self.source.mxfp4(key)

    def fp8(self, key: str) -> FP8Weight | None:
        return None if key in self._scalings else self.source.fp8(key)


def _scale(rows: Tensor, scaling: _Scaling, start: int, stop: int) -> None:
    """Scale those rows `start:stop` of a raw tensor that lie in a region."""
    region, exponents = scaling.region, scaling.exponents
    along_rows = region.transposed if scaling.of_inputs else not region.transposed
    if region.expert is not None:
        if not start <= region.expert < stop:
            return
        part = rows[region.expert - start][as_slice(region.rows)]
    else:
        span = region.rows
        inside = range(*(max(0, -(-(at - span.start) // span.step)) for at in (start, stop)))
        if not span[inside.start : inside.stop]:
            return
        part = rows[as_slice(range(span[inside.start] - start, stop - start, span.step))]
        part = part[: len(span) - inside.start]
        if along_rows:
            exponents = exponents[inside.start : inside.stop]
    if region.cols is not None:
        part = part[:, as_slice(region.cols)]
    factors = torch.exp2(exponents.float()).to(rows.dtype)
    part.mul_(factors[:, None] if along_rows and part.ndim == 2 else factors)


def read_factors(folder: Path) -> Factors | None:
    """Return the factors that lie beside a checkpoint's weights; None if there are none.

    Raises:
        SourceError: The file is damaged.
    """
    file = folder / FOLDS
    if not file.is_file():
        return None
    with reading(file):
        data = file.read_bytes()
    try:
        return Factors.from_bytes(data)
    except Exception as error:  # safetensors raises several kinds for a damaged file
        raise SourceError(
            f"{file}: not the factors of a quantization: {error}. Quantize the model again."
        ) from None


def folded_as(source: Source, inventory: Inventory, folder: Path) -> Source:
    """Return a source as the checkpoint in a folder was made from it: folded, if that was.

    Raises:
        SourceError: The factors are missing, damaged, or those of another model.
    """
    factors = read_factors(folder)
    noted = (read_record(folder / SUMMARY) or {}).get("folds")
    if isinstance(noted, dict) and (factors is None or noted.get("digest") != factors.digest):
        what = "is missing" if factors is None else f"is not the file that {SUMMARY} means"
        raise SourceError(
            f"{folder / FOLDS}: {what}, and nothing can be compared with the source without it. "
            "Copy it from where the run wrote it."
        )
    if factors is None:
        return source
    return FoldedSource(source, find_folds(inventory, source.config).folds, factors)
