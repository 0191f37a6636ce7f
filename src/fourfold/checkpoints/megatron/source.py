"""A Megatron checkpoint as a `Source`: Hugging Face names and lazy tensors.

    .metadata ─▶ stored tensors ─▶ parameters ─▶ rules of the family ─▶ Hugging Face tensors

Configuration, tokenizer and the like come from a folder of the Hugging Face model, the one that
`--hf-config` names. Opening reads no weight; a slab is read out of the chunks that hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fourfold.checkpoints.megatron.arguments import read_arguments
from fourfold.checkpoints.megatron.keys import is_bookkeeping, parameters_of
from fourfold.checkpoints.megatron.metadata import (
    METADATA_FILE,
    StoredCheckpoint,
    iteration_folder,
    read_metadata,
)
from fourfold.checkpoints.megatron.stored import StoredTensors
from fourfold.checkpoints.megatron.tensors import MegatronTensors
from fourfold.checkpoints.safetensors_header import shown
from fourfold.checkpoints.stamps import FileStamp, Stamps
from fourfold.errors import SourceError

SHOWN_KEYS = 3


class MegatronFolder(MegatronTensors):
    """A `torch_dist` directory, and the Hugging Face folder beside it. Safe for many threads."""

    def __init__(self, checkpoint: Path, hf_config: Path) -> None:
        """Raises `SourceError` where anything does not fit; reads no weight."""
        found = iteration_folder(checkpoint)
        if found is None:
            raise SourceError(
                f"{checkpoint}: no {METADATA_FILE}: no torch_dist checkpoint. "
                "Give the folder that Megatron wrote."
            )
        super().__init__(hf_config)
        self.given, self.checkpoint = checkpoint, found
        self._stamps = Stamps()
        stored = read_metadata(found, self._stamps)
        self._reader = self._stored = StoredTensors(stored, self._stamps)
        self._present(stored)

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        """What is read: no output may lie in any of them."""
        return self.given, self.checkpoint, self.folder

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [f"weights come from {self.checkpoint}, config.json from {self.folder}"]
        if self._left_out:
            notes.append(
                f"{self._left_out:,} keys that are no weights are left out (_extra_state, "
                "optimizers, random states)"
            )
        if self._arguments.note is not None:
            notes.append(self._arguments.note)
        return (*notes, *super().notes)

    def stamps(self) -> Mapping[str, FileStamp]:
        """Of the checkpoint's files, and of the Hugging Face folder's under `hf-config/`."""
        beside = self._beside.relative_to(self.folder)
        return {
            **self._stamps.relative_to(self.checkpoint),
            **{f"hf-config/{name}": stamp for name, stamp in beside.items()},
        }

    def check_unchanged(self) -> None:
        self._stamps.check()
        self._beside.check()

    def close(self) -> None:
        self._stored.close()

    def _present(self, stored: StoredCheckpoint) -> None:
        self._arguments = read_arguments(self.checkpoint, self._stamps)
        book, sizes = self._fit(self._arguments)
        _check_objects(stored)
        weights = {key: each for key, each in stored.tensors.items() if not is_bookkeeping(key)}
        self._left_out = len(stored.objects) + len(stored.tensors) - len(weights)
        for key in weights:
            self._stored.check(key)
        parameters = list(parameters_of(weights))
        self._take(parameters, book, sizes, self.checkpoint / METADATA_FILE)


def _check_objects(stored: StoredCheckpoint) -> None:
    """What is no tensor must be known bookkeeping: nothing else is left out."""
    unknown = [key for key in stored.objects if not is_bookkeeping(key)]
    if unknown:
        raise SourceError(
            f"{stored.folder / METADATA_FILE}: {', '.join(map(shown, unknown[:SHOWN_KEYS]))}: no "
            "tensor, and no bookkeeping that is known, so it cannot be left out. "
            "Which tool has saved it?"
        )
