# SPDX-License-Identifier: Apache-2.0
"""Writing a family's tiny checkpoint, and reading it back to prove that it is one."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .layouts import Tensors
from .table import Family
from .truth import (
    Truth,
    experts_of,
    flatten,
    linears_of,
    randomize,
    stacked,
    stacked_parameters,
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines, progress bars or warnings from transformers' own code."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def build_model(
    family: Family, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> PreTrainedModel:
    """The family's tiny model in memory, every parameter random."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls = getattr(transformers, family.model_class)
        model = cls._from_config(family.build_config(), dtype=dtype).eval()
    randomize(model, seed)
    return _widen(model, dtype)


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Keep in float32 what `from_pretrained` keeps there (some routers, their biases)."""
    keep = [part for part, to in model._get_dtype_plan(dtype).items() if to == torch.float32]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(part in name for part in keep):
            tensor.data = tensor.data.float()
    return model


def write_checkpoint(
    family: Family,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
) -> Truth:
    """Write the family's checkpoint into `folder`, and return what it holds."""
    if family.why_not:
        raise ValueError(f"{family.name} cannot be built: {family.why_not}")
    model = build_model(family, dtype=dtype, seed=seed)
    experts = experts_of(model)
    known = to_disk(model, family)
    extra = family.extra(known, model.config, seed) if family.extra else {}
    raw = {key: t.detach().clone().contiguous() for key, t in {**known, **extra}.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(raw, folder, shards)
    _write_config(model, family, folder, dtype)
    state = {k: t.detach() for k, t in model.state_dict().items()}
    return Truth(flatten(experts), linears_of(model), raw, frozenset(extra), state)


def to_disk(model: PreTrainedModel, family: Family) -> Tensors:
    """The model's tensors under the names, and in the layout, of the published checkpoint."""
    tensors = _untied(model)
    if family.experts.write is not None:
        for path, matrices in experts_of(model).items():
            how = stacked(model.get_submodule(path))
            if how is not None:
                for name in stacked_parameters(how):
                    del tensors[f"{path}.{name}"]
                tensors.update(family.experts.write(path, matrices))
    for edit in family.edits:
        tensors = edit(tensors)
    return tensors


def _untied(model: PreTrainedModel) -> Tensors:
    tied = set(model.all_tied_weights_keys)
    return {k: t.detach() for k, t in model.state_dict().items() if k not in tied}


def _write_shards(raw: dict[str, Tensor], folder: Path, shards: int) -> None:
    if shards == 1:
        save_file(raw, folder / "model.safetensors", metadata={"format": "pt"})
        return
    keys = sorted(raw)
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[index * len(keys) // shards : (index + 1) * len(keys) // shards]
        save_file({k: raw[k] for k in part}, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    total = sum(t.numel() * t.element_size() for t in raw.values())
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))


def _write_config(model: PreTrainedModel, family: Family, folder: Path, dtype: torch.dtype) -> None:
    model.config.architectures = [family.model_class] if family.names_architecture else None
    model.config.dtype = dtype
    with quiet():
        model.config.save_pretrained(folder)


def read_back(family: Family, folder: Path, *, dtype: torch.dtype = torch.bfloat16):
    """The model and the loading report that `from_pretrained` gives for the checkpoint."""
    with quiet():
        return getattr(transformers, family.model_class).from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )


def difference(family: Family, folder: Path, truth: Truth, *, dtype: torch.dtype) -> list[str]:
    """What differs between the checkpoint, as transformers reads it, and the truth."""
    model, report = read_back(family, folder, dtype=dtype)
    found = [f"missing {key}" for key in sorted(report["missing_keys"])]
    found += [
        f"unexpected {k}" for k in sorted(report["unexpected_keys"]) if not _is_extra(k, truth)
    ]
    found += [f"mismatched {key}" for key in sorted(map(str, report["mismatched_keys"]))]
    state = model.state_dict()
    found += [f"not the same names: {k}" for k in sorted(state.keys() ^ truth.state.keys())]
    for key in sorted(state.keys() & truth.state.keys()):
        expected = truth.state[key]
        if state[key].dtype != expected.dtype:
            found.append(f"{key} is {state[key].dtype}, was {expected.dtype}")
        elif not torch.equal(state[key], expected):
            found.append(f"{key} has other values")
    return found


def _is_extra(key: str, truth: Truth) -> bool:
    """Whether a key in the loading report, which may name merged experts, is of an extra tensor."""
    module = key.rpartition(".")[0] + "."
    return key in truth.extra or any(raw.startswith(module) for raw in truth.extra)
