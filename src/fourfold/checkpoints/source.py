"""A checkpoint seen as Hugging Face names and lazy tensors: the `Source` protocol.

Everything after it knows no other world. `SafetensorsFolder` is the first kind: a directory
with `config.json` and one safetensors file, or several with an index. Other kinds (dequantized,
converted, live in memory) present the same face.

A tensor is read by **slabs**: a range of its first dimension, which is one run of bytes. That is
all that a fold needs: one expert of a fused parameter, some rows of a matrix, the whole.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch

from fourfold.checkpoints.journal import RUN, STATE
from fourfold.checkpoints.open_files import OpenFiles
from fourfold.checkpoints.safetensors_header import (
    SHOWN_CHARACTERS,
    TensorInfo,
    load_json,
    read_header,
    shown,
)
from fourfold.checkpoints.stamps import START_AGAIN, Stamps, opened, read_error
from fourfold.checkpoints.stamps import FileStamp as FileStamp
from fourfold.errors import SourceError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite")
WEIGHT_SUFFIXES = frozenset({".safetensors", *OTHER_WEIGHTS})
"""Files that hold weights. Those that are not shards of the checkpoint are other copies of it."""

MAX_JSON_BYTES = 1 << 28
"""No configuration or index is larger: room for two million tensors."""

DOWNLOAD = "Download it again."
OTHER_INDEX = "The index belongs to another checkpoint: download it again."

MEGATRON = (".metadata", "latest_checkpointed_iteration.txt")
"""Files of Megatron's checkpoints, which are another kind of source."""

READ_AHEAD = 1 << 26
"""Bytes that the disk is told of at once: jobs follow each other in a file."""

OWN_FILES = frozenset({CONFIG, INDEX, "hf_quant_config.json"})
"""Files that describe a checkpoint's weights: the output has its own."""


