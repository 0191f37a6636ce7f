"""The command line: parses, calls the API, prints. Nothing else.

PyTorch and transformers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fourfold._version import __version__
from fourfold.errors import FourfoldError

if TYPE_CHECKING:
    from fourfold import fold
    from fourfold.calibration.calibrate import CalibrationProgress
    from fourfold.calibration.data import CalibrationData
    from fourfold.pipeline import Result

LONGEST_MESSAGE = 2000
DEFAULT_RECIPE = "w4a16_nvfp4_experts_only_mse"

app = typer.Typer(
    name="fourfold",
    help="Quantize Mixture-of-Experts checkpoints to NVFP4, and prove it tensor by tensor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the hub.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A built-in recipe's name, or a YAML file.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Worker threads; by default one for each core.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what fourfold wrote into OUT earlier.")
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that the checkpoint brings."),
]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    if version:
        print(f"fourfold {__version__}")
        raise typer.Exit


@app.command()
def quantize(
    model: Model,
    out: Annotated[str, typer.Argument(help="The folder to write.")],
    recipe: RecipeName = DEFAULT_RECIPE,
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
        str, typer.Option(help="Where the model runs for calibration: cpu, cuda, cuda:N, auto.")
    ] = "auto",
    activation_memory: Annotated[
        float | None,
        typer.Option(help="GB of activations in memory; the rest waits in a file in OUT.", min=0),
    ] = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not read OUT back to compare it with MODEL.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into OUT, and verify what was written."""
    from fourfold.pipeline import quantize as run

    with _Display(quiet=as_json) as display:
        result = run(
            model,
            out,
            recipe,
            calib=calib or (),
            calib_size=calib_size,
            calib_seq=calib_seq,
            batch_size=batch_size,
            packing=packing,
            seed=seed,
            calibration=calibration,
            device=device,
            activation_memory=None if activation_memory is None else int(activation_memory * 1e9),
            threads=threads,
            overwrite=overwrite,
            verified=not no_verify,
            trust_remote_code=trust_remote_code,
            on_plan=display.show,
            on_data=display.data,
            calibration_progress=display.calibrating,
            progress=display.folding,
            on_written=display.written,
            verify_progress=display.verifying,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        _print_result(result)
    if result.report is not None and not result.report.clean:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Model,
    recipe: RecipeName = DEFAULT_RECIPE,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show what would be done, to what, and what it takes. Reads no weight."""
    from fourfold.pipeline import plan as make_plan

    made = make_plan(model, recipe, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(made.to_dict())
    else:
        _console().print(made)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="The NVFP4 checkpoint, whoever wrote it.")],
    source: Annotated[
        str | None, typer.Option("--source", "-s", help="The checkpoint that it was made from.")
    ] = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Check OUT tensor by tensor. Exit 0: clean, 1: a finding, 2: not readable."""
    from fourfold.verification import verify as run

    with _Display(quiet=as_json) as display:
        report = run(
            out,
            source=source,
            threads=threads,
            progress=display.verifying,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print(report.to_json())
    else:
        _console().print(report)
    if not report.clean:
        raise typer.Exit(1)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Any safetensors checkpoint.")],
    as_json: Json = False,
) -> None:
    """Show tensors, formats, sizes and scales at a glance."""
    from fourfold.inspection import inspect as run

    found = run(folder)
    if as_json:
        _print_json(found.to_dict())
    else:
        _console().print(found)


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
    from fourfold.report import chosen_entries, read_summary, table_of

    found = read_summary(out)
    if as_json:
        _print_json(chosen_entries(found, role=role, layer=layer, worst_of_all=worst))
        return
    table = table_of(found, role=role, layer=layer, every=every, worst_of_all=worst)
    _console().print(table, crop=False)


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
            _print_json({each.name: each.model_dump(mode="json") for each in known})
        else:
            for each in known:
                _console().print(f"[bold]{each.name}[/]\n    {each.description}", highlight=False)
        return
    chosen = Recipe.load(name)
    if as_json:
        _print_json(chosen.model_dump(mode="json"))
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
    from fourfold.demo import demonstrate, is_demo_output
    from fourfold.embedded import model_dir
    from fourfold.pipeline import quantize as run

    with _Display(quiet=as_json) as display:
        again = overwrite or is_demo_output(out)
        result = run(
            model_dir(),
            out,
            recipe,
            overwrite=again,
            on_plan=display.show,
            on_data=display.data,
            calibration_progress=display.calibrating,
            on_written=display.written,
        )
    shown = demonstrate(model_dir(), out)
    if as_json:
        _print_json(result.to_dict() | {"demo": asdict(shown)})
        return
    _print_result(result)
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
    from fourfold.generation import generate as run

    with _Display(quiet=as_json) as display:
        written = run(
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
            progress=display.writing,
        )
    if as_json:
        _print_json(written.to_dict())
    else:
        _console().print(written)


class _Display:
    """Progress on stderr where that is a terminal, silent elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[rate]:>9} · {task.fields[rss]} resident"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, Any] = {}
        self.begun: dict[str, float] = {}

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def written(self) -> None:
        """OUT is whole; what follows only reads it."""
        global _outcome, _is_writing
        _outcome, _is_writing = "OUT is written, but not verified", False

    def show(self, value: object) -> None:
        """Print the plan above the progress bars; the clock starts."""
        global _is_writing
        _is_writing = True
        self.begun["quantizing"] = time.perf_counter()
        if not self.quiet:
            _console().print(value)

    def data(self, data: CalibrationData) -> None:
        """What the model will read."""
        if not self.quiet:
            own = " (--calib gives it your own)" if data.is_embedded else ""
            _console().print(
                f"calibrating on {data.samples:,} samples of {data.seq:,} tokens from {data.origin}"
                f"{own}",
                markup=False,
            )
            beginning = " ".join(data.beginning.split())[:100]
            _console().print(f"the first begins: {beginning} …", markup=False, style="dim")

    def calibrating(self, event: CalibrationProgress) -> None:
        """A layer was run."""
        if "calibrating" not in self.tasks:
            self.tasks["calibrating"] = self.progress.add_task(
                "calibrating", total=event.layers, rate="", rss=""
            )
        self.progress.update(
            self.tasks["calibrating"], completed=event.layer + 1,
            rate=f"layer {event.layer + 1}/{event.layers}", rss=_resident(),
        )  # fmt: skip

    def folding(self, event: fold.Progress) -> None:
        """A shard is finished."""
        self._update("quantizing", event.bytes_done, event.bytes_total)
        rate, rss = self._rate("quantizing", event.bytes_done), _resident()
        self.console.print(
            f"  {event.unit}: shard {event.shards_done}/{event.shards} · {rate} · {rss} resident",
            style="dim",
            highlight=False,
        )

    def verifying(self, done: int, total: int) -> None:
        """Some bytes were verified."""
        self._update("verifying", done, total)

    def writing(self, model: str, done: int, total: int) -> None:
        """A model wrote a token; `model` says which."""
        if model not in self.tasks:
            self.tasks[model] = self.progress.add_task(model, total=total, rate="", rss="")
        self.progress.update(
            self.tasks[model], completed=done, rate=f"token {done}/{total}", rss=_resident()
        )

    def _update(self, name: str, done: int, total: int) -> None:
        if name not in self.tasks:
            self.begun.setdefault(name, time.perf_counter())
            self.tasks[name] = self.progress.add_task(name, total=total, rate="", rss="")
        self.progress.update(
            self.tasks[name],
            completed=done,
            total=total,
            rate=self._rate(name, done),
            rss=_resident(),
        )

    def _rate(self, name: str, done: int) -> str:
        from fourfold.rendering import size

        seconds = time.perf_counter() - self.begun[name]
        return f"{size(int(done / seconds))}/s" if seconds > 0.2 else ""


def _resident() -> str:
    from fourfold.machine import resident
    from fourfold.rendering import size

    return size(resident())


def _print_result(result: Result) -> None:
    console = _console()
    if result.report is not None:
        console.print(result.report)
    console.print(str(result), style="bold", soft_wrap=True, markup=False)


def _console() -> Console:
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(width=width, highlight=False)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


_outcome = "nothing was written"
"""What a signal leaves behind, for its message."""

_is_writing = False
"""Whether a signal must clean up. Where not, the process ends at once: an exception raised in the
middle of an import would leave a lock behind that another thread waits for."""


class _StoppedError(BaseException):
    """A signal asked the process to end. Not a `KeyboardInterrupt`, which typer would keep."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # one is enough: what was begun is cleaned up
    if not _is_writing:
        _end(number)
    raise _StoppedError(number)


def _end(number: int) -> NoReturn:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    text = f"{show_cursor}error: stopped by {signal.Signals(number).name}; {_outcome}.\n"
    os.write(2, text.encode())
    os._exit(128 + number)


def main() -> None:
    """The console script: exit codes and errors as documented, tracebacks only with --debug."""
    _mend_streams()
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except FourfoldError as error:
        _fail(str(error), error.exit_code, debug)
    except _StoppedError as stopped:
        _end(stopped.number)
    except Exception as error:
        text = str(error) or type(error).__name__
        _fail(f"{text} (a defect of fourfold: run again with --debug and report it)", 1, debug)


def _mend_streams() -> None:
    """Print whatever the terminal's encoding; print nowhere where a stream is closed."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int, debug: bool) -> None:
    message = "".join(x if x.isprintable() or x in "\n×→·…" else repr(x)[1:-1] for x in message)
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[: LONGEST_MESSAGE // 2]} […] {message[-LONGEST_MESSAGE // 2 :]}"
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
