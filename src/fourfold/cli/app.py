"""The command line: parses, calls the API, prints. Nothing else.

PyTorch and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold._version import __version__
from fourfold.cli import terminal
from fourfold.cli.options import (
    HfConfig,
    Json,
    Model,
    Overwrite,
    RecipeName,
    Shards,
    Threads,
    Trust,
    in_bytes,
)
from fourfold.cli.progress import CommandDisplay
from fourfold.cli.tables import generation_table, inspection_table, plan_text, report_text
from fourfold.cli.terminal import console, print_json, print_result
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
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    if version:
        print(f"fourfold {__version__}")
        raise typer.Exit
    if context.invoked_subcommand != "quantize" and launch().rank > 0:
        raise typer.Exit  # the first rank does alone what is not shared out


@app.command()
def quantize(
    model: Model,
    out: Annotated[str, typer.Argument(help="The folder to write.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    hf_config: HfConfig = None,
    calib: Annotated[
        list[str] | None,
        typer.Option(
            help="What the model reads for calibration: text, JSONL, Parquet, or a name on the "
            "hub. May be repeated. By default a mixed text that comes with fourfold."
        ),
    ] = None,
    calib_size: Annotated[
        int | None, typer.Option(help="Samples of calibration data; by default up to 128.")
    ] = None,
    calib_seq: Annotated[
        int | None, typer.Option(help="Tokens of a sample; by default up to 512.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples that pass the model together.")] = 8,
    packing: Annotated[
        str, typer.Option(help="packed: samples are full; padded: a document is a sample.")
    ] = "packed",
    seed: Annotated[int, typer.Option(help="Which samples are chosen.")] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(help="The calibration.safetensors of an earlier run, instead of running."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Where weights are quantized, and the model runs for calibration: cpu, cuda, "
            "cuda:N, auto."
        ),
    ] = "auto",
    device_memory: Annotated[
        float | None,
        typer.Option(
            help="GB of the device that quantization may take; by default about 1, and no more "
            "than half of what is free."
        ),
    ] = None,
    activation_memory: Annotated[
        float | None,
        typer.Option(help="GB of activations in memory; the rest waits in a file in OUT.", min=0),
    ] = None,
    threads: Threads = None,
    shards: Shards = None,
    overwrite: Overwrite = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not read OUT back to compare it with MODEL.")
    ] = False,
    trust_remote_code: Trust = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say which kernels are used, and why.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into OUT, and verify what was written.

    The same command goes on with what a run that was stopped has left in OUT. Under torchrun, all
    ranks share the work.
    """
    from fourfold import api

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
    with CommandDisplay(quiet=as_json, verbose=verbose) as display:
        result = api.quantize(
            model,
            out,
            recipe,
            hf_config=hf_config,
            calibration=calibrating,
            runtime=Runtime(device, in_bytes("--device-memory", device_memory), threads),
            output=OutputConfig(shards, overwrite, verify=not no_verify),
            trust_remote_code=trust_remote_code,
            progress=False,
            on_event=display,
        )
    _conclude(result, as_json)