class Source(Protocol):
    """A checkpoint: names, shapes, dtypes, lazy slabs, and the files beside the weights."""

    @property
    def folder(self) -> Path:
        """Where config, tokenizer and custom code lie."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The source's config.json, as it is."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its raw key, in the order of the keys' files."""

    def slab(
        self, key: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> torch.Tensor:
        """Rows `start:stop` of the first dimension of `key`, into `out` (uint8) where given."""

    def read_bytes(self, key: str, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` (uint8) with bytes of `key`, from byte `start` on, whatever its dtype."""

    def will_need(self, key: str, start: int, stop: int) -> None:
        """A hint that this slab will be read soon."""

    def side_files(self) -> tuple[list[Path], list[Path]]:
        """Files to copy, and those that are not: other weights, links that leave the folder, what
        is no file (a socket, a dangling link). Relative paths."""

    def stamps(self) -> Mapping[str, FileStamp] | None:
        """What the files looked like when the source was opened, by relative name, sorted:
        config.json, the index, shards, and the files to copy. None for what is no folder."""

    def check_unchanged(self) -> None:
        """Raise `SourceError` where one of these files changed or disappeared since then."""

    def close(self) -> None:
        """Give back every file that is open."""


def place_of(source: Source) -> Path:
    """The folder by which a source is known: its own, unless that is only a temporary one."""
    place: Path = getattr(source, "place", source.folder)
    return place


class SafetensorsFolder:
    """A directory of safetensors, one file or several with an index. Safe for many threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps = Stamps()
        self.config: dict[str, Any] = read_config(folder, self._stamps)
        self.tensors: dict[str, TensorInfo] = _read_tensors(folder, self._stamps)
        shards = frozenset(info.file for info in self.tensors.values())
        self._side_files = find_side_files(folder, shards, self._stamps)
        self._files = OpenFiles(self._open)
        self._hinted: dict[Path, tuple[int, int]] = {}

    def slab(
        self, key: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> torch.Tensor:
        info = self.tensors[key]
        first, last = _byte_range(info, start, stop)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        if first == last:
            return torch.empty(shape, dtype=info.torch_dtype)
        buffer = np.empty(last - first, dtype=np.uint8) if out is None else out
        self._read(info, first, buffer.data.cast("B"))
        return torch.from_numpy(buffer).view(info.torch_dtype).reshape(shape)

    def read_bytes(self, key: str, start: int, out: np.ndarray[Any, Any]) -> None:
        info = self.tensors[key]
        self._read(info, info.start + start, out.data.cast("B"))

    def will_need(self, key: str, start: int, stop: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        info = self.tensors[key]
        first, last = _byte_range(info, start, stop)
        hinted = self._hinted.get(info.file, (0, 0))
        if hinted[0] <= first and last <= hinted[1]:
            return
        ahead = max(last, first + READ_AHEAD)
        self._hinted[info.file] = (first, ahead)
        # What is wrong with a file is told when it is read.
        with suppress(OSError, SourceError), self._files.descriptor(info.file) as descriptor:
            os.posix_fadvise(descriptor, first, ahead - first, os.POSIX_FADV_WILLNEED)

    def side_files(self) -> tuple[list[Path], list[Path]]:
        copied, dropped = self._side_files
        return [*copied], [*dropped]

    def stamps(self) -> Mapping[str, FileStamp]:
        return self._stamps.relative_to(self.folder)

    def check_unchanged(self) -> None:
        self._stamps.check()

    def close(self) -> None:
        self._files.close()

    def _open(self, file: Path) -> int:
        with opened(file) as (handle, status):
            self._stamps.same(file, status)
            return os.dup(handle.fileno())

    def _read(self, info: TensorInfo, position: int, view: memoryview) -> None:
        done = 0
        try:
            with self._files.descriptor(info.file) as descriptor:
                while done < len(view):
                    count = os.preadv(descriptor, [view[done:]], position + done)
                    if count == 0:
                        raise SourceError(
                            f"{info.file}: ended while {_plain(info.key)} was read. {START_AGAIN}"
                        )
                    done += count
        except OSError as error:
            raise read_error(info.file, error, _plain(info.key)) from error


def _byte_range(info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
    if not info.shape or not info.shape[0]:
        return info.start, info.stop
    row = info.nbytes // info.shape[0]
    return info.start + start * row, info.start + stop * row


def find_side_files(
    folder: Path, shards: Collection[Path], stamps: Stamps
) -> tuple[list[Path], list[Path]]:
    """Files of a folder to copy, which `stamps` remember, and those that are not; see `Source`."""
    copied: list[Path] = []
    dropped: list[Path] = []
    for path in _walk(folder):
        relative = path.relative_to(folder)
        if path in shards or (len(relative.parts) == 1 and relative.name in OWN_FILES):
            continue
        is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        status = None if is_weights else _status_of_file(path)
        if status is not None and _is_text(relative) and _stays_inside(folder, path):
            stamps.add(path, status)
            copied.append(relative)
        else:
            dropped.append(relative)
    return copied, dropped


def _walk(folder: Path) -> Iterable[Path]:
    """Everything in a folder that is not a folder; links to folders are not followed."""
    for path in _listed(folder):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise read_error(folder, error) from error


def _plain(name: str) -> str:
    """A name as it is where it can stand in a line, quoted where it cannot."""
    return name if name.isprintable() and len(name) <= SHOWN_CHARACTERS else shown(name)


def _status_of_file(path: Path) -> os.stat_result | None:
    """A regular file's status, links followed; None for anything else, and what cannot be seen."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _is_text(path: Path) -> bool:
    """Whether a name can be written into a JSON document."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _stays_inside(folder: Path, path: Path) -> bool:
    """Whether a file is the folder's own: no link, or one into it or into its hub cache's blobs."""
    if not path.is_symlink():
        return True
    target, root = path.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (
        root.parent.name == "snapshots" and target.parent == blobs
    )


def open_source(model: str | Path) -> SafetensorsFolder:
    """The checkpoint that `model` names: a local directory, or a name on the Hugging Face hub."""
    name = str(model)
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links, ~nobody
        cause = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"{_plain(name)}: {cause}. Give a checkpoint's folder.") from error
    if is_folder:
        return SafetensorsFolder(folder)
    if exists:
        raise SourceError(f"{folder}: is a file. Give the folder that holds config.json.")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return SafetensorsFolder(_download(name))
    raise SourceError(f"{folder}: no such folder. Give a checkpoint's folder, or a hub name.")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, ignore_patterns=["original/*", *(f"*{x}" for x in OTHER_WEIGHTS)]
        )
    except Exception as error:  # the hub client raises errors of many libraries
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"{name}: no such folder, and the hub does not give it: {cause[:200]}"
        ) from error
    return Path(folder)


def read_json(file: Path, stamps: Stamps | None = None) -> dict[str, Any]:
    """A JSON object from a file, which `stamps` remember.

    Raises `SourceError` where it is missing or something else.
    """
    try:
        with opened(file) as (handle, status):
            raw = handle.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise SourceError(f"{file}: larger than {MAX_JSON_BYTES:,} bytes. {DOWNLOAD}")
        value = load_json(raw)
    except FileNotFoundError:
        raise SourceError(f"{file}: missing. {DOWNLOAD}") from None
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not valid JSON: {error}. {DOWNLOAD}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise SourceError(f"{file}: holds a JSON {kind}, not an object. {DOWNLOAD}")
    if stamps is not None:
        stamps.add(file, status, raw)
    return value


def read_config(folder: Path, stamps: Stamps | None = None) -> dict[str, Any]:
    """A checkpoint folder's config.json."""
    if not os.path.lexists(folder / CONFIG):
        if (folder / STATE / RUN).is_file():
            raise SourceError(
                f"{folder}: no config.json yet, as its run is not finished. The command that "
                "began it goes on from there."
            )
        if any(os.path.lexists(folder / name) for name in MEGATRON):
            raise SourceError(
                f"{folder}: a Megatron checkpoint (torch_dist), not Hugging Face's. Convert it "
                "first: `fourfold convert`; or give --hf-config where a command has it."
            )
        seen = [_plain(path.name) for path in _listed(folder)[:5]]
        inside = f"it holds {', '.join(seen)}, …" if seen else "it is empty"
        raise SourceError(f"{folder}: no config.json ({inside}). Give a checkpoint's folder.")
    return read_json(folder / CONFIG, stamps)


def _read_tensors(folder: Path, stamps: Stamps) -> dict[str, TensorInfo]:
    if os.path.lexists(folder / INDEX):
        return _read_indexed(folder, stamps)
    tensors = read_header(_single_file(folder), stamps)
    if not tensors:
        raise SourceError(f"{folder}: its safetensors file holds no tensor")
    return tensors


def _single_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    present = _listed(folder)
    files = [path for path in present if path.suffix == ".safetensors"]
    if len(files) == 1:
        return files[0]
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
    index = read_json(folder / INDEX, stamps)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{folder / INDEX}: has no weight_map. Download the index again.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name:
            where = f"{folder / INDEX}: {_plain(key)}"
            raise SourceError(f"{where} has no shard name but {shown(name)}. {DOWNLOAD}")
    for name, key in {name: key for key, name in weight_map.items()}.items():
        _check_inside(folder, key, name)
    found: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        for key, info in read_header(folder / name, stamps).items():
            if key in found:
                raise SourceError(
                    f"{_plain(key)}: lies both in {found[key].file.name} and in {name}. "
                    "One of the shards belongs to another checkpoint."
                )
            found[key] = info
    _check_index(folder, weight_map, found)
    return found


def _check_inside(folder: Path, key: str, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise SourceError(
            f"{folder / INDEX}: {_plain(key)} points to {shown(name)}, outside the checkpoint's "
            "folder. Do not use this checkpoint."
        )


def _check_index(
    folder: Path, weight_map: Mapping[str, str], found: Mapping[str, TensorInfo]
) -> None:
    files = {name: folder / name for name in set(weight_map.values())}
    for key, name in weight_map.items():
        if key not in found:
            raise SourceError(
                f"{_plain(key)}: {INDEX} puts it in {name}, but it is not there. {OTHER_INDEX}"
            )
        if found[key].file != files[name]:
            raise SourceError(
                f"{_plain(key)}: {INDEX} puts it in {name}, it is in {found[key].file.name}. "
                f"{OTHER_INDEX}"
            )
    unlisted = found.keys() - weight_map.keys()
    if unlisted:
        key = min(unlisted)
        raise SourceError(
            f"{_plain(key)}: lies in {found[key].file.name} but {INDEX} does not list it "
            f"({len(unlisted)} such). {OTHER_INDEX}"
        )
