# SPDX-License-Identifier: Apache-2.0
"""A transformers model in memory as a `Source`.

Names, shapes, dtypes and order are those of the checkpoint that the model came from, if that is
still on disk and fits the model (`origin`); values are the model's own. Tensors that transformers
does not load (MTP layers) are copied from the checkpoint, and so is config.json.

Without such a checkpoint, names and shapes are derived from the model (`naming`), dtypes are those
of the parameters, and config.json is generated.

A model may be spread over devices, offloaded to disk by accelerate, or sharded by FSDP2. Ranks that
share a sharded model call `hold` together for one layer after the other (`values`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fourfold.distributed.process_groups import agreeing
from fourfold.distributed.ranks import Ranks
from fourfold.errors import SourceError, UsageError
from fourfold.models.live_internals import blueprint_of, saved_config
from fourfold.models.module_tree import ModuleTree, describe
from fourfold.models.names import natural
from fourfold.sources.live.naming import name_tensors
from fourfold.sources.live.origin import find_origin
from fourfold.sources.live.values import LiveValues
from fourfold.sources.safetensors import copy_files
from fourfold.storage.names import CONFIG, OWN_FILES
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.side_files import SideFiles
from fourfold.storage.source import Bytes, Source

GENERATION_CONFIG = "generation_config.json"


class LiveSource(Source):
    """A transformers model in memory. Safe for many threads, except `hold` and `release`."""

    def __init__(
        self,
        model: Any,
        *,
        checkpoint: str | Path | None = None,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Open a model. All ranks that share a sharded model do so together.

        Args:
            model: A `PreTrainedModel`.
            checkpoint: The folder that the model came from, by default `model.name_or_path`; ""
                derives names and config.json from the model alone.
            tokenizer: An object with `save_pretrained`; its files are written beside the weights.
            trust_remote_code: True if code that the checkpoint brings may run.

        Raises:
            UsageError: `model` is not a transformers model.
            SourceError: It is quantized or wrapped, it is not that of `checkpoint`, or config.json
                there describes another model.
            ModelError: Its tensors cannot be named.
        """
        _check_model(model)
        blueprint = blueprint_of(model)
        _check_same(model, blueprint)
        self._model, self.trust_remote_code = model, trust_remote_code
        self._tree = describe(blueprint)
        origin = find_origin(model, self._tree, checkpoint, trust_remote_code=trust_remote_code)
        self._origin, self._checkpoint = origin, origin.source
        self._values = LiveValues(model)
        self._unloading = origin.unloading or name_tensors(model, blueprint, self._tree)
        self._copied = dict.fromkeys(self._unloading.unplaced, origin.source)
        self.tensors = self._unloading.infos
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if origin.source is not None and origin.unloading is not None:
            self.config, self.folder = origin.source.config, origin.source.folder
            if tokenizer is not None:
                self.folder = self._own_folder()
        else:
            self.config, self.folder = saved_config(model), self._own_folder()
            if model.can_generate():
                text = model.generation_config.to_json_string()
                (self.folder / GENERATION_CONFIG).write_text(text)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder)
        if self._temporary is not None:
            (self.folder / CONFIG).write_text(json.dumps(dict(self.config), indent=2) + "\n")

    @property
    def place(self) -> Path:
        """The checkpoint's folder that the model came from, or else the model's class."""
        return self._origin.folder or Path(type(self._model).__name__)

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.folder, self._origin.folder or self.folder)))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._remarks())

    @classmethod
    def job_ranks(cls) -> AbstractContextManager[Ranks]:
        """One rank: those that share a sharded model meet in `hold` and `gather`."""
        return nullcontext(Ranks())

    @property
    def model(self) -> Any:
        return self._model

    @property
    def module_tree(self) -> ModuleTree:
        """The model's module tree, with parameters on the meta device."""
        return self._tree

    @property
    def is_sharded(self) -> bool:
        return self._values.is_sharded

    @property
    def rank(self) -> int:
        return self._values.ranks.rank

    def gather(self, value: Any) -> list[Any]:
        return self._values.ranks.gather(value)

    def agreeing(self) -> AbstractContextManager[None]:
        return agreeing(self.gather)

    def hold(self, keys: Iterable[str], *, keep: bool = True) -> None:
        """See `Source.hold`. Parameters that are offloaded to disk are read once, here."""
        own = (key for key in keys if key not in self._copied)
        names = (name for key in own for name in self._unloading.parameters(key))
        self._values.hold(names, keep=keep)

    def release(self) -> None:
        self._values.release()

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        copied = self._copied.get(key)
        if copied is not None:
            return copied.slab(key, start, stop, out)
        rows = self._unloading.rows(key, start, stop, self._values.get)
        rows = _exactly(rows, self.tensors[key])
        if out is None:
            return rows.cpu().contiguous()
        return torch.from_numpy(out).view(rows.dtype).reshape(rows.shape).copy_(rows)

    def side_files(self) -> SideFiles:
        if self._temporary is None and self._checkpoint is not None:
            return self._checkpoint.side_files()
        beside = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder) for path in beside]
        return SideFiles(tuple(name for name in names if str(name) not in OWN_FILES))

    def stamps(self) -> None:
        """None: the weights do not lie in files."""

    def check_unchanged(self) -> None:
        """Do nothing: the caller keeps the model as it is."""

    def close(self) -> None:
        self.release()
        if self._checkpoint is not None:
            self._checkpoint.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _own_folder(self) -> Path:
        """Create a temporary folder with the side files of the checkpoint."""
        self._temporary = tempfile.TemporaryDirectory(prefix="fourfold-live-")
        folder = Path(self._temporary.name) / (self._origin.name or self._tree.architecture)
        folder.mkdir()
        if self._checkpoint is not None:
            copy_files(self._checkpoint.folder, self._checkpoint.side_files().copied, folder)
        return folder

    def _remarks(self) -> Iterator[str]:
        origin = self._origin
        if origin.why_not is not None:
            yield f"names and config.json are made from the model in memory: {origin.why_not}"
        if origin.differences is not None:
            yield f"config.json is that of {origin.folder}: {origin.differences}"
        if self._copied and self._checkpoint is not None:
            yield (
                f"{len(self._copied)} tensors that the live model does not have (MTP layers?) are "
                f"copied from {self._checkpoint.folder}: {min(self._copied, key=natural)}, …"
            )


