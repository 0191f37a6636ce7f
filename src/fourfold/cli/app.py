# SPDX-License-Identifier: Apache-2.0
"""The commands: each parses its options, calls the API and prints the result.

PyTorch, transformers and rich are imported inside the commands, so that `--help` answers at once;
that is also why typer shows the help without rich.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold._version import __version__
from fourfold.cli import evaluating, showing, terminal
from fourfold.cli.beginning import begun, say_at_once
from fourfold.cli.help import Command, Commands
from fourfold.cli.options import (
    ActivationMemory,
    BatchSize,
    Calib,
    CalibSeq,
    CalibSize,
    Device,
    DeviceMemory,
    Dtype,
    HfConfig,
    Json,
    KeepSource,
    LogFile,
    Model,
    NoVerify,
    Overwrite,
    Packing,
    Preview,
    Quiet,
    RecipeName,
    Reference,
    Seed,
    Shards,
    ShowData,
    Simulate,
    SourceModel,
    Statistics,
    Strict,
    Threads,
    Trust,
    Verbose,
    in_bytes,
)
from fourfold.cli.terminal import print_json, show, show_result
from fourfold.config import CalibrationConfig, OutputConfig, Runtime
from fourfold.distributed.launcher import launch
from fourfold.errors import UsageError

if TYPE_CHECKING:
    from fourfold.run.merge import Merged
    from fourfold.run.result import Result

DEFAULT_RECIPE = "w4a16_nvfp4_experts_only_mse"

app = typer.Typer(
    name="fourfold",
    help="Quantize Mixture-of-Experts checkpoints to NVFP4, and prove it tensor by tensor.",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
command = partial(app.command, cls=Command)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    if version:
        print(f"fourfold {__version__}")
        raise typer.Exit
    if context.invoked_subcommand != "quantize" and launch().rank > 0:
        raise typer.Exit  # only quantize shares its work among ranks


@command()
def quantize(
    model: Model,
    out: Annotated[str, typer.Argument(help="The folder to write.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    hf_config: HfConfig = None,
    dtype: Dtype = None,
    calib: Calib = None,
    calib_size: CalibSize = None,
    calib_seq: CalibSeq = None,
    batch_size: BatchSize = 8,
    packing: Packing = "packed",
    seed: Seed = 0,
    calibration: Statistics = None,
    show_data: ShowData = False,
    device: Device = "auto",
    device_memory: DeviceMemory = None,
    activation_memory: ActivationMemory = None,
    threads: Threads = None,
    keep_source: KeepSource = None,
    shards: Shards = None,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    reference: Reference = None,
    preview: Preview = None,
    strict: Strict = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into OUT, and verify what was written.

    If a run was stopped, the same command resumes it. Under torchrun, all ranks share the work.
    """
    calibrating = CalibrationConfig(
        calib=calib or (),
        calib_size=calib_size,
        calib_seq=calib_seq,
        batch_size=batch_size,
        packing=packing,
        seed=seed,
        statistics=calibration,
        activation_memory=in_bytes("--activation-memory", activation_memory),
    )
    what = f"quantizing {model} into {out}, recipe {recipe}"
    with begun(
        what,
        quiet=quiet or as_json,
        log_file=log_file,
        verbose=verbose,
        show_data=show_data,
    ) as progress:
        from fourfold import api

        result = api.quantize(
            model,
            out,
            recipe,
            hf_config=hf_config,
            dtype=dtype,
            calibration=calibrating,
            runtime=Runtime(
                device, in_bytes("--device-memory", device_memory), threads, keep_source
            ),
            output=OutputConfig(
                shards=shards,
                overwrite=overwrite,
                verify=not no_verify,
                strict=strict,
                preview=preview is not None and (preview or True),
                reference=reference,
            ),
            trust_remote_code=trust_remote_code,
            **progress,
        )
    _conclude(result, as_json)


