# SPDX-License-Identifier: Apache-2.0
"""`fourfold inspect`: the tensors, formats, sizes and scales of a checkpoint at a glance.

Works on any safetensors checkpoint. Reads only headers and scalar scales, so it is quick for every
size of model. Names that differ only in numbers share a line: `layers.*`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourfold.documents import Shown, document
from fourfold.layouts import quantization_of
from fourfold.sources.safetensors import SafetensorsFolder, open_source
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.units import aligned, size

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorKind:
    """Tensors of one dtype and shape whose names differ only in numbers."""

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int
    scales: tuple[float, float] | None
    """Smallest and largest value, for scalar float32 scales."""


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """A checkpoint at a glance. Printing it gives what the command prints."""

    folder: str
    model_type: str
    quantization: str | None
    ignored: int
    """Number of entries in the ignore list."""
    files: int
    tensors: int
    nbytes: int
    kinds: tuple[TensorKind, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return document("inspection", **asdict(self))

    @property
    def headline(self) -> str:
        """The folder, its model type and its quantization."""
        ignored = f", {self.ignored:,} ignore entries" if self.ignored else ""
        return f"{self.folder}: {self.model_type}, {self.quantization or 'not quantized'}{ignored}"

    @property
    def total(self) -> str:
        return f"{self.tensors:,} tensors in {self.files} files, {size(self.nbytes)}"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table of tensors: a header, and a row of cells for each kind."""
        header = ("tensors", "dtype", "shape", "count", "bytes", "scales")
        return [header, *map(_row, self.kinds)]

    def __str__(self) -> str:
        return "\n".join([self.headline, *aligned(self.rows(), left=3), self.total])


def _row(kind: TensorKind) -> tuple[str, ...]:
    shape = "×".join(map(str, kind.shape)) or "scalar"
    scales = "" if kind.scales is None else f"{kind.scales[0]:.3g} … {kind.scales[1]:.3g}"
    return kind.pattern, kind.dtype, shape, f"{kind.count:,}", size(kind.nbytes), scales


def inspect(folder: str | Path) -> Inspection:
    """Summarize the checkpoint in `folder`. Raises SourceError if it cannot be read."""
    with closing(open_source(folder)) as source:
        kinds = tuple(_kinds(source))
    config = source.config.get("quantization_config")
    ignore = config.get("ignore") if isinstance(config, dict) else None
    return Inspection(
        folder=str(source.folder),
        model_type=str(source.config.get("model_type", "unknown")),
        quantization=quantization_of(source.config),
        ignored=len(ignore) if isinstance(ignore, list) else 0,
        files=len({info.file for info in source.tensors.values()}),
        tensors=len(source.tensors),
        nbytes=sum(info.nbytes for info in source.tensors.values()),
        kinds=kinds,
    )


def _kinds(source: SafetensorsFolder) -> Iterable[TensorKind]:
    kinds: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = defaultdict(list)
    for info in source.tensors.values():
        kinds[_NUMBER.sub("*", info.key), info.dtype, info.shape].append(info)
    for (pattern, dtype, shape), infos in sorted(kinds.items()):
        nbytes = sum(info.nbytes for info in infos)
        scales = _scales(source, infos) if dtype == "F32" and infos[0].numel == 1 else None
        yield TensorKind(pattern, dtype, shape, len(infos), nbytes, scales)


def _scales(source: SafetensorsFolder, infos: Iterable[TensorInfo]) -> tuple[float, float]:
    values = [float(source.read(info.key).reshape(())) for info in infos]
    return min(values), max(values)
