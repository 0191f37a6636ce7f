# SPDX-License-Identifier: Apache-2.0
"""A Megatron checkpoint as a `Source`: Hugging Face names and lazy tensors.

    .metadata ─▶ stored tensors ─▶ parameters ─▶ rules of the family ─▶ Hugging Face tensors

Configuration, tokenizer and other files come from a folder of the Hugging Face model, which
`hf_config` names. Without it the configuration is made from the checkpoint's training arguments,
if they suffice. Opening a checkpoint reads no weight, and a slab is read from the chunks that hold
it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from fourfold.errors import SourceError
from fourfold.sources.megatron.arguments import read_arguments
from fourfold.sources.megatron.base import MegatronSource
from fourfold.sources.megatron.box_index import Box
from fourfold.sources.megatron.chunk_reader import ChunkReader
from fourfold.sources.megatron.configuration import configuration_of
from fourfold.sources.megatron.metadata import (
    METADATA_FILE,
    StoredCheckpoint,
    StoredTensor,
    find_iteration,
    read_metadata,
)
from fourfold.sources.megatron.parameters import (
    is_bookkeeping,
    is_quantizer_state,
    parameters_of,
)
from fourfold.storage.fingerprints import FileStamp, Stamps
from fourfold.storage.names import CONFIG
from fourfold.storage.safetensors_header import shown
from fourfold.storage.source import Bytes

SHOWN_KEYS = 3


class MegatronCheckpoint(MegatronSource):
    """A `torch_dist` checkpoint and the Hugging Face folder beside it. Safe for many threads."""

    def __init__(self, checkpoint: Path, hf_config: Path | None = None) -> None:
        """Open a checkpoint.

        Args:
            checkpoint: The folder that Megatron wrote, or the folder above it that names its latest
                iteration.
            hf_config: The folder of the Hugging Face configuration and tokenizer; None to make a
                configuration from the checkpoint's training arguments.

        Raises:
            SourceError: The checkpoint is damaged, unsupported, or not of this configuration.
            UsageError: The checkpoint's arguments do not suffice for a configuration.
        """
        iteration = find_iteration(checkpoint)
        if iteration is None:
            raise SourceError(
                f"{checkpoint}: no {METADATA_FILE}, so it is no torch_dist checkpoint. "
                "Give the folder that Megatron wrote."
            )
        self._given, self._checkpoint = checkpoint, iteration
        self._stamps = Stamps()
        self._arguments = read_arguments(iteration, self._stamps)
        stored = read_metadata(iteration, self._stamps)
        weights = _weights_of(stored)
        others = [key for key in (*stored.objects, *stored.tensors) if key not in weights]
        self._quantizer_state = [key for key in others if is_quantizer_state(key)]
        self._left_out = len(others) - len(self._quantizer_state)
        self._chunks = ChunkReader(stored, self._stamps)
        try:
            super().__init__(hf_config or self._write_configuration(weights))
            for key in weights:
                self._chunks.index(key)
            where = iteration / METADATA_FILE
            self._present(list(parameters_of(weights)), self._arguments, where)
        except BaseException:
            self.close()
            raise

    def read_box(self, key: str, box: Box, out: Bytes) -> None:
        self._chunks.read(key, box, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        for rows in self._ranges(key, start, stop):
            self._chunks.will_need(rows.parameter.stored, rows.box)

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        return self._given, self._checkpoint, self.folder

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [f"weights come from {self._checkpoint}, {self._origin_of_config}"]
        if self._left_out:
            notes.append(
                f"{self._left_out:,} keys that are not weights are left out (_extra_state, "
                "optimizers, random states)"
            )
        if self._quantizer_state:
            notes.append(
                f"{len(self._quantizer_state):,} keys are the state of ModelOpt's quantizers "
                f"({self._quantizer_state[0]}, …), and left out: the recipe chooses all scales anew"
            )
        if self._arguments.note is not None:
            notes.append(self._arguments.note)
        return (*notes, *super().notes)

    @property
    def place(self) -> Path:
        return self.folder if self._temporary is None else self._given

    @property
    def config_file(self) -> Path:
        return super().config_file if self._temporary is None else self._arguments.file

    @property
    def tokenizer_hint(self) -> str | None:
        if self._temporary is None:
            return None
        return f"{self._checkpoint}: has no tokenizer. Give a folder with one as `hf_config`."

    @property
    def _origin_of_config(self) -> str:
        if self._temporary is None:
            return f"config.json from {self.folder}"
        architecture = self.config["architectures"][0]
        tokenizer = (self._arguments.values or {}).get("tokenizer_model")
        trained = f" (it was trained with {shown(tokenizer)})" if tokenizer else ""
        return (
            f"config.json is made from the arguments in {self._arguments.file}, for {architecture}."
            f" Special tokens and the tokenizer{trained} are not in them: add both before it is "
            "served"
        )

    def stamps(self) -> Mapping[str, FileStamp]:
        """The checkpoint's files, and the Hugging Face folder's under `hf-config/`."""
        beside = self._beside.relative_to(self.folder) if self._temporary is None else {}
        if self._vision is not None:
            beside = {**beside, **self._vision.stamps()}
        return {
            **self._stamps.relative_to(self._checkpoint),
            **{f"hf-config/{name}": stamp for name, stamp in beside.items()},
        }

    def check_unchanged(self) -> None:
        self._stamps.check()
        if self._temporary is None:
            self._beside.check()
        if self._vision is not None:
            self._vision.check_unchanged()

    def close(self) -> None:
        self._chunks.close()
        super().close()

    def _write_configuration(self, weights: Mapping[str, StoredTensor]) -> Path:
        """Make a temporary folder with the configuration that the arguments describe."""
        largest = max(weights.values(), key=lambda tensor: math.prod(tensor.shape), default=None)
        config = configuration_of(self._arguments, largest.dtype if largest else "")
        folder = self._own_folder("model")
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return folder


def _weights_of(stored: StoredCheckpoint) -> dict[str, StoredTensor]:
    """The tensors that are weights; everything else must be known bookkeeping."""
    unknown = [key for key in stored.objects if not _is_left_out(key)]
    if unknown:
        raise SourceError(
            f"{stored.folder / METADATA_FILE}: {', '.join(map(shown, unknown[:SHOWN_KEYS]))}: "
            "neither a tensor nor known bookkeeping, so it cannot be left out. Which tool saved it?"
        )
    return {key: tensor for key, tensor in stored.tensors.items() if not _is_left_out(key)}


def _is_left_out(key: str) -> bool:
    return is_bookkeeping(key) or is_quantizer_state(key)