@app.command()
def plan(
    model: Model,
    recipe: RecipeName = DEFAULT_RECIPE,
    hf_config: HfConfig = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what would be done, to what, and what it takes. Reads no weight."""
    from fourfold import api

    made = api.plan(model, recipe, hf_config=hf_config, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(made.to_dict())
    else:
        console().print(plan_text(made), soft_wrap=True)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="The NVFP4 checkpoint, whoever wrote it.")],
    source: Annotated[
        str | None, typer.Option("--source", "-s", help="The checkpoint that it was made from.")
    ] = None,
    hf_config: HfConfig = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check OUT tensor by tensor. Exit 0: clean, 1: a finding, 2: not readable."""
    from fourfold import api

    with CommandDisplay(quiet=as_json) as display:
        report = api.verify(
            out,
            source=source,
            hf_config=hf_config,
            threads=threads,
            trust_remote_code=trust_remote_code,
            progress=False,
            on_event=display,
        )
    if as_json:
        print(report.to_json())
    else:
        console().print(report_text(report), soft_wrap=True)
    if not report.clean:
        raise typer.Exit(1)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A Megatron checkpoint's folder (torch_dist).")],
    out: Annotated[str, typer.Argument(help="The folder to write.")],
    hf_config: HfConfig = None,
    threads: Threads = None,
    shards: Shards = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where a run was stopped in OUT.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write MODEL as a Hugging Face checkpoint, unquantized, and compare what was written.

    The same command goes on with what a run that was stopped has left in OUT.
    """
    from fourfold import api

    with CommandDisplay(quiet=as_json) as display:
        converted = api.convert(
            model,
            out,
            hf_config=hf_config,
            threads=threads,
            shards=shards,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=False,
            on_event=display,
        )
    if as_json:
        print_json(converted.to_dict())
    else:
        console().print(str(converted), style="bold", soft_wrap=True, markup=False)


@app.command()
def merge(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR... OUT", help="What each node wrote, or one checkpoint; then OUT."
        ),
    ],
    shards: Annotated[int, typer.Option(min=1, help="Files for each layer, at least.")] = 1,
    threads: Threads = None,
    overwrite: Overwrite = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not check OUT afterwards.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Join what nodes without a shared file system wrote, or cut a checkpoint anew."""
    from fourfold import api

    if len(folders) < 2:
        raise UsageError("give the folders to join, and then OUT.")
    with CommandDisplay(quiet=as_json) as display:
        result = api.merge(
            folders[:-1],
            folders[-1],
            shards=shards,
            overwrite=overwrite,
            verified=not no_verify,
            threads=threads,
            progress=False,
            on_event=display,
        )
    _conclude(result, as_json)


def _conclude(result: Result | Merged, as_json: bool) -> None:
    """Say what was written, once; exit code 1 where it was verified and is not clean."""
    if launch().rank == 0:
        if as_json:
            print_json(result.to_dict())
        else:
            print_result(result)
    if result.report is not None and not result.report.clean:
        raise typer.Exit(1)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Any safetensors checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show tensors, formats, sizes and scales at a glance."""
    from fourfold.evaluation.inspection import inspect as run

    found = run(folder)
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(inspection_table(found))


@app.command()
def summary(
    out: Annotated[Path, typer.Argument(help="A folder that `fourfold quantize` wrote.")],
    role: Annotated[str | None, typer.Option(help="Only weights of this role.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Only weights of this layer.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="A line for each weight, each expert's too.")
    ] = False,
    worst: Annotated[
        int | None, typer.Option(min=1, help="Only so many, the largest relative error first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was done to each linear weight: scales, input amax, tokens, error."""
    from fourfold.reporting import read_summary, select, table_of

    document = read_summary(out)
    if as_json:
        linears = tuple(select(document, role=role, layer=layer, worst=worst))
        print_json(document.model_copy(update={"linears": linears}).to_dict())
        return
    table = table_of(document, role=role, layer=layer, every=every, worst=worst)
    console().print(table, crop=False)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="A folder that `fourfold quantize` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page's file; by default report.html in OUT."),
    ] = None,
) -> None:
    """Draw the report page from the quant_summary.json in OUT."""
    from fourfold.reporting import write_report

    print(write_report(out, output))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the built-in recipes, or print one."""
    from fourfold.recipes import Recipe, builtin_names

    if name is None:
        known = [Recipe.load(each) for each in builtin_names()]
        if as_json:
            print_json({each.name: each.model_dump(mode="json") for each in known})
        else:
            for each in known:
                console().print(f"[bold]{each.name}[/]\n    {each.description}", highlight=False)
        return
    chosen = Recipe.load(name)
    if as_json:
        print_json(chosen.model_dump(mode="json"))
    else:
        print(chosen.to_yaml(), end="")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="The folder to write.")] = Path("demo-out"),
    recipe: RecipeName = DEFAULT_RECIPE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Do the whole job on the embedded model, offline, and show what it did to the model."""
    from fourfold import api
    from fourfold.embedded import model_dir
    from fourfold.evaluation.demo import demonstrate, is_demo_output

    with CommandDisplay(quiet=as_json) as display:
        again = overwrite or is_demo_output(out)
        result = api.quantize(
            model_dir(),
            out,
            recipe,
            output=OutputConfig(overwrite=again),
            progress=False,
            on_event=display,
        )
    shown = demonstrate(model_dir(), out)
    if as_json:
        print_json(result.to_dict() | {"demo": asdict(shown)})
        return
    print_result(result)
    print(shown)


@app.command()
def generate(
    out: Annotated[str, typer.Argument(help="The NVFP4 checkpoint.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The beginning of a text.")],
    source: Annotated[
        str | None, typer.Option("--source", "-s", help="The checkpoint that it was made from.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How much to write, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the tokens that are drawn.")] = 0,
    simulate_activations: Annotated[
        bool | None,
        typer.Option(
            "--simulate-activations/--weights-only",
            help="Round activations, too; by default where OUT is W4A4.",
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="One layer in memory at a time; by default where the model does not fit.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the models run: cpu, cuda, cuda:N, auto.")
    ] = "auto",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what the model and the quantized model write after a prompt, side by side."""
    from fourfold import api

    with CommandDisplay(quiet=as_json) as display:
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
            progress=False,
            on_event=display,
        )
    if as_json:
        print_json(written.to_dict())
    else:
        console().print(generation_table(written))


def main() -> None:
    """The console script."""
    terminal.run(app)
