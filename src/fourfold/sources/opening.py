# SPDX-License-Identifier: Apache-2.0
"""Open the source that a user names: a folder, a hub name, or a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourfold.distributed.ranks import Ranks
from fourfold.errors import UsageError
from fourfold.sources.decoded import decoded_to_quantize
from fourfold.sources.live.source import LiveSource
from fourfold.sources.megatron import LiveMegatron, MegatronCheckpoint, find_iteration, is_megatron
from fourfold.sources.rounded import RoundedSource, check_dtype
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import CONFIG
from fourfold.storage.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Model = str | Path | Source | torch.nn.Module | Sequence[torch.nn.Module]
"""A checkpoint's folder, a hub name, an open source, a model in memory, or Megatron's chunks."""


@contextmanager
def opened(
    model: Model,
    hf_config: str | Path | PretrainedConfig | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
) -> Iterator[Source]:
    """Open `model` for the duration of a context; see `open_model`.

    With `dtype="bfloat16"`, FP32 tensors of a source on disk are presented in BF16.

    A source that was given open stays open. It is trusted within the context if either it was
    before, or `trust_remote_code` says so.
    """
    check_dtype(dtype)
    if isinstance(model, Source):
        trusted = model.trust_remote_code
        model.trust_remote_code = trusted or trust_remote_code
        try:
            yield model if dtype is None else RoundedSource(model)
        finally:
            model.trust_remote_code = trusted
        return
    if dtype is not None and not isinstance(model, str | Path):
        raise UsageError(
            "`dtype`: only for a checkpoint on disk. Cast the model in memory: "
            "model.to(torch.bfloat16)."
        )
    source = open_model(model, hf_config, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    try:
        yield source if dtype is None else RoundedSource(source)
    finally:
        source.close()


def open_model(
    model: str | Path | torch.nn.Module | Sequence[torch.nn.Module],
    hf_config: str | Path | PretrainedConfig | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open a checkpoint on disk or on the Hugging Face hub, or a model in memory.

    Args:
        model: A folder of Hugging Face's or Megatron's, a hub name, a transformers model, or a
            Megatron model, whose chunks may be a list.
        hf_config: For a Megatron checkpoint, the folder with the Hugging Face configuration and
            tokenizer; None makes a configuration from the checkpoint's own arguments. For a
            Megatron model in memory, that folder or a configuration.
        tokenizer: For a model in memory: an object with `save_pretrained`, whose files are then
            written beside the weights.
        trust_remote_code: True if code that the checkpoint brings may run.

    Raises:
        UsageError: `hf_config` is missing, is not a folder, or is given for another kind of model.
        SourceError: The checkpoint cannot be read.
    """
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise UsageError(f"`tokenizer={tokenizer!r:.60}`: give an object with `save_pretrained`.")
    source: Source
    if isinstance(model, str | Path):
        if not isinstance(hf_config, str | Path | None):
            raise UsageError("hf_config: of a checkpoint's folder, give a folder, too.")
        source = _open_folder(model, hf_config)
    elif is_megatron(model):
        if hf_config is None:
            raise UsageError(
                "model: a Megatron model. Give the folder with its Hugging Face configuration and "
                "tokenizer, too, or the configuration: hf_config=…"
            )
        source = LiveMegatron(model, hf_config, tokenizer=tokenizer)
    elif hf_config is not None:
        raise UsageError("hf_config: only for Megatron's. Leave it out.")
    else:
        return LiveSource(model, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    source.trust_remote_code = trust_remote_code
    return source


def job_ranks(model: Model) -> AbstractContextManager[Ranks]:
    """Join the ranks that share a job on `model`, before it is opened."""
    if isinstance(model, Source):
        return model.job_ranks()
    if is_megatron(model):
        return LiveMegatron.job_ranks()
    return (LiveSource if isinstance(model, torch.nn.Module) else Source).job_ranks()


def _open_folder(model: str | Path, hf_config: str | Path | None) -> Source:
    folder = _local(model)
    is_megatron_folder = folder is not None and find_iteration(folder) is not None
    if hf_config is None:
        if is_megatron_folder and folder is not None and not (folder / CONFIG).is_file():
            return MegatronCheckpoint(folder)
        return decoded_to_quantize(open_source(model))
    if not is_megatron_folder or folder is None:
        raise UsageError(
            f"`hf_config`: only for a Megatron checkpoint (torch_dist), which {model} is not. "
            "Leave it out, or give the folder that Megatron wrote."
        )
    beside = _local(hf_config)
    if beside is None:
        raise UsageError(f"`hf_config={hf_config}`: no such folder. Give one with {CONFIG}.")
    return MegatronCheckpoint(folder, beside)


def _local(name: str | Path) -> Path | None:
    """The folder of that name; None if there is none."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None
