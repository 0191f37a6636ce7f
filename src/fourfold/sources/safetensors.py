# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in Hugging Face's form: config.json and one safetensors file, or several.

Headers and the index are checked when the folder is opened, since they may come from anybody; no
weight is read, and nothing is unpickled. Tensors are then read with `pread` at known positions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from fourfold.errors import SourceError
from fourfold.storage.fingerprints import FileStamp, Stamps
from fourfold.storage.json_files import DOWNLOAD, list_folder, plain_name, read_config, read_json
from fourfold.storage.names import INDEX, SINGLE
from fourfold.storage.safetensors_header import TensorInfo, nbytes_of, read_header, shown
from fourfold.storage.side_files import SideFiles, find_side_files
from fourfold.storage.source import Bytes, Source, renamed
from fourfold.storage.source_files import SourceFiles

OTHER_INDEX = "The index belongs to another checkpoint: download it again."

IN_MEMORY = Path("the live model")
"""Stands for the file of a tensor that lies in none."""

READ_AHEAD = 1 << 26
"""Bytes to read ahead at once: consecutive jobs read consecutive parts of a file."""


class SafetensorsFolder(Source):
    """A folder of safetensors, one file or several with an index. Safe for many threads."""

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            SourceError: A file is missing, cannot be read, or contradicts itself or the index.
        """
        self.folder = folder
        self._stamps = Stamps()
        self.config = read_config(folder, self._stamps)
        self.tensors = self._read_tensors()
        shards = frozenset(info.file for info in self.tensors.values())
        self._side_files = find_side_files(folder, shards, self._stamps)
        self._files = self._open_files()
        self._hinted: dict[Path, tuple[int, int]] = {}
        self._renamed: dict[str, str] = {}

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        info = self.tensors[key]
        first, last = _byte_range(info, start, stop)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        if first == last:
            return torch.empty(shape, dtype=info.torch_dtype)
        buffer = np.empty(last - first, dtype=np.uint8) if out is None else out
        self._read(info, first, buffer)
        return torch.from_numpy(buffer).view(info.torch_dtype).reshape(shape)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        info = self.tensors[key]
        self._read(info, info.start + start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        info = self.tensors[key]
        first, last = _byte_range(info, start, stop)
        hinted = self._hinted.get(info.file, (0, 0))
        if hinted[0] <= first and last <= hinted[1]:
            return
        ahead = max(last, first + READ_AHEAD)
        self._hinted[info.file] = (first, ahead)
        self._files.will_need(info.file, first, ahead)

    def side_files(self) -> SideFiles:
        return self._side_files

    def stamps(self) -> Mapping[str, FileStamp]:
        return self._stamps.relative_to(self.folder)

    def check_unchanged(self) -> None:
        self._stamps.check()

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._renamed:
            return ()
        key, name = next(iter(self._renamed.items()))
        return (
            f"its {len(self._renamed):,} tensors are called as in transformers' memory: they are "
            f"written under the published names, which engines know ({key} as {name})",
        )

    def rename(self, names: Mapping[str, str]) -> None:
        self._renamed = dict(names)
        self.tensors = renamed(self.tensors, names)

    def close(self) -> None:
        self._files.close()

    def _read_tensors(self) -> dict[str, TensorInfo]:
        return _read_tensors(self.folder, self._stamps)

    def _open_files(self) -> SourceFiles:
        return SourceFiles(self._stamps)

    def _read(self, info: TensorInfo, position: int, out: Bytes) -> None:
        self._files.read(info.file, position, out.data.cast("B"), plain_name(info.key))


def _byte_range(info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
    return info.start + start * info.row_bytes, info.start + stop * info.row_bytes


def copy_files(folder: Path, names: Iterable[Path], to: Path) -> None:
    """Copy files of a folder, named relative to it, into another folder."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, to / name)


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], file: Path
) -> dict[str, TensorInfo]:
    """Describe tensors (name, dtype, shape) as if they lay one after the other in a single file."""
    infos: dict[str, TensorInfo] = {}
    start = 0
    for key, dtype, shape in tensors:
        stop = start + nbytes_of(dtype, shape)
        infos[key] = TensorInfo(key, dtype, shape, file, start, stop)
        start = stop
    return infos


def open_source(model: str | Path) -> SafetensorsFolder:
    """Open a folder, or a name on the Hugging Face hub: ORG/NAME, or ORG/NAME@REVISION.

    Raises:
        SourceError: There is no such checkpoint, or it cannot be read.
    """
    name = str(model)
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, ~nobody
        cause = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{plain_name(name)}: {cause}. Give a checkpoint's folder.") from error
    if is_folder:
        return SafetensorsFolder(folder)
    if exists:
        raise SourceError(f"{folder}: is a file. Give the folder that holds config.json.")
    if name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~")):
        from fourfold.sources.hub import open_hub  # it builds on this module

        return open_hub(name, hint=_guess(folder))
    raise SourceError(
        f"{folder}: no such folder. Give a checkpoint's folder, or a hub name.{_guess(folder)}"
    )


