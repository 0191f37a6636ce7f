"""A Megatron checkpoint as a `Source`: Hugging Face names and lazy tensors.

    .metadata ─▶ stored tensors ─▶ parameters ─▶ rules of the family ─▶ Hugging Face tensors

Configuration, tokenizer and the like come from a folder of the Hugging Face model, the one that
`--hf-config` names; without it the configuration is made of the checkpoint's own arguments, where
they suffice. Opening reads no weight; a slab is read out of the chunks that hold it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from fourfold.errors import SourceError
from fourfold.sources.megatron.arguments import read_arguments
from fourfold.sources.megatron.configuration import configuration_of
from fourfold.sources.megatron.keys import is_bookkeeping, parameters_of
from fourfold.sources.megatron.metadata import (
    METADATA_FILE,
    StoredCheckpoint,
    iteration_folder,
    read_metadata,
)
from fourfold.sources.megatron.stored import StoredTensors
from fourfold.sources.megatron.tensors import MegatronTensors
from fourfold.storage.fingerprints import FileStamp, Stamps
from fourfold.storage.names import CONFIG
from fourfold.storage.safetensors_header import shown
from fourfold.storage.temporary import TemporaryFolder

SHOWN_KEYS = 3


class MegatronFolder(MegatronTensors):
    """A `torch_dist` directory, and the Hugging Face folder beside it. Safe for many threads."""

    def __init__(self, checkpoint: Path, hf_config: Path | None = None) -> None:
        """hf_config: None to make a configuration of what the checkpoint says of itself.

        Raises `SourceError` where anything does not fit, `UsageError` where the checkpoint does not
        say enough; reads no weight.
        """
        found = iteration_folder(checkpoint)
        if found is None:
            raise SourceError(
                f"{checkpoint}: no {METADATA_FILE}: no torch_dist checkpoint. "
                "Give the folder that Megatron wrote."
            )
        self.given, self.checkpoint = checkpoint, found
        self._stamps = Stamps()
        self._arguments = read_arguments(found, self._stamps)
        stored = read_metadata(found, self._stamps)
        self._reader = self._stored = StoredTensors(stored, self._stamps)
        self._made: TemporaryFolder | None = None
        try:
            super().__init__(hf_config or self._configured(stored))
            self._present(stored)
        except BaseException:
            self.close()
            raise

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        """What is read: no output may lie in any of them."""
        return self.given, self.checkpoint, self.folder

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [f"weights come from {self.checkpoint}, {self._origin_of_config}"]
        if self._left_out:
            notes.append(
                f"{self._left_out:,} keys that are no weights are left out (_extra_state, "
                "optimizers, random states)"
            )
        if self._arguments.note is not None:
            notes.append(self._arguments.note)
        return (*notes, *super().notes)

    @property
    def place(self) -> Path:
        """The folder by which the model is known."""
        return self.folder if self._made is None else self.given

    @property
    def config_file(self) -> Path:
        """The arguments, where the configuration is made of them."""
        return super().config_file if self._made is None else self._arguments.file

    @property
    def tokenizer_hint(self) -> str | None:
        """What to say where one is needed and there cannot be one."""
        if self._made is None:
            return None
        return f"{self.checkpoint}: has no tokenizer. Give a folder with one as --hf-config."

    @property
    def _origin_of_config(self) -> str:
        if self._made is None:
            return f"config.json from {self.folder}"
        kind, said = self.config["architectures"][0], self._arguments.values or {}
        trained = said.get("tokenizer_model")
        which = f" (it was trained with {shown(trained)})" if isinstance(trained, str) else ""
        return (
            f"config.json is made of the arguments in {self._arguments.file}, as {kind}'s. Special "
            f"tokens and the tokenizer{which} are not in them: add both before it is served"
        )

    def stamps(self) -> Mapping[str, FileStamp]:
        """Of the checkpoint's files, and of the Hugging Face folder's under `hf-config/`."""
        beside = self._beside.relative_to(self.folder) if self._made is None else {}
        return {
            **self._stamps.relative_to(self.checkpoint),
            **{f"hf-config/{name}": stamp for name, stamp in beside.items()},
        }

    def check_unchanged(self) -> None:
        self._stamps.check()
        if self._made is None:
            self._beside.check()

    def close(self) -> None:
        self._stored.close()
        if self._made is not None:
            self._made.remove()

    def _configured(self, stored: StoredCheckpoint) -> Path:
        """A temporary folder with the configuration that the arguments make."""
        weights = [each for key, each in stored.tensors.items() if not is_bookkeeping(key)]
        largest = max(weights, key=lambda each: math.prod(each.shape), default=None)
        config = configuration_of(self._arguments, largest.dtype if largest else "")
        try:
            self._made = TemporaryFolder()
            folder = self._made.path / "model"
            folder.mkdir()
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise SourceError(
                f"{error.filename or 'TMPDIR'}: a configuration cannot be written there: "
                f"{error.strerror}. Set TMPDIR to a folder that has room."
            ) from error
        return folder

    def _present(self, stored: StoredCheckpoint) -> None:
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
