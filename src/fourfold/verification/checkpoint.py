# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that is verified, read with tolerance: faults become findings.

`sources.safetensors` refuses a folder whose index and shards disagree, as a source must. Here the
disagreement is noted (`Files`) and the tensors are read all the same. A checkpoint that cannot be
read at all (no config, a broken header, a truncated shard, no NVFP4) raises `UnreadableError`.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from fourfold.errors import SourceError, UnreadableError
from fourfold.formats.base import FORMATS
from fourfold.models.families import FAMILIES, is_stack
from fourfold.models.names import EXPERT_LINEAR
from fourfold.models.peculiarities import Peculiarities, peculiarities_of
from fourfold.models.roles import EMBEDDING_NAME
from fourfold.storage.fingerprints import read_error
from fourfold.storage.json_files import read_config, read_json, why_no_folder
from fourfold.storage.names import INDEX
from fourfold.storage.open_files import OpenFiles, read_full
from fourfold.storage.safetensors_header import TensorInfo, read_header
from fourfold.storage.source import read_rounded
from fourfold.verification.fp8 import LEAVES, FP8Linear, fp8_linear
from fourfold.verification.readers import reader_of
from fourfold.verification.readers.base import (
    BLOCK_SCALE,
    GLOBAL_SCALE,
    WEIGHT,
    LayoutReader,
    QuantConfig,
)
from fourfold.verification.readers.stacked import unstack

NVFP4 = FORMATS["nvfp4"]

DOWN = frozenset(family.names.down for family in FAMILIES.values())
"""The names of an expert's down projection; the other projections read the layer's input."""


