# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that a model in memory was loaded from, and whether it still describes it.

The checkpoint is used for names, shapes, dtypes and config.json if it builds the same modules and
its tensors become the model's parameters. Its config.json must then say what the model's own
configuration says: tensors of the same shapes mean something else with other experts per token or
another rotary scaling.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import FourfoldError, ModelError, SourceError
from fourfold.models.module_tree import ModuleTree, build_tree
from fourfold.models.published import published_names
from fourfold.sources.live.unloading import Unloading
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import CONFIG
from fourfold.storage.source import Source

LOADING_FIELDS = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
)
"""Fields that say how a model was loaded; they are not compared."""

HARMLESS_FIELDS = re.compile(
    r"((bos|eos|pad|sep|cls|decoder_start)_token_id|use_cache|return_dict"
    r"|output_(attentions|hidden_states|router_logits)"
    r"|(\w+_)?(dropout|dropout_prob|pdrop|aux_loss_coef|jitter_noise)|initializer_range)"
)
"""Fields for training and generation, which do not change what the weights compute."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model came from."""

    folder: Path | None = None
    source: Source | None = None
    """The checkpoint, if it can be opened."""
    unloading: Unloading | None = None
    """The map by which its tensors are read out of the model; None if it does not fit the model."""
    why_not: str | None = None
    """Why it is not used."""
    differences: str | None = None
    """Fields of its config.json, harmless ones, that the model's configuration contradicts."""

    @property
    def name(self) -> str:
        """The folder's name, also if it was given as `.`; empty if there is none."""
        return "" if self.folder is None else os.path.basename(os.path.abspath(self.folder))


def find_origin(
    model: Any, tree: ModuleTree, checkpoint: str | Path | None, *, trust_remote_code: bool
) -> Origin:
    """Find the checkpoint that `model` came from, and compare it with the model.

    `checkpoint` is a folder or hub name; None stands for `model.name_or_path`, "" for none.

    Raises:
        SourceError: `checkpoint` is not the model's, or config.json describes another model.
    """
    name = str(model.name_or_path or "" if checkpoint is None else checkpoint)
    folder = _local_folder(name, getattr(model.config, "_commit_hash", None))
    if folder is None:
        origin = Origin(why_not=f"{name or 'its checkpoint'} is not on this disk")
    else:
        origin = _compare(folder, tree, trust_remote_code)
    if checkpoint and origin.unloading is None:
        raise SourceError(f"{checkpoint}: is not the live model's checkpoint: {origin.why_not}")
    return origin


def _local_folder(name: str, commit: str | None) -> Path | None:
    """The folder of that name, or the hub's snapshot in the local cache."""
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, CONFIG, revision=commit)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _compare(folder: Path, tree: ModuleTree, trust_remote_code: bool) -> Origin:
    try:
        source = open_source(folder)
    except FourfoldError as error:
        return Origin(folder, why_not=str(error))
    try:
        described = build_tree(folder, trust_remote_code=trust_remote_code)
    except ModelError as error:
        return Origin(folder, source, why_not=str(error))
    if (described.architecture, described.parameters) != (tree.architecture, tree.parameters):
        why_not = f"{folder / CONFIG} builds another {described.architecture}"
        return Origin(folder, source, why_not=why_not)
    if names := published_names(described, source.tensors):
        source.rename(names)
    unloading = Unloading(tree, source.tensors)
    misfit = unloading.misfit()
    if misfit is not None:
        return Origin(folder, source, why_not=f"in {folder}, {misfit}")
    return Origin(folder, source, unloading, differences=_differences(tree, described, folder))


def _differences(tree: ModuleTree, described: ModuleTree, folder: Path) -> str | None:
    """The harmless fields that differ, with both values; `SourceError` if others differ."""
    own, written = (_fields(x.conversion.model.config) for x in (tree, described))
    names = [
        name
        for name in sorted({*written, *own})
        if own.get(name) != written.get(name) and _last(name) not in LOADING_FIELDS
    ]
    texts = {
        name: f"{name} is {_json(written.get(name))} there, {_json(own.get(name))} in the model"
        for name in names
    }
    harmful = [texts[name] for name in names if not HARMLESS_FIELDS.fullmatch(_last(name))]
    if harmful:
        raise SourceError(
            f"{folder / CONFIG}: is not the live model's configuration: {_first_few(harmful)}. "
            'Make both the same, or set model.name_or_path = "" before: names and config.json are '
            "then made from the model alone."
        )
    return _first_few(list(texts.values())) if texts else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _fields(config: Any) -> dict[str, object]:
    """A configuration's values in JSON's types; fields of nested ones by dotted names."""
    text = json.dumps(config.to_dict(), default=str)
    return dict(_flat(json.loads(text, parse_constant=str), ""))


def _flat(fields: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _json(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _first_few(texts: Sequence[str]) -> str:
    return "; ".join(texts[:4]) + (f" (and {len(texts) - 4} more)" if len(texts) > 4 else "")
