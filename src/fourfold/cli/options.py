# SPDX-License-Identifier: Apache-2.0
"""The command line's options: those that several commands share, and their names in messages."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from fourfold.cli.help import CALIBRATION, MACHINE, OUTPUT
from fourfold.config import CalibrationConfig, EvaluationConfig, OutputConfig, Runtime
from fourfold.errors import UsageError

Model = Annotated[
    str, typer.Argument(help="A checkpoint's folder, or its name on the hub: ORG/NAME[@REVISION].")
]
HfConfig = Annotated[
    Path | None,
    typer.Option(
        "--hf-config",
        help="For a Megatron checkpoint: the folder with config.json and the tokenizer. Without "
        "it, config.json is derived from the training arguments if they suffice.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16: read FP32 tensors as BF16, as a training run leaves them."),
]


def _complete_recipe(beginning: str) -> list[str]:
    """For a shell: the built-in recipes whose names begin like this."""
    from fourfold.recipes import builtin_names

    return [name for name in builtin_names() if name.startswith(beginning)]


RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="The name of a built-in recipe (`fourfold recipes --guide` helps to choose), or a "
        "YAML file.",
        autocompletion=_complete_recipe,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Worker threads; by default one for each core.", rich_help_panel=MACHINE
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace what fourfold wrote into OUT earlier.",
        rich_help_panel=OUTPUT,
    ),
]
Shards = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Files for each layer, at least; by default one for each rank.",
        rich_help_panel=OUTPUT,
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings."),
]

NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Do not read OUT back to verify it.", rich_help_panel=OUTPUT),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="For a quantized MODEL: the checkpoint that it was made from. Errors are reported "
        "against that, too.",
        rich_help_panel=OUTPUT,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Make an error of weights that would be repaired and of experts that no calibration "
        "token reached.",
        rich_help_panel=OUTPUT,
    ),
]
Preview = Annotated[
    str | None,
    typer.Option(
        "--preview",
        metavar="[PROMPT]",
        help="Let the source and OUT continue PROMPT side by side, or without one the beginning of "
        "a calibration sample.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Say which kernels quantize the weights, and why.")
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Show warnings, errors and the result, and nothing else."),
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log-file", help="Append what the command says to this file, with the time of each line."
    ),
]
SourceModel = Annotated[
    str | None, typer.Option("--source", "-s", help="The checkpoint that OUT was made from.")
]

Simulate = Annotated[
    bool | None,
    typer.Option(
        "--simulate-activations/--weights-only",
        help="Also round activations and the KV cache; by default as OUT says.",
        show_default=False,
    ),
]

# Of quantize alone.
Calib = Annotated[
    list[str] | None,
    typer.Option(
        help="Calibration data: a text, JSON or Parquet file, or a dataset on the hub. May be "
        "repeated. By default a mixed text that comes with fourfold.",
        rich_help_panel=CALIBRATION,
    ),
]
CalibSize = Annotated[
    int | None,
    typer.Option(
        help="How many calibration samples to use; by default up to 128.",
        rich_help_panel=CALIBRATION,
    ),
]
CalibSeq = Annotated[
    int | None,
    typer.Option(help="Tokens per sample; by default up to 512.", rich_help_panel=CALIBRATION),
]
BatchSize = Annotated[
    int, typer.Option(help="Samples per forward pass.", rich_help_panel=CALIBRATION)
]
Packing = Annotated[
    str,
    typer.Option(
        help="packed: join documents and cut them into full samples; padded: a document is a "
        "sample.",
        rich_help_panel=CALIBRATION,
    ),
]
Seed = Annotated[
    int, typer.Option(help="Random seed for choosing samples.", rich_help_panel=CALIBRATION)
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        help="Use the calibration.safetensors of an earlier run; the model is not run.",
        rich_help_panel=CALIBRATION,
    ),
]
ShowData = Annotated[
    bool,
    typer.Option(
        "--show-data",
        help="Print how your calibration data begins; by default none of it is printed.",
        rich_help_panel=CALIBRATION,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to quantize weights and run the model for calibration: cpu, cuda, cuda:N or "
        "auto.",
        rich_help_panel=MACHINE,
    ),
]
DeviceMemory = Annotated[
    float | None,
    typer.Option(
        help="GB of GPU memory that quantization may use; by default about 1, and at most half of "
        "what is free.",
        rich_help_panel=MACHINE,
    ),
]
KeepSource = Annotated[
    bool | None,
    typer.Option(
        "--keep-source/--no-keep-source",
        help="Of a model on the hub: keep its shards in the hub's cache, or delete each once it is "
        "quantized; by default kept if all of them have room beside OUT.",
        show_default=False,
        rich_help_panel=MACHINE,
    ),
]
ActivationMemory = Annotated[
    float | None,
    typer.Option(
        help="GB of activations to keep in memory; the rest waits in a file in OUT.",
        min=0,
        rich_help_panel=MACHINE,
    ),
]

_ARGUMENTS = (
    *(
        field.name
        for config in (CalibrationConfig, EvaluationConfig, Runtime, OutputConfig)
        for field in fields(config)
    ),
    *("hf_config", "recipe", "source", "trust_remote_code", "dtype", "candidates"),
)
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _ARGUMENTS} | {
    "statistics": "--calibration",
    "verify": "--no-verify",
    "outs": "OUT",
    "out": "OUT",
    "model": "MODEL",
    "to_json": "--json",
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
