# SPDX-License-Identifier: Apache-2.0
"""`fourfold eval` and `fourfold sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourfold.cli.beginning import begun
from fourfold.cli.help import MACHINE
from fourfold.cli.options import (
    Dtype,
    HfConfig,
    Json,
    LogFile,
    Model,
    Quiet,
    Simulate,
    Threads,
    Trust,
    in_bytes,
)
from fourfold.cli.terminal import show
from fourfold.config import EvaluationConfig
from fourfold.errors import UsageError

Text = Annotated[
    str,
    typer.Option(
        "--text",
        "-t",
        help="What the models read: a text, JSON or Parquet file, or a dataset on the hub.",
    ),
]
ActivationMemory = Annotated[
    float | None,
    typer.Option(
        help="GB of hidden states to keep in memory; the rest waits in a file.",
        min=0,
        rich_help_panel=MACHINE,
    ),
]
EvaluationDevice = Annotated[
    str,
    typer.Option(
        help="Where to run the models: cpu, cuda, cuda:N or auto.", rich_help_panel=MACHINE
    ),
]


def evaluate(
    source: Model,
    outs: Annotated[
        list[str],
        typer.Argument(
            metavar="OUT...",
            help="Quantized checkpoints of the same model. The first is what the others are "
            "compared with.",
        ),
    ],
    text: Text,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a window; by default up to 2048.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="How many windows to read; by default up to 32.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens to read, instead of --windows.")
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            help="How many of the source's likeliest tokens to compare one by one; the others "
            "count as one."
        ),
    ] = 4096,
    simulate_activations: Simulate = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="The folder that keeps what the source predicts, so that it runs once for a "
            "text; by default fourfold/evaluation in your cache folder.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep nothing.", rich_help_panel=MACHINE)
    ] = False,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Write the figures into OUT's quant_summary.json, report.html and README.md.",
        ),
    ] = False,
    device: EvaluationDevice = "auto",
    activation_memory: ActivationMemory = None,
    hf_config: HfConfig = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Measure OUT beside its source: KL, agreement, perplexity.

    Models run layer by layer, so none of them has to fit into memory.
    """
    if no_cache and cache is not None:
        raise UsageError("give --cache or --no-cache, not both.")
    config = EvaluationConfig(
        text,
        length,
        windows,
        tokens,
        top,
        cache=not no_cache if cache is None else cache,
        activation_memory=in_bytes("--activation-memory", activation_memory),
    )
    what = f"measuring {', '.join(outs)} beside {source}"
    with begun(what, quiet=quiet or as_json, log_file=log_file) as progress:
        from fourfold import api

        evaluation = api.evaluate(
            source,
            outs,
            config,
            simulate_activations=simulate_activations,
            record=record,
            device=device,
            hf_config=hf_config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **progress,
        )
    from fourfold.cli.tables import evaluation_table

    show(evaluation, as_json, evaluation_table)


def sensitivity(
    source: Model,
    text: Text,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            help="What is quantized, and how in the first place: a name or a file.",
        ),
    ] = "nvfp4_default_best",
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Formats to measure besides the recipe's, with commas: w4a16, fp8, fp8_channel, "
            "fp8_block, mxfp8; by default all of them."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a window; by default up to 512.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows to read.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="How many tokens to read; by default up to 8192, and fewer for a large model."
        ),
    ] = None,
    device: EvaluationDevice = "auto",
    activation_memory: ActivationMemory = None,
    threads: Threads = None,
    hf_config: HfConfig = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Measure what each component of SOURCE costs in each format.

    A component is what engines want in one format: weights that they fuse, or all experts of a
    layer. Its cost is the KL divergence of the model with this component alone in the format.
    """
    memory = in_bytes("--activation-memory", activation_memory)
    config = EvaluationConfig(text, length, windows, tokens, activation_memory=memory)
    what = f"measuring the components of {source}, recipe {recipe}"
    with begun(what, quiet=quiet or as_json, log_file=log_file) as progress:
        from fourfold import api
        from fourfold.recipes.budget import CANDIDATES

        measured = api.sensitivity(
            source,
            config,
            recipe,
            candidates=CANDIDATES if candidates is None else candidates.split(","),
            device=device,
            threads=threads,
            hf_config=hf_config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **progress,
        )
    from fourfold.cli.tables import sensitivity_table

    show(measured, as_json, sensitivity_table)
