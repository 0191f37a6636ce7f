# SPDX-License-Identifier: Apache-2.0
"""Base class of sources that read Megatron's parameters under Hugging Face names.

    parameters ─▶ rules of the family ─▶ Hugging Face tensors ─▶ slabs, from boxes of parameters

Members say where the parameters lie: in the files of a checkpoint, or in the memory of ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fourfold.errors import ModelError, SourceError
from fourfold.layouts.recognition import stated_quantizations, without_quantization
from fourfold.sources.megatron.arguments import Arguments
from fourfold.sources.megatron.assembly import AssembledTensor, Range, assemble
from fourfold.sources.megatron.box_index import Box
from fourfold.sources.megatron.families import rules_for
from fourfold.sources.megatron.parameters import EXPERT, LAYER, MTP_LAYER, Parameter
from fourfold.sources.megatron.rules import RuleBook
from fourfold.sources.megatron.sizes import WRONG_CONFIG, Sizes
from fourfold.sources.safetensors import SafetensorsFolder, lay_out, open_source
from fourfold.storage.fingerprints import Stamps
from fourfold.storage.json_files import read_config
from fourfold.storage.names import CONFIG
from fourfold.storage.safetensors_header import BITS, nbytes_of
from fourfold.storage.side_files import SideFiles, find_side_files
from fourfold.storage.source import Bytes, Source, read_rounded
from fourfold.storage.temporary import TemporaryFolder

SHOWN_LENGTH = 60


class MegatronSource(Source):
    """Megatron's parameters under Hugging Face names, and the Hugging Face folder beside them."""

    _assembled: Mapping[str, AssembledTensor]
    _lacks_mtp: bool
    _vision: SafetensorsFolder | None = None
    """The Hugging Face folder's weights, if the vision tower comes from there."""
    _temporary: TemporaryFolder | None = None
    """Holds `folder`, if that was made for this source alone."""

    def __init__(self, hf_config: Path) -> None:
        """Read the folder with the Hugging Face configuration and the tokenizer."""
        self.folder = hf_config
        self._beside = Stamps()
        config = read_config(hf_config, self._beside)
        self._was_quantized = next(stated_quantizations(config), None) is not None
        self.config = without_quantization(config)
        self._side_files = find_side_files(hf_config, frozenset(), self._beside)

    @abstractmethod
    def read_box(self, key: str, box: Box, out: Bytes) -> None:
        """Fill `out` with the elements of a box of the stored tensor `key`, row-major."""

    @property
    def config_file(self) -> Path:
        """The file that says what the configuration is, for messages."""
        return self.folder / CONFIG

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._was_quantized:
            notes.append(
                f"{self.config_file}: its quantization_config is left out: it does not describe "
                "these weights"
            )
        if self._vision is not None:
            notes.append(f"the vision tower is that of {self.folder}, unchanged")
        if self._lacks_mtp:
            notes.append("the configuration has MTP layers, the checkpoint does not")
        return tuple(notes)

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        if self._vision is not None and key not in self._assembled:
            return self._vision.slab(key, start, stop, out)
        info, lines = self.tensors[key], self._assembled[key].row_lines
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        buffer = np.empty(nbytes_of(info.dtype, shape), dtype=np.uint8) if out is None else out
        flat = buffer.reshape(-1).view(np.uint8)
        self._read_lines(key, start * lines, flat)
        rows = torch.from_numpy(flat).view(info.torch_dtype).reshape(shape)
        if self._assembled[key].is_transposed:
            experts, width, height = shape
            rows.copy_(rows.view(experts, height, width).mT.clone())
        return rows

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        if self._vision is not None and key not in self._assembled:
            self._vision.read_bytes(key, start, out)
            return

        if self._assembled[key].is_transposed:
            super().read_bytes(key, start, out)
            return

        def read_lines(first: int, last: int, lines: Bytes) -> None:
            self._read_lines(key, first, lines)

        read_rounded(read_lines, self._assembled[key].line_bytes, start, out)

    def side_files(self) -> SideFiles:
        return self._side_files

    def close(self) -> None:
        if self._vision is not None:
            self._vision.close()
        if self._temporary is not None:
            self._temporary.remove()

    def check_placed(self, unplaced: Sequence[str], architecture: str) -> None:
        """Raise `ModelError` if there are any: the model must have each name that rules make."""
        if unplaced:
            stored = self._assembled[unplaced[0]].ranges[0].parameter.stored
            more = f" ({len(unplaced)} tensors)" if len(unplaced) > 1 else ""
            raise ModelError(
                f"{unplaced[0]}: made of {stored}, but {architecture} has no place for it{more}. "
                f"{WRONG_CONFIG}"
            )

    def _own_folder(self, name: str) -> Path:
        """Make a temporary folder for the configuration and what belongs to it."""
        self._temporary = TemporaryFolder()
        folder = self._temporary.path / (name or "model")
        folder.mkdir()
        return folder

    def _present(self, parameters: list[Parameter], arguments: Arguments, where: Path) -> None:
        """Present a model's parameters as Hugging Face tensors, as if they lay in `where`."""
        file = self.config_file
        book = rules_for(self.config.get("model_type"))
        sizes = Sizes.of(self.config, file)
        arguments.check(book, sizes, self.config, file)
        mtp_layers = _check_counts(parameters, sizes, file, where.name)
        self._lacks_mtp = bool(sizes.mtp_layers) and not mtp_layers
        tensors = list(assemble(parameters, book, replace(sizes, mtp_layers=mtp_layers)))
        self._assembled = {tensor.name: tensor for tensor in tensors}
        # The output must not depend on how the model was sharded, and be the same as from a
        # checkpoint that `convert` wrote: the order is that of a single safetensors file.
        named = [(x.name, x.dtype, x.shape) for x in tensors]
        named += self._vision_tensors(book)
        in_order = sorted(named, key=lambda tensor: (-BITS[tensor[1]], tensor[0]))
        self.tensors = lay_out(in_order, where)

    def _vision_tensors(self, book: RuleBook) -> list[tuple[str, str, tuple[int, ...]]]:
        """The tensors of the vision tower, if the Hugging Face folder must supply them."""
        if not book.vision or any(name.startswith(book.vision) for name in self._assembled):
            return []
        if any(self.folder.glob("*.safetensors")):
            self._vision = open_source(self.folder)
            infos = self._vision.tensors.values()
            named = [(x.key, x.dtype, x.shape) for x in infos if x.key.startswith(book.vision)]
            if named:
                return named
        raise SourceError(
            f"{self.folder}: the checkpoint is of the language model alone, and no weights of a "
            f"vision tower ({book.vision}…) lie here. Put the published model's shards here, or "
            "give its folder: `hf_config`."
        )

    def _ranges(self, key: str, start: int, stop: int) -> Iterator[Range]:
        """The rows of parameters that make up rows `start:stop` of a tensor."""
        if key not in self._assembled:
            return iter(())
        tensor = self._assembled[key]
        return tensor.within(start * tensor.row_lines, stop * tensor.row_lines)

    def _read_lines(self, key: str, first: int, out: Bytes) -> None:
        """Fill `out` with the lines of a tensor from `first` on."""
        tensor = self._assembled[key]
        if not len(out):
            return
        for rows in tensor.within(first, first + len(out) // tensor.line_bytes):
            start = (rows.line - first) * tensor.line_bytes
            stop = start + (rows.stop - rows.start) * tensor.line_bytes
            self.read_box(rows.parameter.stored, rows.box, out[start:stop])
        if tensor.plus_one:
            values = torch.from_numpy(out).view(self.tensors[key].torch_dtype)
            values.copy_(values.to(torch.float64) + 1.0)


def _check_counts(parameters: Iterable[Parameter], sizes: Sizes, file: Path, where: str) -> int:
    """Check head, layers and experts against the configuration; the number of MTP layers.

    Missing experts are found later, when the tensors that they belong to lack a part.
    """
    layers: set[int] = set()
    mtp_layers: set[int] = set()
    for parameter in parameters:
        for pattern, numbers in ((LAYER, layers), (MTP_LAYER, mtp_layers)):
            if match := pattern.match(parameter.name):
                numbers.add(int(match[1]))
        if sizes.is_tied and parameter.name.endswith("output_layer.weight"):
            raise SourceError(
                f"{parameter.stored}: the checkpoint has a head of its own, {file} says "
                f"tie_word_embeddings. {WRONG_CONFIG}"
            )
        expert = EXPERT.match(parameter.name)
        if expert is not None and int(expert[1]) >= sizes.experts:
            raise SourceError(
                f"{parameter.stored}: has an expert {expert[1]}, {file} says {sizes.experts} "
                f"experts. {WRONG_CONFIG}"
            )
    if len(layers) != sizes.layers or max(layers) >= sizes.layers:
        raise SourceError(
            f"{where}: has decoder layers {_listed(layers)}, {file} says num_hidden_layers "
            f"{sizes.layers}. {WRONG_CONFIG}"
        )
    if mtp_layers != set(range(len(mtp_layers))):
        raise SourceError(f"{where}: has MTP layers {_listed(mtp_layers)}, but not those before.")
    return len(mtp_layers)


def _listed(numbers: set[int]) -> str:
    text = ", ".join(map(str, sorted(numbers)))
    short = len(text) <= SHOWN_LENGTH
    return text if short else f"{text[:SHOWN_LENGTH]}… ({len(numbers)} layers)"