def _guess(missing: Path) -> str:
    """A question whether a folder beside one that is missing was meant; empty if there is none."""
    parent = missing.parent
    beside = [path.name for path in list_folder(parent)] if parent.is_dir() else []
    similar = get_close_matches(missing.name, beside, n=1)
    return f" Did you mean {parent / similar[0]}?" if similar else ""


def _read_tensors(folder: Path, stamps: Stamps) -> dict[str, TensorInfo]:
    if os.path.lexists(folder / INDEX):
        return _read_indexed(folder, stamps)
    if (folder / SINGLE).is_file():
        file = folder / SINGLE
    else:
        file = single_file(folder, list_folder(folder))
    return some(folder, read_header(file, stamps))


def some(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors of a single file. Raises `SourceError` if there is none."""
    if not tensors:
        raise SourceError(f"{folder}: its safetensors file holds no tensor")
    return tensors


def single_file(folder: Path, present: Iterable[Path]) -> Path:
    """Return the one safetensors file of a checkpoint without an index, if there is one."""
    present = [path for path in present if not path.name.startswith(".")]
    files = [path for path in present if path.suffix == ".safetensors"]
    if len(files) == 1:
        return files[0]
    if files and all(path.name.startswith("consolidated") for path in files):
        raise SourceError(
            f"{folder}: only weights in the model maker's own format (consolidated*.safetensors). "
            "Download or convert to those for transformers (model*.safetensors)."
        )
    if files:
        raise SourceError(
            f"{folder}: {len(files)} safetensors files but no {INDEX} that says what they hold. "
            "Download the index, too."
        )
    if any(path.suffix in {".bin", ".pt", ".pth"} for path in present):
        raise SourceError(
            f"{folder}: only pickled weights, which can run code when they are read. "
            "Save the model again as safetensors (save_pretrained does)."
        )
    raise SourceError(f"{folder}: no safetensors file. Give a folder that holds the weights.")


def _read_indexed(folder: Path, stamps: Stamps) -> dict[str, TensorInfo]:
    weight_map = read_index(folder, stamps)
    names = sorted(set(weight_map.values()))
    return join(folder, weight_map, ((name, read_header(folder / name, stamps)) for name in names))


def read_index(folder: Path, stamps: Stamps) -> dict[str, str]:
    """Return the index's map from tensors to shards, all of which are inside the folder."""
    index = read_json(folder / INDEX, stamps)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / INDEX}: has no weight_map. Download the index again.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name:
            where = f"{folder / INDEX}: {plain_name(key)}"
            raise SourceError(f"{where} has no shard name but {shown(name)}. {DOWNLOAD}")
    for name, key in {name: key for key, name in weight_map.items()}.items():
        _check_inside(folder, key, name)
    return weight_map


def join(
    folder: Path,
    weight_map: Mapping[str, str],
    headers: Iterable[tuple[str, Mapping[str, TensorInfo]]],
) -> dict[str, TensorInfo]:
    """Return the tensors of all shards, given by name. Raises if they are not what is listed."""
    tensors: dict[str, TensorInfo] = {}
    for name, header in headers:
        for key, info in header.items():
            if key in tensors:
                raise SourceError(
                    f"{plain_name(key)}: lies both in {tensors[key].file.name} and in {name}. "
                    "One of the shards belongs to another checkpoint."
                )
            tensors[key] = info
    _check_index(folder, weight_map, tensors)
    return tensors


def _check_inside(folder: Path, key: str, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise SourceError(
            f"{folder / INDEX}: {plain_name(key)} points to {shown(name)}, outside the "
            "checkpoint's folder. Do not use this checkpoint."
        )


def _check_index(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    files = {name: folder / name for name in set(weight_map.values())}
    for key, name in weight_map.items():
        info = tensors.get(key)
        if info is None or info.file != files[name]:
            where = "but it is not there" if info is None else f"it is in {info.file.name}"
            raise SourceError(
                f"{plain_name(key)}: {INDEX} puts it in {name}, {where}. {OTHER_INDEX}"
            )
    unlisted = tensors.keys() - weight_map.keys()
    if unlisted:
        key = min(unlisted)
        raise SourceError(
            f"{plain_name(key)}: lies in {tensors[key].file.name} but {INDEX} does not list it "
            f"({len(unlisted)} such). {OTHER_INDEX}"
        )
