"""A Megatron checkpoint as a `Source`: Hugging Face names and lazy tensors.

    .metadata ─▶ stored tensors ─▶ parameters ─▶ rules of the family ─▶ Hugging Face tensors

Configuration, tokenizer and the like come from a folder of the Hugging Face model, the one that
`--hf-config` names. Opening reads no weight; a slab is read out of the chunks that hold it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourfold.checkpoints.megatron.arguments import read_arguments
from fourfold.checkpoints.megatron.boxes import Box
from fourfold.checkpoints.megatron.families import rules_for
from fourfold.checkpoints.megatron.keys import Parameter, is_bookkeeping, parameters_of
from fourfold.checkpoints.megatron.metadata import (
    METADATA_FILE,
    StoredCheckpoint,
    iteration_folder,
    read_metadata,
)
from fourfold.checkpoints.megatron.presented import Presented, Range, present
from fourfold.checkpoints.megatron.sizes import Sizes
from fourfold.checkpoints.megatron.stored import StoredTensors
from fourfold.checkpoints.safetensors_header import BITS, TensorInfo, nbytes_of, shown
from fourfold.checkpoints.source import CONFIG, find_side_files, read_config
from fourfold.checkpoints.stamps import FileStamp, Stamps
from fourfold.errors import SourceError

_LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.([0-9]+)\.")
_EXPERT = re.compile(r".*\.mlp\.experts\.([0-9]+)\.")
_MTP = re.compile(r"(?:.*\.)?mtp\.layers\.([0-9]+)\.")

SHOWN_KEYS = 3


class MegatronFolder:
    """A `torch_dist` directory, and the Hugging Face folder beside it. Safe for many threads."""

    def __init__(self, checkpoint: Path, hf_config: Path) -> None:
        """Raises `SourceError` where anything does not fit; reads no weight."""
        found = iteration_folder(checkpoint)
        if found is None:
            raise SourceError(
                f"{checkpoint}: no {METADATA_FILE}: no torch_dist checkpoint. "
                "Give the folder that Megatron wrote."
            )
        self.given, self.checkpoint = checkpoint, found
        self.folder = hf_config
        """Where the configuration and the tokenizer lie."""
        self._stamps, self._beside = Stamps(), Stamps()
        config = read_config(hf_config, self._beside)
        self._was_quantized = "quantization_config" in config
        self.config: Mapping[str, Any] = {
            name: value for name, value in config.items() if name != "quantization_config"
        }
        stored = read_metadata(found, self._stamps)
        self._side_files = find_side_files(hf_config, frozenset(), self._beside)
        self._stored = StoredTensors(stored, self._stamps)
        self._presented = self._present(stored)
        self.tensors: Mapping[str, TensorInfo] = dict(self._lay_out())

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        """What is read: no output may lie in any of them."""
        return self.given, self.checkpoint, self.folder

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of where names and weights come from."""
        notes = [f"weights come from {self.checkpoint}, config.json from {self.folder}"]
        if self._left_out:
            notes.append(
                f"{self._left_out:,} keys that are no weights are left out (_extra_state, "
                "optimizers, random states)"
            )
        if self._arguments.note is not None:
            notes.append(self._arguments.note)
        if self._was_quantized:
            notes.append(
                f"{self.folder / CONFIG}: its quantization_config is left out: it is not that of "
                "these weights"
            )
        if self._lacks_mtp:
            notes.append("the configuration speaks of MTP layers; the checkpoint has none")
        return tuple(notes)

    def slab(
        self, key: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> torch.Tensor:
        info, each = self.tensors[key], self._presented[key].lines_each
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        buffer = np.empty(nbytes_of(info.dtype, shape), dtype=np.uint8) if out is None else out
        flat = buffer.reshape(-1).view(np.uint8)
        self._read(key, start * each, flat)
        return torch.from_numpy(flat).view(info.torch_dtype).reshape(shape)

    def read_bytes(self, key: str, start: int, out: np.ndarray[Any, Any]) -> None:
        if not len(out):
            return
        line = self._presented[key].line_bytes
        first, last = start // line, -(-(start + len(out)) // line)
        if start == first * line and len(out) == (last - first) * line:
            self._read(key, first, out)
            return
        data = np.empty((last - first) * line, dtype=np.uint8)
        self._read(key, first, data)
        out[:] = data[start - first * line :][: len(out)]

    def will_need(self, key: str, start: int, stop: int) -> None:
        presented = self._presented[key]
        each = presented.lines_each
        for found in presented.within(start * each, stop * each):
            self._stored.will_need(found.parameter.stored, _box(found))

    def made_of(self, key: str) -> str:
        """The stored key that a tensor's first rows come from, for messages."""
        return self._presented[key].ranges[0].parameter.stored

    def side_files(self) -> tuple[list[Path], list[Path]]:
        copied, dropped = self._side_files
        return [*copied], [*dropped]

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

    def _read(self, key: str, first: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` with lines of a tensor, from `first` on."""
        presented = self._presented[key]
        if not len(out):
            return
        for each in presented.within(first, first + len(out) // presented.line_bytes):
            at = (each.line - first) * presented.line_bytes
            size = (each.stop - each.start) * presented.line_bytes
            self._stored.read(each.parameter.stored, _box(each), out[at : at + size])
        if presented.plus_one:
            values = torch.from_numpy(out).view(self.tensors[key].torch_dtype)
            values.copy_(values.to(torch.float64) + 1.0)

    def _present(self, stored: StoredCheckpoint) -> dict[str, Presented]:
        file = self.folder / CONFIG
        book = rules_for(self.config.get("model_type"))
        sizes = Sizes.of(self.config, file)
        self._arguments = read_arguments(self.checkpoint, self._stamps)
        self._arguments.check(book, sizes, self.config, file)
        _check_objects(stored)
        weights = {key: each for key, each in stored.tensors.items() if not is_bookkeeping(key)}
        self._left_out = len(stored.objects) + len(stored.tensors) - len(weights)
        for key in weights:
            self._stored.check(key)
        parameters = list(parameters_of(weights))
        _check_head(parameters, sizes, file)
        mtp = _check_counts(parameters, sizes, file)
        self._lacks_mtp = bool(sizes.mtp_layers) and not mtp
        found = present(parameters, book, replace(sizes, mtp_layers=mtp))
        return {each.name: each for each in found}

    def _lay_out(self) -> Iterator[tuple[str, TensorInfo]]:
        """The tensors, as if they lay one after the other in a single safetensors file.

        So what is written does not depend on how the checkpoint was sharded, and is what would be
        written from `convert`'s output.
        """
        at, file = 0, self.checkpoint / METADATA_FILE
        order = sorted(self._presented.values(), key=lambda each: (-BITS[each.dtype], each.name))
        for each in order:
            yield (
                each.name,
                TensorInfo(each.name, each.dtype, each.shape, file, at, at + each.nbytes),
            )
            at += each.nbytes


def _box(found: Range) -> Box:
    """Rows of a parameter as a box of the stored tensor."""
    parameter = found.parameter
    index = tuple((number, number + 1) for number in parameter.index)
    if not parameter.shape:
        return index
    return *index, (found.start, found.stop), *((0, size) for size in parameter.shape[1:])


def _check_objects(stored: StoredCheckpoint) -> None:
    """What is no tensor must be known bookkeeping: nothing else is left out."""
    unknown = [key for key in stored.objects if not is_bookkeeping(key)]
    if unknown:
        raise SourceError(
            f"{stored.folder / METADATA_FILE}: {', '.join(map(shown, unknown[:SHOWN_KEYS]))}: no "
            "tensor, and no bookkeeping that is known, so it cannot be left out. "
            "Which tool has saved it?"
        )


def _check_counts(parameters: Iterable[Parameter], sizes: Sizes, file: Path) -> int:
    """Layers and experts are those of the configuration; how many MTP layers there are."""
    layers: set[int] = set()
    mtp: set[int] = set()
    for parameter in parameters:
        for pattern, found in ((_LAYER, layers), (_MTP, mtp)):
            match = pattern.match(parameter.name)
            if match is not None:
                found.add(int(match[1]))
        expert = _EXPERT.match(parameter.name)
        if expert is not None and int(expert[1]) >= sizes.experts:
            raise SourceError(
                f"{parameter.stored}: has an expert {expert[1]}, {file} says {sizes.experts} "
                "experts. Does --hf-config belong to this checkpoint?"
            )
    if len(layers) != sizes.layers or max(layers) >= sizes.layers:
        raise SourceError(
            f"{METADATA_FILE}: has decoder layers {_some(layers)}, {file} says "
            f"num_hidden_layers {sizes.layers}. Does --hf-config belong to this checkpoint?"
        )
    if mtp != set(range(len(mtp))):
        raise SourceError(f"{METADATA_FILE}: has MTP layers {_some(mtp)}, and not those before.")
    return len(mtp)


def _check_head(parameters: Iterable[Parameter], sizes: Sizes, file: Path) -> None:
    """A head of its own is an error where the configuration says that the embedding is the head."""
    head = [each.stored for each in parameters if each.name.endswith("output_layer.weight")]
    if head and sizes.is_tied:
        raise SourceError(
            f"{head[0]}: the checkpoint has a head of its own, {file} says tie_word_embeddings. "
            "Does --hf-config belong to this checkpoint?"
        )


def _some(numbers: set[int]) -> str:
    ordered: Iterator[str] = (str(number) for number in sorted(numbers))
    text = ", ".join(ordered)
    return text if len(text) < 60 else f"{text[:60]}… ({len(numbers)} of them)"
