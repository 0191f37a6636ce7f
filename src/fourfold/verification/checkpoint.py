"""The checkpoint that is verified: read with tolerance, so that what is wrong becomes a finding.

`checkpoints.source` refuses a folder whose index and shards disagree, as a source must. Here the
disagreement is noted (`Files`) and the tensors are read all the same. What cannot be read at all
(no config, a broken header, a truncated shard, no NVFP4) raises `UnreadableError`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from fourfold.errors import FourfoldError, SourceError, UnreadableError
from fourfold.models.families import is_stack
from fourfold.models.roles import EMBEDDING_NAME
from fourfold.storage.fingerprints import read_error
from fourfold.storage.json_files import read_config, read_json
from fourfold.storage.names import INDEX
from fourfold.storage.open_files import OpenFiles
from fourfold.storage.safetensors_header import TensorInfo, read_header
from fourfold.verification.quant_config import (
    CONFIG,
    HF_CONFIG,
    QuantConfig,
    parse,
)

WEIGHT, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE = PARTS = (
    "weight",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
)
KV_SCALES = ("k_scale", "v_scale")
FLOATS = frozenset({"BF16", "F16", "F32", "F64"})

EXPERT = re.compile(r"^(?P<module>.*experts)\.(?:expert_)?(?P<number>\d{1,9})\.(?P<projection>.+)$")
"""The name of one expert's linear."""
DOWN = frozenset({"down_proj", "w2", "fc2", "wo"})
"""What families call an expert's down projection; the others read the layer's input."""


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear with packed weights: the tensors found under its name."""

    name: str
    parts: Mapping[str, TensorInfo]
    algo: str | None
    """What the configuration says of it."""

    @property
    def is_sound(self) -> bool:
        """Whether its tensors have the dtypes and shapes that they can be read with."""
        weight, scale = self.parts.get(WEIGHT), self.parts.get(BLOCK_SCALE)
        if weight is None or scale is None or GLOBAL_SCALE not in self.parts:
            return False
        rows, half = weight.shape if len(weight.shape) == 2 else (0, 0)
        single = self.parts[GLOBAL_SCALE]
        return (
            (weight.dtype, scale.dtype, single.dtype) == ("U8", "F8_E4M3", "F32")
            and half % 8 == 0
            and rows * half > 0
            and scale.shape == (rows, half // 8)
            and single.numel == 1
        )

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]; only of a sound linear."""
        rows, half = self.parts[WEIGHT].shape
        return rows, 2 * half


@dataclass(slots=True)
class Files:
    """The index and the shards of a folder, and where they disagree."""

    shards: list[Path]
    weight_map: Mapping[str, str] | None
    total_size: int | None
    unlisted: list[str] = field(default_factory=list)
    """Safetensors files beside those that the index names."""
    twice: list[tuple[str, str, str]] = field(default_factory=list)
    """Tensor, and the two shards that hold it; the first one counts."""


