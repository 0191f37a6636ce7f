"""A transformers model that is live in memory, seen as a checkpoint: a `Source`.

Names, shapes, dtypes and order are those of the checkpoint that the model came from
(`model.name_or_path`), where that still lies on the disk and builds the same model; the values
are the model's own. Tensors that transformers does not load (MTP layers) are copied from there.
So is config.json, which must say of the model what its own configuration says.

Without such a checkpoint, names and shapes are what transformers' reversed conversion makes of
the model, corrected by what is known of published checkpoints (`upstream`), dtypes are those of
the parameters, and config.json is written anew.

A model may be spread over devices, offloaded to disk by accelerate, or sharded by FSDP2: its
ranks call `hold` together for one unit after the other (see `live_values`).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourfold.distributed.process_groups import agreeing
from fourfold.distributed.ranks import Alone, Ranks
from fourfold.errors import FourfoldError, ModelError, SourceError, UsageError
from fourfold.models.live_internals import blueprint_of, raw_tensors, saved_config
from fourfold.models.module_tree import ModuleTree, build_tree, describe
from fourfold.models.names import natural
from fourfold.sources.live.unloading import Unloading
from fourfold.sources.live.upstream import upstream_of
from fourfold.sources.live.values import LiveValues
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import CONFIG, OWN_FILES
from fourfold.storage.safetensors_header import DTYPE_NAMES, TensorInfo
from fourfold.storage.source import Bytes, Source

NO_FILE = Path("the live model")
"""Stands for a tensor's file where there is none."""

GENERATION_CONFIG = "generation_config.json"

HOW_IT_RUNS = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
)
"""Fields that say how a model was loaded; config.json has its own."""

BESIDE_THE_WEIGHTS = re.compile(
    r"((bos|eos|pad|sep|cls|decoder_start)_token_id|use_cache|return_dict"
    r"|output_(attentions|hidden_states|router_logits)"
    r"|(\w+_)?(dropout|dropout_prob|pdrop|aux_loss_coef|jitter_noise)|initializer_range)"
)
"""Fields for training and for generation, that say nothing of what the weights compute."""

SHOWN_FIELDS = 4
SHOWN_LENGTH = 60
"""How much of two configurations that differ a message shows: fields, characters of a value."""


class LiveSource(Source):
    """A live model as a `Source`. Safe for many threads, but `hold` and `release`."""

    def __init__(
        self,
        model: Any,
        *,
        checkpoint: str | Path | None = None,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        """`checkpoint`: the folder that the model came from; by default, `model.name_or_path`.

        checkpoint: "" for none: names and config.json are made from the model alone.
        tokenizer: anything with `save_pretrained`; its files then lie beside the weights.
        Raises `UsageError` for what is no model of transformers, `SourceError` for one that is
        quantized, wrapped, not that of `checkpoint`, or configured otherwise than config.json
        there says, `ModelError` where its tensors cannot be named.
        All ranks that share a sharded model make it together.
        """
        _check_model(model)
        blueprint = blueprint_of(model)
        _check_same(model, blueprint)
        self._model, self.trust_remote_code = model, trust_remote_code
        self._tree = describe(blueprint)
        origin = _origin_of(model, self._tree, checkpoint, trust_remote_code)
        self._checkpoint = origin.source
        self._values = LiveValues(model)
        self._unloading = origin.unloading or _from_model(model, blueprint, self._tree)
        self._copied = dict.fromkeys(self._unloading.unplaced, origin.source)
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._name = _name_of(origin.folder) or self._tree.architecture
        self.tensors = self._unloading.infos
        if origin.source is not None and origin.unloading is not None:
            self.config = origin.source.config
            self.folder = origin.source.folder
        else:
            self.config = saved_config(model)
            self.folder = self._own_folder()
            if model.can_generate():
                text = model.generation_config.to_json_string()
                (self.folder / GENERATION_CONFIG).write_text(text)
        if tokenizer is not None:
            self.folder = self._own_folder()
            tokenizer.save_pretrained(self.folder)
        if self._own is not None:
            (self.folder / CONFIG).write_text(json.dumps(dict(self.config), indent=2) + "\n")
        folders = (self.folder, *([] if origin.folder is None else [origin.folder]))
        self._origin_folders = tuple(dict.fromkeys(folders))
        self._notes = tuple(self._describe_origin(origin))

    @property
    def origin_folders(self) -> tuple[Path, ...]:
        return self._origin_folders

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    @classmethod
    def job_ranks(cls) -> AbstractContextManager[Ranks]:
        """One rank: those that share a sharded model meet in `hold` and `gather`."""
        return nullcontext(Alone())

    @property
    def model(self) -> Any:
        return self._model

    @property
    def module_tree(self) -> ModuleTree:
        """The model's module tree; its parameters are on the meta device."""
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

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        copied = self._copied.get(key)
        if copied is not None:
            copied.read_bytes(key, start, out)
        else:
            super().read_bytes(key, start, out)

    def will_need(self, key: str, start: int, stop: int) -> None:
        copied = self._copied.get(key)
        if copied is not None:
            copied.will_need(key, start, stop)

    def side_files(self) -> tuple[list[Path], list[Path]]:
        if self._own is None and self._checkpoint is not None:
            return self._checkpoint.side_files()
        beside = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder) for path in beside]
        return [name for name in names if str(name) not in OWN_FILES], []

    def stamps(self) -> None:
        """None: the weights are no files."""

    def check_unchanged(self) -> None:
        """Nothing to check: the model's owner keeps it as it is."""

    def close(self) -> None:
        self.release()
        if self._checkpoint is not None:
            self._checkpoint.close()
        if self._own is not None:
            self._own.cleanup()

    def _own_folder(self) -> Path:
        """A temporary folder, with the files that lie beside the checkpoint's weights."""
        if self._own is None:
            self._own = tempfile.TemporaryDirectory(prefix="fourfold-live-")
            (Path(self._own.name) / self._name).mkdir()
            if self._checkpoint is not None:
                for path in self._checkpoint.side_files()[0]:
                    copy = Path(self._own.name) / self._name / path
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self._checkpoint.folder / path, copy)
        return Path(self._own.name) / self._name

    def _describe_origin(self, origin: _Origin) -> Iterable[str]:
        if origin.why_not is not None:
            yield f"names and config.json are made from the model in memory: {origin.why_not}"
        if origin.unlike is not None:
            yield f"config.json is that of {origin.folder}: {origin.unlike}"
        if self._copied and self._checkpoint is not None:
            yield (
                f"{len(self._copied)} tensors that the live model does not have (MTP layers?) are "
                f"copied from {self._checkpoint.folder}: {min(self._copied, key=natural)}, …"
            )