def _check_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__}: is no model of transformers. Give the PreTrainedModel "
            "itself: merge adapters, and unwrap DDP and torch.compile."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise SourceError(
            f"{type(model).__name__}: is quantized in memory. "
            "Load it in BF16, FP16 or FP32 (dequantize=True, where its format has that)."
        )


def _check_same(model: Any, blueprint: Any) -> None:
    """Raise `SourceError` unless the model has the tensors that its configuration describes."""
    present = {name: list(value.shape) for name, value in model.state_dict().items()}
    expected = {name: list(value.shape) for name, value in blueprint.state_dict().items()}
    for name in (*expected, *present):
        if present.get(name) != expected.get(name):
            raise SourceError(
                f"{name}: {present.get(name, 'missing')} in the live model, "
                f"{expected.get(name, 'missing')} by its configuration. Merge adapters; shard with "
                "FSDP2 (fully_shard), not with FSDP1 or ZeRO-3."
            )


def _exactly(value: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """Cast `value` to the dtype that it has on disk; `SourceError` if that would round it."""
    dtype = info.torch_dtype
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    back = cast.to(value.dtype)
    if not bool(((back == value) | (back.isnan() & value.isnan())).all()):
        raise SourceError(
            f"{info.key}: {value.dtype} in memory, {info.dtype} in the model's checkpoint, which "
            f"would round it. Convert the model first: model.to({dtype})."
        )
    return cast