@dataclass
class Checkpoint:
    """A folder in the ModelOpt layout. Reading is safe for many threads."""

    folder: Path
    config: Mapping[str, Any]
    flat: QuantConfig | None
    """From config.json."""
    nested: QuantConfig | None
    """From hf_quant_config.json."""
    files: Files
    tensors: Mapping[str, TensorInfo]
    linears: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    fp8: frozenset[str] = frozenset()
    """Linears in FP8, of a mixed checkpoint: their names count, their values are not checked."""
    kept: frozenset[str] = frozenset()
    """Linears (and stacks of experts) that are not quantized, without `.weight`."""

    def __post_init__(self) -> None:
        self._files = OpenFiles(lambda file: os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        self._scalars: dict[str, float] = {}
        self.linears, self.fp8 = _find_linears(self.tensors, self.quant)
        packed = self.linears.keys() | self.fp8
        self.kept = frozenset(_find_kept(self.tensors)) - packed

    @property
    def quant(self) -> QuantConfig:
        """The configuration that counts: config.json's where there is one."""
        quant = self.flat or self.nested
        assert quant is not None
        return quant

    @cached_property
    def sound(self) -> list[QuantizedLinear]:
        """The linears whose values can be read, by name."""
        return [linear for linear in self.linears.values() if linear.is_sound]

    def read(self, name: str, start: int, stop: int, out: np.ndarray[Any, Any]) -> None:
        """Bytes `start:stop` of a tensor into `out` (uint8)."""
        info = self.tensors[name]
        view, position = out.data, info.start + start
        assert len(view) == stop - start
        done = 0
        try:
            with self._files.descriptor(info.file) as descriptor:
                while done < len(view):
                    count = os.preadv(descriptor, [view[done:]], position + done)
                    if count == 0:
                        raise UnreadableError(f"{info.file}: ended while {name} was read from it")
                    done += count
        except OSError as error:
            raise UnreadableError(str(read_error(info.file, error, name))) from error

    def scalar(self, name: str) -> float:
        """The value of a float tensor of one element."""
        if name not in self._scalars:
            info = self.tensors[name]
            buffer = np.empty(info.nbytes, dtype=np.uint8)
            self.read(name, 0, info.nbytes, buffer)
            if info.dtype == "F32":
                self._scalars[name] = struct.unpack("<f", buffer.tobytes())[0]
            else:
                self._scalars[name] = float(torch.from_numpy(buffer).view(info.torch_dtype).float())
        return self._scalars[name]

    def close(self) -> None:
        """Give back every file that is open."""
        self._files.close()


@contextmanager
def unreadable() -> Iterator[None]:
    """Whatever fails inside means that there is nothing to verify: exit code 2."""
    try:
        yield
    except UnreadableError:
        raise
    except FourfoldError as error:
        raise UnreadableError(str(error)) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Headers and configuration of the checkpoint in `folder`. Raises `UnreadableError`."""
    with unreadable():
        if not folder.is_dir():
            raise UnreadableError(f"{folder}: no such folder. Give a checkpoint's folder.")
        config = read_config(folder)
        flat, nested = _read_quant(folder, config)
        files = _find_files(folder)
        return Checkpoint(folder, config, flat, nested, files, _read_tensors(files))


def _read_quant(
    folder: Path, config: Mapping[str, Any]
) -> tuple[QuantConfig | None, QuantConfig | None]:
    flat = nested = None
    if isinstance(config.get("quantization_config"), dict):
        flat = parse(config["quantization_config"], CONFIG)
    if (folder / HF_CONFIG).is_file():
        nested = parse(read_json(folder / HF_CONFIG), HF_CONFIG)
    found = [quant for quant in (flat, nested) if quant is not None]
    if any(quant.method == "compressed-tensors" for quant in found):
        raise UnreadableError(
            f"{folder}: in the compressed-tensors layout. verify reads the ModelOpt layout."
        )
    if not any(quant.is_nvfp4 for quant in found):
        says = ", ".join(f"{q.file} says {q.algo or q.method}" for q in found)
        raise UnreadableError(
            f"{folder}: not an NVFP4 checkpoint ({says or 'config.json has no quantization_config'}"
            "). Quantize the model first, and give the output's folder."
        )
    return flat, nested


def _find_files(folder: Path) -> Files:
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / INDEX).is_file():
        if not present:
            raise UnreadableError(f"{folder}: no safetensors file")
        return Files([folder / name for name in present], None, None)
    index = read_json(folder / INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableError(f"{folder / INDEX}: has no weight_map")
    names = {_inside(folder, name) for name in weight_map.values()}
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = int(total) if isinstance(total, int | float) and math.isfinite(total) else None
    unlisted = [name for name in present if name not in names and not _is_statistics(folder / name)]
    return Files([folder / name for name in sorted(names)], weight_map, total, unlisted)


def _is_statistics(file: Path) -> bool:
    """Whether a file holds what calibration found: names that no engine takes for a weight's."""
    if file.name != "calibration.safetensors":
        return False
    try:
        names = read_header(file).keys()
    except SourceError:
        return False
    return all(name.endswith((".amax", ".tokens", ".rows")) for name in names)


def _inside(folder: Path, name: object) -> str:
    path = PurePosixPath(str(name))
    odd = path.is_absolute() or ".." in path.parts or bool(set("\\\0") & set(str(name)))
    if odd or not isinstance(name, str):
        raise UnreadableError(f"{folder / INDEX}: points to {name!r}, outside the folder")
    return name


def _read_tensors(files: Files) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for shard in files.shards:
        for name, info in read_header(shard).items():
            if name in found:
                files.twice.append((name, found[name].file.name, shard.name))
            else:
                found[name] = info
    return found


def _find_linears(
    tensors: Mapping[str, TensorInfo], quant: QuantConfig
) -> tuple[dict[str, QuantizedLinear], frozenset[str]]:
    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in PARTS:
            parts[stem][leaf] = info
    linears, fp8 = {}, set()
    for name in sorted(parts):
        own = parts[name]
        is_packed = own.keys() != {WEIGHT} or own[WEIGHT].dtype == "U8"
        algo = quant.algo_of(name)
        if is_packed and algo is not None and algo.startswith("FP8"):
            fp8.add(name)
        elif is_packed:
            linears[name] = QuantizedLinear(name, own, algo)
    return linears, frozenset(fp8)


def _find_kept(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What an engine may build as a linear layer, and holds floats here."""
    for name, info in tensors.items():
        stem = name.removesuffix(".weight")
        is_matrix = stem != name and len(info.shape) == 2 and not EMBEDDING_NAME.search(stem)
        if is_matrix or (len(info.shape) >= 2 and is_stack(stem)):
            yield stem
