# SPDX-License-Identifier: Apache-2.0
"""`fourfold eval`."""

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
    Trust,
    in_bytes,
)
from fourfold.cli.terminal import show
from fourfold.config import EvaluationConfig
from fourfold.errors import UsageError


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
    text: Annotated[
        str,
        typer.Option(
            "--text",
            "-t",
            help="What the models read: a text, JSON or Parquet file, or a dataset on the hub.",
        ),
    ],
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
    device: Annotated[
        str,
        typer.Option(
            help="Where to run the models: cpu, cuda, cuda:N or auto.", rich_help_panel=MACHINE
        ),
    ] = "auto",
    activation_memory: Annotated[
        float | None,
        typer.Option(
            help="GB of hidden states to keep in memory; the rest waits in a file.",
            min=0,
            rich_help_panel=MACHINE,
        ),
    ] = None,
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
