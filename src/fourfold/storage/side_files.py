# SPDX-License-Identifier: Apache-2.0
"""The files beside a checkpoint's weights: which of them the output gets, and why not the others.

The output gets what running the model needs (tokenizer, chat template, processors, the model's own
code, generation settings, licence) and other small texts. It does not get other copies of the
weights, training state, unfinished downloads or data. Contents count, not names alone: a Git
LFS pointer is no tokenizer, and a link is followed only to a file that the folder might hold
itself.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from os import stat_result
from pathlib import Path

from fourfold.storage.fingerprints import Stamps, reading
from fourfold.storage.git_lfs import check_no_pointer, is_pointer
from fourfold.storage.json_files import list_folder
from fourfold.storage.names import FOLDS, OWN_FILES, WEIGHT_SUFFIXES

TOKENIZERS = (
    "tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt",
    "tokenization_*.py",
)  # fmt: skip
"""Files that hold a tokenizer's vocabulary, or make one."""

NEEDED = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.*", FOLDS,
)  # fmt: skip
"""Files that running the model needs, of any size; and the factors that verifying it needs."""

SMALL_TEXT_BYTES = 1 << 20
"""Other texts are copied up to this size."""

TRAINING_STATE = re.compile(
    r"optimizer|scheduler|scaler\.|rng_state|random_states|trainer_state|training_args"
    r"|zero_to_fp32|(bf16_|fp16_)?zero_pp_rank|mp_rank_|dist_optim|events\.out\.tfevents"
    r"|latest$|.*\.distcp$"
)

TRAINING_FOLDER = re.compile(
    r"checkpoint-\d+|global_step\d+|pytorch_model_fsdp|optimizer|runs$|wandb$"
)

UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download", ".tmp")

ADAPTER_CONFIG = "adapter_config.json"


class LeftOut(StrEnum):
    """Why a file is not copied."""

    WEIGHTS = "other weights"
    TRAINING = "training state"
    ADAPTER = "an adapter, which is not merged"
    UNFINISHED = "unfinished downloads"
    POINTER = "Git LFS pointers"
    LINK = "links that leave the folder"
    NOT_A_FILE = "not files"
    DATA = "not needed to run the model"


@dataclass(frozen=True)
class SideFiles:
    """The files beside a checkpoint's weights, by paths relative to its folder."""

    copied: tuple[Path, ...] = ()
    left_out: tuple[tuple[Path, LeftOut], ...] = ()
    nbytes: int = 0
    """Bytes of the files to copy."""

    @property
    def has_tokenizer(self) -> bool:
        """True if a tokenizer can be made of the files that are copied."""
        return any(_is_one_of(path, TOKENIZERS) for path in self.copied)

    def without(self, names: Collection[str]) -> SideFiles:
        """Return the same without files of these names in the folder itself."""
        own = {Path(name) for name in names}
        return SideFiles(
            tuple(path for path in self.copied if path not in own),
            tuple((path, why) for path, why in self.left_out if path not in own),
            self.nbytes,
        )


def find_side_files(folder: Path, shards: Collection[Path], stamps: Stamps) -> SideFiles:
    """Decide which files of a checkpoint's folder are copied beside its quantized weights.

    Args:
        folder: The checkpoint's folder.
        shards: Its safetensors files, which do not count.
        stamps: Remembers the state of the files to copy.

    Raises:
        SourceError: A file that running the model needs is a Git LFS pointer.
    """
    others = _folders_of_others(folder)
    copied: list[Path] = []
    left_out: list[tuple[Path, LeftOut]] = []
    nbytes = 0
    for path in _walk(folder):
        relative = path.relative_to(folder)
        if path in shards or (len(relative.parts) == 1 and relative.name in OWN_FILES):
            continue
        status = _status_of_file(path)
        why_not = _why_left_out(folder, path, status)
        if status is None or why_not is not None:
            left_out.append((relative, why_not or LeftOut.NOT_A_FILE))
        elif not others.isdisjoint(path.parents):
            left_out.append((relative, LeftOut.WEIGHTS))
        else:
            stamps.add(path, status)
            copied.append(relative)
            nbytes += status.st_size
    return SideFiles(tuple(copied), tuple(left_out), nbytes)


def may_be_copied(path: Path, nbytes: int) -> bool:
    """False for a file that is left out whatever it holds: weights, and large ones not needed."""
    is_needed = _is_one_of(path, NEEDED)
    return path.suffix not in WEIGHT_SUFFIXES and (is_needed or nbytes <= SMALL_TEXT_BYTES)


def describe(left_out: Sequence[tuple[Path, LeftOut]]) -> str:
    """Return the reasons why files are left out, each with the names of some of them."""
    parts = []
    for reason in LeftOut:
        names = [str(path) for path, why in left_out if why is reason]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{reason} ({', '.join(names[:3])}{more})")
    return "; ".join(parts)


def _why_left_out(folder: Path, path: Path, status: stat_result | None) -> LeftOut | None:
    """The reason not to copy a file; None to copy it."""
    name, inner = path.name, path.relative_to(folder).parts[:-1]
    is_needed = _is_one_of(path, NEEDED)
    if path.suffix in UNFINISHED:
        return LeftOut.UNFINISHED
    if TRAINING_STATE.match(name) or any(TRAINING_FOLDER.match(part) for part in inner):
        return LeftOut.TRAINING
    if name == ADAPTER_CONFIG or name.startswith("adapter_model."):
        return LeftOut.ADAPTER
    if path.suffix in WEIGHT_SUFFIXES or name.endswith(".index.json"):
        return LeftOut.WEIGHTS
    if status is None or not _is_text(path.relative_to(folder)):
        return LeftOut.NOT_A_FILE
    if not _is_followed(folder, path):
        return LeftOut.LINK
    beginning = _beginning_of(path)
    if is_needed:
        check_no_pointer(path, beginning)
        return None
    if is_pointer(beginning):
        return LeftOut.POINTER
    is_small_text = status.st_size <= SMALL_TEXT_BYTES and b"\0" not in beginning
    return None if is_small_text else LeftOut.DATA


def _is_one_of(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder that is not a folder. Links to folders are not followed."""
    for path in list_folder(folder):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _folders_of_others(folder: Path) -> set[Path]:
    """The folders below that hold weights of their own: other checkpoints."""
    return {
        path.parent
        for path in _walk(folder)
        if path.suffix in WEIGHT_SUFFIXES and path.parent != folder
    }


def _status_of_file(path: Path) -> stat_result | None:
    """The status of a regular file, links followed; None for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _is_text(path: Path) -> bool:
    """True if a name can be written into a JSON document."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_followed(folder: Path, path: Path) -> bool:
    """True unless a link leaves the folder for anything but a file of the same name.

    Folders of links to another copy of the checkpoint, and the hub cache's links into its blobs,
    are followed; a checkpoint from a stranger cannot publish `/etc/passwd` as its licence.
    """
    if not path.is_symlink():
        return True
    target, root = path.resolve(), folder.resolve()
    is_in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    return target.is_relative_to(root) or is_in_cache or target.name == path.name


def _beginning_of(path: Path) -> bytes:
    with reading(path), path.open("rb") as handle:
        return handle.read(1 << 12)
