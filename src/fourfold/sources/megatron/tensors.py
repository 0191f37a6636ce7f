"""What every source of Megatron's parameters shares: Hugging Face's names, and reading by them.

    parameters ─▶ rules of the family ─▶ Hugging Face tensors ─▶ slabs, out of boxes of parameters

Where the parameters lie, in files or in memory of several ranks, is the reader's affair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fourfold.errors import ModelError, SourceError
from fourfold.sources.megatron.arguments import Arguments
from fourfold.sources.megatron.boxes import Box
from fourfold.sources.megatron.families import rules_for
from fourfold.sources.megatron.keys import Parameter
from fourfold.sources.megatron.presented import Presented, Range, present
from fourfold.sources.megatron.rules import RuleBook
from fourfold.sources.megatron.sizes import OWN, Sizes
from fourfold.sources.safetensors import find_side_files
from fourfold.storage.fingerprints import Stamps
from fourfold.storage.json_files import read_config
from fourfold.storage.names import CONFIG
from fourfold.storage.safetensors_header import BITS, TensorInfo, nbytes_of
from fourfold.storage.source import Bytes, Source, read_rounded

_LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.([0-9]+)\.")
_EXPERT = re.compile(r".*\.mlp\.experts\.([0-9]+)\.")
_MTP = re.compile(r"(?:.*\.)?mtp\.layers\.([0-9]+)\.")


class Reader(Protocol):
    """Whatever holds the parameters."""

    def read(self, key: str, box: Box, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` with the elements of a box of the stored tensor `key`, row-major."""

    def will_need(self, key: str, box: Box) -> None:
        """A hint that these elements will be read soon."""


