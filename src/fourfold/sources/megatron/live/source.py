"""A Megatron model that is live in memory as a `Source`: Hugging Face names and lazy tensors.

    modules ─▶ parameters of the whole model ─▶ rules of the family ─▶ Hugging Face tensors

The rules are those of checkpoints, and so is all that comes after: each rank of a job sees the
whole model, reads what its shards are made of out of its own memory, and the rest from the others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fourfold.distributed.ranks import Ranks, joining, of_process_group
from fourfold.errors import UsageError
from fourfold.sources.megatron.arguments import Arguments
from fourfold.sources.megatron.live.exchange import Exchange
from fourfold.sources.megatron.live.modules import (
    arguments_of,
    chunks_of,
    is_megatron,
    local_parameters,
)
from fourfold.sources.megatron.live.shared import SharedTensors, nearest
from fourfold.sources.megatron.tensors import MegatronTensors, box_of
from fourfold.sources.safetensors import find_side_files
from fourfold.storage.fingerprints import Stamps
from fourfold.storage.names import CONFIG
from fourfold.storage.source import Slab

NO_FILE = Path("the live model")
"""Stands for a tensor's file where there is none."""


class LiveMegatron(MegatronTensors):
    """A Megatron model, the parts of it on all ranks. Safe for many threads."""

    def __init__(self, model: Any, hf_config: Any, *, tokenizer: Any = None) -> None:
        """model: a GPTModel, what DDP or Float16Module made of it, or a list of its chunks.

        hf_config: the folder of the Hugging Face configuration and tokenizer, or a configuration.
        tokenizer: anything with `save_pretrained`; its files then lie beside the weights.
        All ranks that have a part of the model make it together; see `close`, too. Raises
        `SourceError` and `UsageError` where anything does not fit; copies no weight.
        """
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._exchange = Exchange()
        try:
            locals_, arguments = self._found(model, hf_config, tokenizer)
        except Exception as error:
            self._exchange.agree(None, error)
            raise
        self._exchange.agree(None)
        try:
            self._reader = self._shared = SharedTensors(self._exchange, locals_)
            self._take([*self._shared.parameters.values()], *self._fit(arguments), NO_FILE)
        except BaseException:
            self.close()
            raise

    @property
    def notes(self) -> tuple[str, ...]:
        ranks = self._exchange.size
        where = "the live model" + (f" on {ranks} ranks" if ranks > 1 else "")
        return (f"weights come from {where}, config.json from {self.folder}", *super().notes)

    @classmethod
    def job_ranks(cls) -> AbstractContextManager[Ranks]:
        """Join the ranks of torch.distributed's process group, which hold the model together."""
        return joining(of_process_group())

    @property
    def ranks_per_layer(self) -> int:
        return self._shared.spread

    def rank_affinity(self, slabs: Iterable[Slab]) -> list[int]:
        owned = (
            each
            for key, start, stop in slabs
            for found in self._within(key, start, stop)
            for each in self._shared.owned(found.parameter.stored, box_of(found))
        )
        return nearest(owned, self._exchange.size)

    def stamps(self) -> None:
        """None: the weights are no files."""

    def check_unchanged(self) -> None:
        """The files beside the weights; the model's owner keeps the model as it is."""
        self._beside.check()

    def close(self) -> None:
        """Leave the other ranks, which do the same: no rank may need anything any more."""
        self._exchange.close()
        if self._own is not None:
            self._own.cleanup()

    def _found(self, model: Any, hf_config: Any, tokenizer: Any) -> tuple[list[Any], Arguments]:
        """This rank's parameters, and the configurations."""
        if not is_megatron(model):
            raise UsageError(f"{type(model).__name__}: is no Megatron model, nor a list of chunks.")
        super().__init__(self._folder_of(hf_config, tokenizer))
        chunks = chunks_of(model)
        return list(local_parameters(chunks)), Arguments(NO_FILE, arguments_of(chunks))

    def _folder_of(self, hf_config: Any, tokenizer: Any) -> Path:
        """The folder that was given, or a temporary one with what was given."""
        is_folder = isinstance(hf_config, str | Path)
        if is_folder and not Path(hf_config).expanduser().is_dir():
            raise UsageError(f"hf_config {hf_config}: no such folder. Give one with {CONFIG}.")
        if not is_folder and not hasattr(hf_config, "to_json_file"):
            raise UsageError(
                f"hf_config: {type(hf_config).__name__} is no folder, and no configuration of "
                "transformers. Give AutoConfig.from_pretrained(…), or a folder."
            )
        if is_folder and tokenizer is None:
            return Path(hf_config).expanduser()
        self._own = tempfile.TemporaryDirectory(prefix="fourfold-live-")
        name = Path(hf_config).name if is_folder else str(hf_config.model_type)
        folder = Path(self._own.name) / (name or "model")
        folder.mkdir()
        if is_folder:
            self._copy_beside(Path(hf_config).expanduser(), folder)
        else:
            hf_config.to_json_file(folder / CONFIG, use_diff=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    def _copy_beside(self, origin: Path, folder: Path) -> None:
        for path in (*find_side_files(origin, frozenset(), Stamps())[0], Path(CONFIG)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin / path, folder / path)
