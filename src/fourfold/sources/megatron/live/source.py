# SPDX-License-Identifier: Apache-2.0
"""A Megatron model in memory as a `Source`: Hugging Face names and lazy tensors.

    modules ─▶ parameters of the whole model ─▶ rules of the family ─▶ Hugging Face tensors

Rules, names and everything after them are those of checkpoints. Each rank of a job sees the whole
model: it reads what it needs from its own memory, and the rest from the other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fourfold.distributed.process_groups import agreeing
from fourfold.distributed.ranks import Ranks, joining, of_process_group
from fourfold.errors import UsageError
from fourfold.sources.megatron.arguments import Arguments
from fourfold.sources.megatron.base import MegatronSource
from fourfold.sources.megatron.box_index import Box
from fourfold.sources.megatron.live.exchange import Exchange
from fourfold.sources.megatron.live.modules import (
    arguments_of,
    chunks_of,
    is_megatron,
    local_parameters,
)
from fourfold.sources.megatron.live.shards import SharedTensors
from fourfold.sources.megatron.parameters import is_quantizer_state
from fourfold.sources.safetensors import IN_MEMORY, copy_files
from fourfold.storage.fingerprints import Stamps
from fourfold.storage.names import CONFIG
from fourfold.storage.side_files import find_side_files
from fourfold.storage.source import Bytes, Slab


class LiveMegatron(MegatronSource):
    """A Megatron model in memory, on one or many ranks. Safe for many threads."""

    def __init__(self, model: Any, hf_config: Any, *, tokenizer: Any = None) -> None:
        """Meet the other ranks, which must all do so; no weight is copied. See `close`, too.

        Args:
            model: A GPTModel, also inside of DDP or Float16Module, or a list of its chunks.
            hf_config: The folder of the Hugging Face configuration and tokenizer, or a
                configuration of transformers.
            tokenizer: An object with `save_pretrained`, the files of which belong to the model.

        Raises:
            SourceError: The model cannot be read, or is not that of the configuration.
            UsageError: An argument is of the wrong kind.
        """
        self._exchange = Exchange()
        try:
            with agreeing(self._exchange.ranks.gather):
                if not is_megatron(model):
                    raise UsageError(
                        f"{type(model).__name__}: not a Megatron model, nor a list of its chunks."
                    )
                super().__init__(self._folder_of(hf_config, tokenizer))
                chunks = chunks_of(model)
                local = list(local_parameters(chunks))
            buffers = (name for chunk in chunks for name, _ in chunk.named_buffers())
            self._has_quantizers = any(map(is_quantizer_state, buffers))
            self._shared = SharedTensors(self._exchange, local)
            arguments = Arguments(IN_MEMORY, arguments_of(chunks[0]))
            self._present([*self._shared.parameters.values()], arguments, IN_MEMORY)
        except BaseException:
            self.close()
            raise

    def read_box(self, key: str, box: Box, out: Bytes) -> None:
        self._shared.read(key, box, out)

    @property
    def notes(self) -> tuple[str, ...]:
        ranks = self._exchange.ranks.size
        where = "the live model" + (f" on {ranks} ranks" if ranks > 1 else "")
        notes = [f"weights come from {where}, config.json from {self.folder}"]
        if self._has_quantizers:
            notes.append(
                "the state of ModelOpt's quantizers is left out: the recipe chooses all scales anew"
            )
        return (*notes, *super().notes)

    @classmethod
    def job_ranks(cls) -> AbstractContextManager[Ranks]:
        """Join the ranks of torch.distributed's process group, which hold the model together."""
        return joining(of_process_group())

    @property
    def ranks_per_layer(self) -> int:
        return self._shared.ranks_per_layer

    def rank_affinity(self, slabs: Iterable[Slab]) -> list[int]:
        return self._shared.bytes_by_rank(
            (rows.parameter.stored, rows.box)
            for key, start, stop in slabs
            for rows in self._ranges(key, start, stop)
        )

    def stamps(self) -> None:
        """Return None: the weights are not files."""

    def check_unchanged(self) -> None:
        """Check the files beside the weights; the model's owner keeps the model as it is."""
        self._beside.check()

    def close(self) -> None:
        """Part from the other ranks, which must do the same: none may still need a weight."""
        self._exchange.close()
        super().close()

    def _folder_of(self, hf_config: Any, tokenizer: Any) -> Path:
        """Return the folder `hf_config`, or a temporary one with configuration and tokenizer."""
        if isinstance(hf_config, str | Path):
            config_folder = Path(hf_config).expanduser()
            if not config_folder.is_dir():
                raise UsageError(f"hf_config {hf_config}: no such folder. Give one with {CONFIG}.")
            if tokenizer is None:
                return config_folder
            folder = self._own_folder(config_folder.name)
            names = find_side_files(config_folder, frozenset(), Stamps()).copied
            copy_files(config_folder, [Path(CONFIG), *names], folder)
        elif hasattr(hf_config, "to_json_file"):
            folder = self._own_folder(hf_config.model_type)
            hf_config.to_json_file(folder / CONFIG, use_diff=False)
        else:
            raise UsageError(
                f"hf_config: {type(hf_config).__name__} is neither a folder nor a configuration of "
                "transformers. Give AutoConfig.from_pretrained(…), or a folder."
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder
