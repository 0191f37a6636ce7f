"""Which kind of source a name stands for."""

from __future__ import annotations

from pathlib import Path

from fourfold.errors import UsageError
from fourfold.sources.megatron import MegatronFolder, iteration_folder
from fourfold.sources.safetensors import open_source
from fourfold.storage.names import CONFIG
from fourfold.storage.source import Source


def open_model(model: str | Path, hf_config: str | Path | None = None) -> Source:
    """The checkpoint that `model` names: a folder, Hugging Face's or Megatron's, or a hub name.

    hf_config: for Megatron's, the folder with the Hugging Face configuration and tokenizer; None to
    make a configuration of the checkpoint's own arguments.

    Raises `UsageError` where these do not suffice, or it is given for another kind; `SourceError`
    as the sources do.
    """
    folder = _local(model)
    is_megatron = folder is not None and iteration_folder(folder) is not None
    if hf_config is None:
        if is_megatron and folder is not None and not (folder / CONFIG).is_file():
            return MegatronFolder(folder)
        return open_source(model)
    if not is_megatron or folder is None:
        raise UsageError(
            f"--hf-config: only for a Megatron checkpoint (torch_dist), which {model} is not. "
            "Leave it out, or give the folder that Megatron wrote."
        )
    beside = _local(hf_config)
    if beside is None:
        raise UsageError(f"--hf-config {hf_config}: no such folder. Give one with {CONFIG}.")
    return MegatronFolder(folder, beside)


def _local(name: str | Path) -> Path | None:
    """The folder of that name; None where there is none."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None