@dataclass(frozen=True)
class _Origin:
    """The checkpoint that a model came from; `unloading` where its headers fit the model."""

    folder: Path | None = None
    source: Source | None = None
    unloading: Unloading | None = None
    why_not: str | None = None
    unlike: str | None = None
    """What the model's configuration says otherwise, of no matter for the weights."""


def _check_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__}: is no model of transformers. Give the PreTrainedModel "
            "itself: merge adapters, unwrap what DDP or torch.compile made of it."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise SourceError(
            f"{type(model).__name__}: is quantized in memory. "
            "Load it in BF16, FP16 or FP32 (dequantize=True, where its format has that)."
        )


def _check_same(model: Any, blueprint: Any) -> None:
    """The live model has the tensors that its configuration says, and no others."""
    found = {name: list(value.shape) for name, value in model.state_dict().items()}
    wanted = {name: list(value.shape) for name, value in blueprint.state_dict().items()}
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise SourceError(
                f"{name}: {found.get(name, 'missing')} in the live model, "
                f"{wanted.get(name, 'missing')} by its configuration. Merge adapters; shard with "
                "FSDP2 (fully_shard), not with FSDP1 or ZeRO-3."
            )


def _origin_of(
    model: Any, tree: ModuleTree, given: str | Path | None, trust_remote_code: bool
) -> _Origin:
    name = str(getattr(model, "name_or_path", None) or "" if given is None else given)
    folder = _folder_of(name, getattr(model.config, "_commit_hash", None))
    if folder is None:
        origin = _Origin(why_not=f"{name or 'its checkpoint'} is not on this disk")
    else:
        origin = _fitting(folder, tree, trust_remote_code)
    if given and origin.unloading is None:
        raise SourceError(f"{given}: is not the live model's checkpoint: {origin.why_not}")
    return origin


def _name_of(folder: Path | None) -> str:
    """What a folder is called, also where it is given as `.`; empty for none, and for the root."""
    return "" if folder is None else os.path.basename(os.path.abspath(folder))