def block_scales(shape: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the block scales of a weight [out, in]."""
    return NVFP4.parts(shape)["block_scale"][1]


CODES_PER_BYTE = NVFP4.block // NVFP4.parts((1, NVFP4.block))["codes"][1][1]


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear with packed weights, and the tensors that belong to its name."""

    name: str
    parts: Mapping[str, TensorInfo]
    algo: str | None
    """Its algorithm, as the configuration states it."""

    @property
    def is_sound(self) -> bool:
        """True if its tensors have the dtypes and shapes that its values can be read with."""
        weight, scale = self.parts.get(WEIGHT), self.parts.get(BLOCK_SCALE)
        if weight is None or scale is None or GLOBAL_SCALE not in self.parts:
            return False
        if len(weight.shape) != 2 or weight.numel == 0:
            return False
        single = self.parts[GLOBAL_SCALE]
        return (
            (weight.dtype, scale.dtype, single.dtype) == ("U8", "F8_E4M3", "F32")
            and self.shape[1] % NVFP4.block == 0
            and scale.shape == block_scales(self.shape)
            and single.numel == 1
        )

    @property
    def compared(self) -> tuple[TensorInfo, ...]:
        """The tensors that say what the values are."""
        return tuple(self.parts[part] for part in (WEIGHT, BLOCK_SCALE, GLOBAL_SCALE))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], from a packed weight of two dimensions."""
        rows, packed = self.parts[WEIGHT].shape
        return rows, CODES_PER_BYTE * packed


@dataclass(slots=True)
class Files:
    """The index and the shards of a folder, and their disagreements."""

    shards: list[Path]
    weight_map: Mapping[str, str] | None
    total_size: int | None
    unlisted: list[str] = field(default_factory=list)
    """Safetensors files beside those that the index names."""
    twice: list[tuple[str, str, str]] = field(default_factory=list)
    """Tensor, and the two shards that hold it; the first one counts."""


@dataclass
class Checkpoint:
    """A folder in one of the layouts. Reading is safe for many threads."""

    folder: Path
    config: Mapping[str, Any]
    reader: LayoutReader
    files: Files
    tensors: Mapping[str, TensorInfo]
    """By name; of stacked experts, each expert's own."""
    linears: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    fp8: Mapping[str, FP8Linear] = field(default_factory=dict)
    """The FP8 linears of a mixed checkpoint."""
    kept: frozenset[str] = frozenset()
    """Linears (and stacks of experts) that are not quantized, without `.weight`."""

    def __post_init__(self) -> None:
        self._files = OpenFiles(lambda file: os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        self._scalars: dict[str, float] = {}
        self.stored = self.tensors
        """The tensors as the files hold them."""
        self._unstacked = unstack(self.tensors, self.model_types)
        self.tensors = self._unstacked.tensors
        self.quant: QuantConfig = self.reader.quant
        self.linears, self.fp8 = _find_linears(self.tensors, self.reader)
        self.kept = frozenset(_find_kept(self.tensors)) - self.quantized

    @property
    def quantized(self) -> frozenset[str]:
        """The names of all quantized linears."""
        return frozenset(self.linears.keys() | self.fp8.keys())

    @property
    def configs(self) -> list[Mapping[str, Any]]:
        """The text model's configuration, if it has one of its own, and the whole."""
        text = self.config.get("text_config")
        return [text, self.config] if isinstance(text, dict) else [self.config]

    @property
    def num_hidden_layers(self) -> int | None:
        """The number of decoder layers, if the configuration states it."""
        stated = self.configs[0].get("num_hidden_layers")
        return stated if isinstance(stated, int) else None

    @property
    def model_types(self) -> list[object]:
        """The types of the whole model and of the text model, as far as they are stated."""
        return [config.get("model_type") for config in reversed(self.configs)]

    @cached_property
    def peculiar(self) -> Peculiarities:
        """What engines do in the model's family alone."""
        return peculiarities_of(*self.model_types)

    @cached_property
    def sound(self) -> list[QuantizedLinear]:
        """The linears whose values can be read, ordered by name."""
        return [linear for linear in self.linears.values() if linear.is_sound]

    def read(self, name: str, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` (uint8) with bytes of a tensor, from byte `start` on."""
        if name in self._unstacked.strides:
            read_rows = partial(self._read_apart, name)
            read_rounded(read_rows, self.tensors[name].row_bytes, start, out)
        else:
            self._read(name, self.tensors[name].start + start, out)

    def _read_apart(self, name: str, first: int, last: int, out: np.ndarray[Any, Any]) -> None:
        """Read rows whose bytes do not follow each other in the file."""
        info, (row, byte) = self.tensors[name], self._unstacked.strides[name]
        shape = last - first, info.row_bytes
        around = np.empty((shape[0] - 1) * row + (shape[1] - 1) * byte + 1, dtype=np.uint8)
        self._read(name, info.start + first * row, around)
        out[:] = np.lib.stride_tricks.as_strided(around, shape, (row, byte)).reshape(-1)

    def _read(self, name: str, position: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` with bytes of the file that holds a tensor."""
        info = self.tensors[name]
        try:
            with self._files.descriptor(info.file) as descriptor:
                count = read_full(descriptor, out.data, position)
        except OSError as error:
            raise read_error(info.file, error, name) from error
        if count < len(out):
            raise UnreadableError(
                f"{info.file}: ended while {name} was read. Start again when nothing writes to it."
            )

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `start:stop` of a tensor's first dimension, by default all of them."""
        info = self.tensors[name]
        stop = info.rows if stop is None else stop
        buffer = np.empty(info.row_bytes * (stop - start), dtype=np.uint8)
        self.read(name, start * info.row_bytes, buffer)
        return torch.from_numpy(buffer).view(info.torch_dtype).view(-1, *info.shape[1:])

    def scalar(self, name: str) -> float:
        """Return the value of a float tensor of one element."""
        if name not in self._scalars:
            info = self.tensors[name]
            buffer = np.empty(info.nbytes, dtype=np.uint8)
            self.read(name, 0, buffer)
            value = float(torch.from_numpy(buffer).view(info.torch_dtype).float())
            self._scalars[name] = value / self._unstacked.divisors.get(name, 1.0)
        return self._scalars[name]

    def scale(self, linear: QuantizedLinear, part: str) -> float:
        """Return the factor that a global or input scale of a linear stands for."""
        return self.reader.scale(part, self.scalar(linear.parts[part].key))

    def tensor_name(self, linear: str, part: str) -> str:
        """Return the name that the tensor of a linear's part has, or would have."""
        return f"{linear}.{self.reader.leaves[part]}"

    def close(self) -> None:
        """Close every open file."""
        self._files.close()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers and the configuration of the checkpoint in `folder`.

    Raises:
        SourceError: They cannot be read, or state no layout that is known.
    """
    if not folder.is_dir():
        raise UnreadableError(f"{folder}: {why_no_folder(folder)}. Give a checkpoint's folder.")
    config = read_config(folder)
    reader = reader_of(folder, config)
    files = _find_files(folder)
    checkpoint = Checkpoint(folder, config, reader, files, _read_tensors(files))
    _check_apart(folder, checkpoint.tensors)
    return checkpoint


def _check_apart(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `UnreadableError` for experts that are quantized in one tensor."""
    scales = [x.key for x in tensors.values() if x.dtype == "F8_E4M3" and len(x.shape) > 2]
    for name, info in tensors.items():
        is_stacked = info.dtype == "U8" and len(info.shape) > 2 and not EXPERT_LINEAR.match(name)
        stem = re.sub(r"[._]weight(_packed)?$", "", name)
        if is_stacked and any(scale.startswith(stem) for scale in scales):
            raise UnreadableError(
                f"{folder}: {name}: NVFP4 experts stacked in one tensor {list(info.shape)}, in a "
                "family whose stacks no engine is known to read. That is outside of what verify "
                "judges; the engine that it was made for may read it."
            )


def _find_files(folder: Path) -> Files:
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / INDEX).is_file():
        if not present:
            raise UnreadableError(f"{folder}: no safetensors file. Give a checkpoint's folder.")
        return Files([folder / name for name in present], None, None)
    index = read_json(folder / INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableError(f"{folder / INDEX}: has no weight_map. Download it again.")
    names = {_inside(folder, name) for name in weight_map.values()}
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = int(total) if isinstance(total, int | float) and math.isfinite(total) else None
    unlisted = [name for name in present if name not in names and not _is_statistics(folder / name)]
    return Files([folder / name for name in sorted(names)], weight_map, total, unlisted)


def _is_statistics(file: Path) -> bool:
    """True if a file holds calibration statistics: no engine takes their names for weights."""
    if file.name != "calibration.safetensors":
        return False
    try:
        names = read_header(file).keys()
    except SourceError:
        return False
    return all(name.endswith((".amax", ".tokens", ".rows")) for name in names)


def _inside(folder: Path, name: object) -> str:
    path = PurePosixPath(str(name))
    leaves = path.is_absolute() or ".." in path.parts or bool(set("\\\0") & set(str(name)))
    if leaves or not isinstance(name, str):
        raise UnreadableError(
            f"{folder / INDEX}: points to {name!r}, outside the folder. Do not trust it."
        )
    return name


def _read_tensors(files: Files) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in files.shards:
        for name, info in read_header(shard).items():
            if name in tensors:
                files.twice.append((name, tensors[name].file.name, shard.name))
            else:
                tensors[name] = info
    return tensors


def _find_linears(
    tensors: Mapping[str, TensorInfo], reader: LayoutReader
) -> tuple[dict[str, QuantizedLinear], dict[str, FP8Linear]]:
    """The NVFP4 linears, and those in FP8."""
    leaves = {*reader.leaves.values(), *LEAVES}
    found: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in leaves:
            found[stem][leaf] = info
    linears: dict[str, QuantizedLinear] = {}
    fp8: dict[str, FP8Linear] = {}
    for name in sorted(found):
        own = found[name]
        if own.keys() == {WEIGHT} and own[WEIGHT].dtype != "U8":
            continue
        algo = reader.quant.algo_of(name)
        is_packed = reader.leaves[WEIGHT] in own
        if WEIGHT in own and (not is_packed or "FP8" in (algo or "")):
            parts = {leaf: own[leaf] for leaf in LEAVES if leaf in own}
            fp8[name] = fp8_linear(name, parts, algo, reader.fp8)
        else:
            parts = {part: own[leaf] for part, leaf in reader.leaves.items() if leaf in own}
            linears[name] = QuantizedLinear(name, parts, algo)
    return linears, fp8


def _find_kept(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """The tensors that an engine may build as linear layers, without `.weight`."""
    for name, info in tensors.items():
        stem = name.removesuffix(".weight")
        is_matrix = stem != name and len(info.shape) == 2 and not EMBEDDING_NAME.search(stem)
        if is_matrix or (len(info.shape) >= 2 and is_stack(stem)):
            yield stem