class MegatronTensors(Source):
    """Megatron's parameters under Hugging Face's names, and the Hugging Face folder beside them."""

    _presented: Mapping[str, Presented]
    _reader: Reader
    _lacks_mtp: bool

    def __init__(self, hf_config: Path) -> None:
        self.folder = hf_config
        """Where the configuration and the tokenizer lie."""
        self._beside = Stamps()
        config = read_config(hf_config, self._beside)
        self._was_quantized = "quantization_config" in config
        self.config = {
            name: value for name, value in config.items() if name != "quantization_config"
        }
        self._side_files = find_side_files(hf_config, frozenset(), self._beside)

    @property
    def config_file(self) -> Path:
        """What the configuration was read from."""
        return self.folder / CONFIG

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of where names and weights come from."""
        notes = []
        if self._was_quantized:
            notes.append(
                f"{self.config_file}: its quantization_config is left out: it is not that of "
                "these weights"
            )
        if self._lacks_mtp:
            notes.append("the configuration speaks of MTP layers; the checkpoint has none")
        return tuple(notes)

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        info, each = self.tensors[key], self._presented[key].lines_each
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        buffer = np.empty(nbytes_of(info.dtype, shape), dtype=np.uint8) if out is None else out
        flat = buffer.reshape(-1).view(np.uint8)
        self._read(key, start * each, flat)
        return torch.from_numpy(flat).view(info.torch_dtype).reshape(shape)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        def read_lines(first: int, last: int, lines: Bytes) -> None:
            self._read(key, first, lines)

        read_rounded(read_lines, self._presented[key].line_bytes, start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        for found in self._within(key, start, stop):
            self._reader.will_need(found.parameter.stored, box_of(found))

    def check_placed(self, unplaced: Sequence[str], architecture: str) -> None:
        """Every name that the rules have made must be one of the model's."""
        if unplaced:
            stored = self._presented[unplaced[0]].ranges[0].parameter.stored
            raise ModelError(
                f"{unplaced[0]}: made of {stored}, but {architecture} has no place for it "
                f"({len(unplaced)} such). {OWN}"
            )

    def side_files(self) -> tuple[list[Path], list[Path]]:
        copied, dropped = self._side_files
        return [*copied], [*dropped]

    def _fit(self, arguments: Arguments) -> tuple[RuleBook, Sizes]:
        """The rules and the sizes. Raises `SourceError` where `arguments` say otherwise."""
        file = self.config_file
        book = rules_for(self.config.get("model_type"))
        sizes = Sizes.of(self.config, file)
        arguments.check(book, sizes, self.config, file)
        return book, sizes

    def _take(self, parameters: list[Parameter], book: RuleBook, sizes: Sizes, where: Path) -> None:
        """Present `parameters`, which lie in `where`; `SourceError` where any does not fit."""
        file = self.config_file
        _check_head(parameters, sizes, file)
        mtp = _check_counts(parameters, sizes, file, where.name)
        self._lacks_mtp = bool(sizes.mtp_layers) and not mtp
        found = present(parameters, book, replace(sizes, mtp_layers=mtp))
        self._presented = {each.name: each for each in found}
        self.tensors = dict(self._lay_out(where))

    def _within(self, key: str, start: int, stop: int) -> Iterator[Range]:
        """The rows of parameters that rows `start:stop` of a tensor are made of."""
        presented = self._presented[key]
        return presented.within(start * presented.lines_each, stop * presented.lines_each)

    def _read(self, key: str, first: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` with lines of a tensor, from `first` on."""
        presented = self._presented[key]
        if not len(out):
            return
        for each in presented.within(first, first + len(out) // presented.line_bytes):
            at = (each.line - first) * presented.line_bytes
            size = (each.stop - each.start) * presented.line_bytes
            self._reader.read(each.parameter.stored, box_of(each), out[at : at + size])
        if presented.plus_one:
            values = torch.from_numpy(out).view(self.tensors[key].torch_dtype)
            values.copy_(values.to(torch.float64) + 1.0)

    def _lay_out(self, where: Path) -> Iterator[tuple[str, TensorInfo]]:
        """The tensors, as if they lay in `where` one after the other in a single safetensors file.

        So what is written does not depend on how the model was sharded, and is what would be
        written from `convert`'s output.
        """
        at = 0
        order = sorted(self._presented.values(), key=lambda each: (-BITS[each.dtype], each.name))
        for each in order:
            yield (
                each.name,
                TensorInfo(each.name, each.dtype, each.shape, where, at, at + each.nbytes),
            )
            at += each.nbytes


def box_of(found: Range) -> Box:
    """Rows of a parameter as a box of the stored tensor."""
    parameter = found.parameter
    index = tuple((number, number + 1) for number in parameter.index)
    if not parameter.shape:
        return index
    return *index, (found.start, found.stop), *((0, size) for size in parameter.shape[1:])


def _check_counts(parameters: Iterable[Parameter], sizes: Sizes, file: Path, where: str) -> int:
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
                f"experts. {OWN}"
            )
    if len(layers) != sizes.layers or max(layers) >= sizes.layers:
        raise SourceError(
            f"{where}: has decoder layers {_some(layers)}, {file} says "
            f"num_hidden_layers {sizes.layers}. {OWN}"
        )
    if mtp != set(range(len(mtp))):
        raise SourceError(f"{where}: has MTP layers {_some(mtp)}, and not those before.")
    return len(mtp)


def _check_head(parameters: Iterable[Parameter], sizes: Sizes, file: Path) -> None:
    """A head of its own is an error where the configuration says that the embedding is the head."""
    head = [each.stored for each in parameters if each.name.endswith("output_layer.weight")]
    if head and sizes.is_tied:
        raise SourceError(
            f"{head[0]}: the checkpoint has a head of its own, {file} says tie_word_embeddings. "
            f"{OWN}"
        )


def _some(numbers: set[int]) -> str:
    ordered: Iterator[str] = (str(number) for number in sorted(numbers))
    text = ", ".join(ordered)
    return text if len(text) < 60 else f"{text[:60]}… ({len(numbers)} of them)"
