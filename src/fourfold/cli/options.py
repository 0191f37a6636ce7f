"""The command line's options: those that several commands share, and their names in messages."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from fourfold.config import CalibrationConfig, OutputConfig, Runtime
from fourfold.errors import UsageError

Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the hub.")]
HfConfig = Annotated[
    Path | None,
    typer.Option(
        "--hf-config",
        help="For a Megatron checkpoint: the folder with config.json and the tokenizer. Without "
        "it, config.json is derived from the training arguments if they suffice.",
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="The name of a built-in recipe, or a YAML file.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Worker threads; by default one for each core.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what fourfold wrote into OUT earlier.")
]
Shards = Annotated[
    int | None,
    typer.Option(min=1, help="Files for each layer, at least; by default one for each rank."),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings."),
]

NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not read OUT back to verify it.")]
SourceModel = Annotated[
    str | None, typer.Option("--source", "-s", help="The checkpoint that OUT was made from.")
]

_ARGUMENTS = (
    *(
        field.name
        for config in (CalibrationConfig, Runtime, OutputConfig)
        for field in fields(config)
    ),
    *("hf_config", "recipe", "source", "trust_remote_code"),
)
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _ARGUMENTS} | {
    "statistics": "--calibration",
    "verify": "--no-verify",
}


def as_options(message: str) -> str:
    """A message in which arguments of Python are spelled as options: `calib_size=0` as
    --calib-size 0."""

    def spell(argument: re.Match[str]) -> str:
        name, value = argument.groups()
        if name not in _OPTIONS:
            return argument[0]
        return _OPTIONS[name] if value in (None, "True", "False") else f"{_OPTIONS[name]} {value}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", spell, message)


def in_bytes(option: str, gigabytes: float | None) -> int | None:
    """Bytes of an option in GB. Raises `UsageError` for a number below 0, or none."""
    if gigabytes is None:
        return None
    if not gigabytes >= 0:
        raise UsageError(f"{option} {gigabytes}: give a number of GB.")
    return int(min(gigabytes, 1e9) * 1e9)