def _folder_of(name: str, commit: str | None) -> Path | None:
    """The folder of a checkpoint, or the snapshot that the hub's cache has of it."""
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CONFIG, revision=commit)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _fitting(folder: Path, tree: ModuleTree, trust_remote_code: bool) -> _Origin:
    """The checkpoint in `folder`, if it builds the same model and its tensors fit."""
    try:
        source = open_source(folder)
    except FourfoldError as error:
        return _Origin(folder, why_not=str(error))
    try:
        theirs = build_tree(folder, trust_remote_code=trust_remote_code)
    except ModelError as error:
        return _Origin(folder, source, why_not=str(error))
    if theirs.architecture != tree.architecture or theirs.parameters != tree.parameters:
        why_not = f"{folder / CONFIG} builds another {theirs.architecture}"
        return _Origin(folder, source, why_not=why_not)
    unloading = Unloading(tree, source.tensors)
    misfit = unloading.misfit()
    if misfit is not None:
        return _Origin(folder, source, why_not=f"in {folder}, {misfit}")
    return _Origin(folder, source, unloading, unlike=_check_config(tree, theirs, folder))


def _check_config(tree: ModuleTree, theirs: ModuleTree, folder: Path) -> str | None:
    """The folder's config.json is the live model's own, but for fields that do not matter much.

    Returns these, with both values. Tensors may fit where the weights mean something else (how
    many experts a token has, rotary scaling): then it raises `SourceError`.
    """
    mine, written = (_fields(each.conversion.model.config) for each in (tree, theirs))
    unlike = {
        name: f"{name} is {_shown(written.get(name))} there, {_shown(mine.get(name))} in the model"
        for name in sorted({*written, *mine})
        if mine.get(name) != written.get(name) and name.rpartition(".")[2] not in HOW_IT_RUNS
    }
    matter = [
        text
        for name, text in unlike.items()
        if not BESIDE_THE_WEIGHTS.fullmatch(name.rpartition(".")[2])
    ]
    if matter:
        raise SourceError(
            f"{folder / CONFIG}: is not the live model's configuration: {_some(matter)}. "
            'Make both the same, or set model.name_or_path = "" before: names and config.json are '
            "then made from the model alone."
        )
    return _some(list(unlike.values())) if unlike else None


def _fields(config: Any) -> dict[str, object]:
    """A configuration's values by dotted names, those of nested ones, too; in JSON's types."""
    text = json.dumps(config.to_dict(), default=str)
    return dict(_flat(json.loads(text, parse_constant=str), ""))


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for name, each in value.items():
        if isinstance(each, dict):
            yield from _flat(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", each


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"


def _some(texts: list[str]) -> str:
    """The first few, and how many there are."""
    more = f" ({len(texts)} such)" if len(texts) > SHOWN_FIELDS else ""
    return "; ".join(texts[:SHOWN_FIELDS]) + more


def _from_model(model: Any, blueprint: Any, tree: ModuleTree) -> Unloading:
    """Raw tensors made from the model alone."""
    upstream, misfit = upstream_of(*tree.model_types), None
    for tensors in raw_tensors(model, blueprint, fused=upstream.fused):
        named: dict[str, TensorInfo] = {}
        for name, tensor in tensors.items():
            key, shape = name, tuple(tensor.shape)
            for pattern, replacement in upstream.renames:
                key = re.sub(pattern, replacement, key)
            if upstream.transposed is not None and re.search(upstream.transposed, key):
                shape = (*shape[:-2], shape[-1], shape[-2])
            size = math.prod(shape) * tensor.element_size()
            named[key] = TensorInfo(key, DTYPE_NAMES[tensor.dtype], shape, NO_FILE, 0, size)
        unloading = Unloading(tree, _laid_out(named))
        misfit = unloading.misfit()
        if misfit is None and not unloading.unplaced:
            return unloading
        misfit = misfit or f"{unloading.unplaced[0]} has no place in the model"
    raise ModelError(
        f"{tree.architecture}: what its tensors are called on disk is not known ({misfit}). "
        "Give the folder that it was loaded from as checkpoint."
    )


def _laid_out(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors in the order of their names, each with a place of its own."""
    found, at = {}, 0
    for key in sorted(infos, key=natural):
        info = infos[key]
        found[key] = TensorInfo(key, info.dtype, info.shape, info.file, at, at + info.nbytes)
        at += info.nbytes
    return found


def _exactly(value: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    """`value` in the dtype that it has on disk; `SourceError` where that would round it."""
    wanted = info.torch_dtype
    if value.dtype == wanted:
        return value
    cast = value.to(wanted)
    back = cast.to(value.dtype)
    if not bool(((back == value) | (back.isnan() & value.isnan())).all()):
        raise SourceError(
            f"{info.key}: {value.dtype} in memory, {info.dtype} in the model's checkpoint, which "
            f"would round it. Convert the model first: model.to({wanted})."
        )
    return cast