@command()
def plan(
    model: Model,
    recipe: RecipeName = DEFAULT_RECIPE,
    hf_config: HfConfig = None,
    dtype: Dtype = None,
    with_time: Annotated[
        bool | None,
        typer.Option(
            "--time/--no-time",
            help="Measure this machine briefly and estimate the time; by default unless --json.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what quantize would do to every tensor, and its cost."""
    say_at_once(f"planning {model}, recipe {recipe}", quiet=as_json)
    from fourfold import api
    from fourfold.cli.tables import plain_text, plan_text
    from fourfold.run.estimate import estimate

    trusted = trust_remote_code
    work = api.plan(model, recipe, hf_config=hf_config, dtype=dtype, trust_remote_code=trusted)
    taken = estimate(work) if (not as_json if with_time is None else with_time) else None
    if as_json:
        print_json(work.to_dict() | ({"time": taken.to_dict()} if taken else {}))
        return
    show(work, as_json, plan_text)
    if taken:
        show(taken, as_json, plain_text)


@command()
def verify(
    out: Annotated[Path, typer.Argument(help="A checkpoint in NVFP4, whichever tool wrote it.")],
    source: SourceModel = None,
    reference: Reference = None,
    hf_config: HfConfig = None,
    dtype: Dtype = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Verify OUT tensor by tensor. Exit code 0: clean, 1: an error was found, 2: not readable."""
    what = f"verifying {out}"
    with begun(what, quiet=quiet or as_json, log_file=log_file) as progress:
        from fourfold import api

        report = api.verify(
            out,
            source=source,
            reference=reference,
            hf_config=hf_config,
            dtype=dtype,
            threads=threads,
            trust_remote_code=trust_remote_code,
            **progress,
        )
    from fourfold.cli.tables import report_text

    show(report, as_json, report_text)
    if not report.clean:
        raise typer.Exit(1)


@command()
def convert(
    model: Annotated[
        str, typer.Argument(help="A Megatron checkpoint's folder, or a quantized checkpoint.")
    ],
    out: Annotated[str, typer.Argument(help="The folder to write.")],
    hf_config: HfConfig = None,
    dtype: Dtype = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Keep the codes of an NVFP4 checkpoint, in this layout: modelopt, "
            "modelopt-stacked or compressed-tensors."
        ),
    ] = None,
    threads: Threads = None,
    shards: Shards = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over if a run was stopped in OUT.")
    ] = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Write MODEL without quantization, or in another layout.

    Quantized weights are decoded; with --layout, those in NVFP4 keep their codes and scales.
    What was written is compared with MODEL, byte for byte. If a run was stopped, the same command
    resumes it.
    """
    what = f"converting {model} into {out}"
    with begun(what, quiet=quiet or as_json, log_file=log_file) as progress:
        from fourfold import api

        converted = api.convert(
            model,
            out,
            hf_config=hf_config,
            dtype=dtype,
            layout=layout,
            threads=threads,
            shards=shards,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            **progress,
        )
    from fourfold.cli.tables import result_text

    show(converted, as_json, result_text)


@command()
def merge(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR... OUT",
            help="The folders that the nodes wrote, or one checkpoint; then OUT.",
        ),
    ],
    shards: Annotated[int, typer.Option(min=1, help="Files for each layer, at least.")] = 1,
    threads: Threads = None,
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Join the parts that nodes wrote, or cut a checkpoint again.

    The nodes need no shared file system.
    """
    if len(folders) < 2:
        raise UsageError("give the folders to join, and then OUT.")
    what = f"merging {len(folders) - 1} folders into {folders[-1]}"
    with begun(what, quiet=quiet or as_json, log_file=log_file) as progress:
        from fourfold import api

        result = api.merge(
            folders[:-1],
            folders[-1],
            shards=shards,
            overwrite=overwrite,
            verified=not no_verify,
            threads=threads,
            **progress,
        )
    _conclude(result, as_json)


def _conclude(result: Result | Merged, as_json: bool) -> None:
    """Print the result on the first rank; exit with 1 if the verification found an error."""
    if launch().rank == 0:
        show_result(result, as_json)
    if result.report is not None and not result.report.clean:
        raise typer.Exit(1)


command("eval")(evaluating.evaluate)
command()(evaluating.sensitivity)
for shows in (showing.inspect, showing.summary, showing.report, showing.recipes, showing.schema):
    command()(shows)


@command()
def demo(
    out: Annotated[Path, typer.Argument(help="The folder to write.")] = Path("demo-out"),
    recipe: RecipeName = DEFAULT_RECIPE,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model, offline, and show the effect."""
    what = f"quantizing the embedded model into {out}, recipe {recipe}"
    with begun(what, quiet=quiet or as_json, log_file=log_file) as progress:
        from fourfold import api
        from fourfold.embedded import model_dir
        from fourfold.evaluation.demo import demonstrate, is_demo_output

        again = overwrite or is_demo_output(out)
        result = api.quantize(
            model_dir(),
            out,
            recipe,
            output=OutputConfig(overwrite=again),
            **progress,
        )
    shown = demonstrate(model_dir(), out)
    if as_json:
        print_json(result.to_dict() | {"demo": asdict(shown)})
    else:
        show_result(result, as_json)
        print(shown)


@command()
def generate(
    out: Annotated[str, typer.Argument(help="A checkpoint in NVFP4.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    source: SourceModel = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
    simulate_activations: Simulate = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Load one layer at a time; by default if the model does not fit into memory.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to run the models: cpu, cuda, cuda:N or auto.")
    ] = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
) -> None:
    """Let OUT and its source continue a prompt, side by side."""
    what = f"continuing a prompt with {out}"
    with begun(what, quiet=quiet or as_json, log_file=log_file) as progress:
        from fourfold import api

        written = api.generate(
            out,
            prompt,
            source=source,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            simulate_activations=simulate_activations,
            stream=stream,
            device=device,
            trust_remote_code=trust_remote_code,
            **progress,
        )
    from fourfold.cli.tables import generation_table

    show(written, as_json, generation_table)


def main() -> None:
    """The console script."""
    terminal.run(app)
