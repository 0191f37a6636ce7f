# SPDX-License-Identifier: Apache-2.0
"""The functions of the library: arguments in, results out.

    plan ─▶ quantize ─▶ verify ─▶ load, generate, evaluate
                 └────▶ merge            convert

`quantize` is the pipeline on one screen; each step is a module of `run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.calibration.live import ForwardLoop
from fourfold.calibration.statistics import Statistics
from fourfold.config import (
    CalibrationConfig,
    EvaluationConfig,
    OutputConfig,
    Runtime,
    check_type,
    output_folder,
)
from fourfold.distributed.machine import choose_device, peak_resident, threads_available
from fourfold.errors import ResourceError, UsageError
from fourfold.evaluation import evaluator, generation
from fourfold.evaluation.continuation import Sampling
from fourfold.evaluation.evaluated import Evaluation
from fourfold.evaluation.generation import Generation
from fourfold.evaluation.loading import load
from fourfold.evaluation.sensitivity import Sensitivity, measure_sensitivity
from fourfold.events import OnEvent
from fourfold.layouts import marker_files
from fourfold.planning import Plan, make_plan
from fourfold.recipes import DEFAULT_RECIPE, Recipe
from fourfold.recipes.budget import CANDIDATES, check_candidates
from fourfold.reporting.recording import entry_of, note_evaluation
from fourfold.run import convert as conversion
from fourfold.run import merge as merging
from fourfold.run.budget import spend_budget
from fourfold.run.convert import Converted
from fourfold.run.folding import fold
from fourfold.run.job import Job, write_own_files
from fourfold.run.merge import Merged
from fourfold.run.preflight import check_placed, prepare
from fourfold.run.preview import check_preview, preview
from fourfold.run.remarks import remarks
from fourfold.run.result import Result
from fourfold.run.resume import pinned
from fourfold.run.session import session
from fourfold.run.strategies import Observation, choose_run
from fourfold.run.verify_written import verify_written
from fourfold.sources.opening import Model, job_ranks, opened
from fourfold.storage.output import OutputFolder
from fourfold.storage.quant_summary import read_summary
from fourfold.storage.source import Source
from fourfold.verification import Report, verifier

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COMPONENTS_RECIPE = "nvfp4_default_best"
"""The recipe whose components `sensitivity` measures by default."""

__all__ = [
    "convert", "evaluate", "generate", "load", "merge", "plan", "quantize", "sensitivity", "verify",
]  # fmt: skip


def plan(
    model: Model,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    hf_config: str | Path | PretrainedConfig | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Return what `quantize` would do to every tensor of `model`, without reading a weight.

    Args:
        model: A checkpoint's folder, a name on the hub (ORG/NAME or ORG/NAME@REVISION), an open
            `Source`, or a model in memory.
        recipe: The name of a built-in recipe, a YAML file, or a `Recipe`.
        hf_config: For a Megatron checkpoint, the folder with its Hugging Face configuration; for a
            Megatron model in memory, that configuration will do.
        dtype: "bfloat16" reads the FP32 tensors of a checkpoint on disk as BF16.
        trust_remote_code: True if code that the checkpoint brings may run.

    Raises:
        RecipeError: The recipe is unknown or malformed, or does not fit the model.
        SourceError: The checkpoint cannot be read.
        ModelError: The architecture is not supported.
        PlanError: The recipe cannot be carried out on this model.
    """
    chosen = _load_recipe(recipe)
    with opened(model, hf_config, trust_remote_code=trust_remote_code, dtype=dtype) as source:
        work = make_plan(source, chosen)
        check_placed(source, work.inventory)
        needed = work.nbytes_after + work.side_files.nbytes
        try:
            fetching = source.fetching.settle(Path.cwd(), needed, None)
        except ResourceError as error:  # OUT may lie on another disk
            fetching = [str(error)]
        return replace(work, notes=(*work.notes, *fetching))


def quantize(
    model: Model,
    out: str | Path,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    hf_config: str | Path | PretrainedConfig | None = None,
    calibration: CalibrationConfig | Statistics | str | Path | Sequence[str | Path] | None = None,
    runtime: Runtime | None = None,
    output: OutputConfig | None = None,
    tokenizer: Any = None,
    forward_loop: ForwardLoop | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
) -> Result:
    """Quantize `model` into the folder `out`, and verify what was written.

    An unfinished run of the same job in `out` is resumed. Under a launcher (torchrun), every rank
    makes the same call, and the ranks share the work.

    Args:
        model: As in `plan`. Of a Megatron model in memory, each rank gives its own part (a list, if
            it has several chunks).
        out: The folder to write.
        recipe: As in `plan`.
        hf_config: As in `plan`.
        calibration: What the model reads while activations are observed, if the recipe needs that:
            files or datasets, or a `CalibrationConfig`; a text that comes with fourfold by default.
            Or the result of an earlier run: its `Statistics` or `calibration.safetensors`.
        runtime: The device, its memory, the number of threads, and whether the shards of a model on
            the hub are kept.
        output: The number of shards, whether to overwrite, whether to verify, and whether what
            would be repaired is an error.
        tokenizer: For a model in memory: an object with `save_pretrained`, whose files are written
            beside the weights.
        forward_loop: For a model in memory: calls it on your data, in place of `calibration`.
        dtype: As in `plan`.
        trust_remote_code: True if code that the checkpoint brings may run.
        progress: True shows the progress on stderr, False does not. By default it is shown on a
            terminal and in a notebook.
        on_event: Receives every event of the run; see `fourfold.events`.

    Raises:
        FourfoldError: `out` is then as it was before, or has no config.json and holds what the same
            call resumes from. The same is true after SIGINT and SIGTERM.
    """
    began = time.perf_counter()
    config, runtime = CalibrationConfig.of(calibration), runtime or Runtime()
    output, target = output or OutputConfig(), output_folder(out)
    check_type("runtime", runtime, Runtime, "a Runtime")
    check_type("output", output, OutputConfig, "an OutputConfig")
    loop = "a function that calls the model on your data"
    check_type("forward_loop", forward_loop, Callable | None, loop)
    with session(progress, on_event) as run, job_ranks(model) as ranks:
        chosen = _load_recipe(recipe)
        device = choose_device(runtime.device)
        observation = Observation(
            config, forward_loop, device, runtime.threads, run, strict=output.strict
        )
        ranks.gather("called")  # a rank that fails before this leaves none waiting in a collective
        folder = OutputFolder(
            target, ranks.rank, markers=marker_files(), overwrite=output.overwrite
        )
        with opened(
            pinned(model, folder, ranks),
            hf_config,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
        ) as source:
            observation = observation.checked(chosen, source)
            check_preview(output.preview, source)
            with source.agreeing():
                spent = spend_budget(chosen, source, folder, ranks, observation, runtime, run)
                work, backend, observation = prepare(
                    source, spent.recipe, folder, ranks, observation, runtime, output, run
                )
                source, observation = fold(work, source, observation, folder, ranks)
            strategy = choose_run(work, source, observation, folder, ranks)
            strategy = replace(strategy, identity={**strategy.identity, **spent.identity})
            own_files = partial(
                write_own_files,
                plan=work,
                source=source,
                scales=strategy.scales,
                warn=run.warn,
                budget=spent.entry,
            )
            job = Job(
                work,
                source,
                folder,
                strategy,
                ranks,
                backend,
                own_files,
                strict=output.strict,
                proves=output.verify and source.fetching.is_transient,
            )
            linears = job.write(run)
            for remark in remarks(job, linears, strategy.scales if ranks.rank == 0 else None):
                run.warn(remark)
            report = None
            if output.verify:
                report = verify_written(job, work, linears, run, output.reference)
            shown = preview(output.preview, job, work, device, run)
            ranks.gather("verified")  # until then others may need what this rank has in memory
        return Result(
            out=target,
            plan=work,
            linears=tuple(linears),
            report=report,
            seconds=time.perf_counter() - began,
            peak_resident=peak_resident(),
            statistics=None if strategy.scales is None else strategy.scales.statistics,
            unreached_experts={} if strategy.scales is None else strategy.scales.unreached(),
            ranks=ranks.size,
            is_part=not job.assignment.has_one_folder,
            kernels=str(backend.choice),
            non_finite=tuple(job.non_finite),
            warnings=tuple(run.warnings),
            preview=shown,
        )


def verify(
    out: str | Path,
    *,
    source: str | Path | Source | None = None,
    reference: str | Path | None = None,
    hf_config: str | Path | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
) -> Report:
    """Verify the quantized checkpoint in the folder `out`, whichever tool wrote it.

    Args:
        out: A checkpoint in NVFP4.
        source: The checkpoint that it was made from: a folder, a name on the hub, or an open
            `Source`. With it, every copied tensor and every dequantized weight is compared.
        reference: The checkpoint that a quantized source was made from. The errors of the weights
            are reported against it, too.
        hf_config: If the source is a Megatron checkpoint: the folder with its Hugging Face
            configuration.
        dtype: What `quantize` was given.
        threads: Worker threads; by default one for each core. The report does not depend on it.
        trust_remote_code, progress, on_event: As in `quantize`.

    Raises:
        UnreadableError: `out` or `source` cannot be read, or `out` is not an NVFP4 checkpoint.
            Everything else is a finding in the report.
    """
    Runtime(threads=threads)
    check_type("out", out, str | Path, "a checkpoint's folder")
    with session(progress, on_event) as run:
        return verifier.verify(
            out,
            source=source,
            reference=reference,
            hf_config=hf_config,
            dtype=dtype,
            threads=threads,
            trust_remote_code=trust_remote_code,
            on_event=run,
        )


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    shards: int = 1,
    overwrite: bool = False,
    verified: bool = True,
    threads: int | None = None,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
) -> Merged:
    """Join what nodes without a shared file system wrote, or cut a checkpoint into other shards.

    Args:
        folders: What the nodes of one run wrote; or one checkpoint, to cut it again.
        out: The folder to write.
        shards: Files that a decoder layer is cut into, at least.
        overwrite: True replaces what fourfold wrote into `out` earlier.
        verified: True verifies `out` afterwards.
        threads, progress, on_event: As in `verify`.

    Raises:
        SourceError: A shard is missing, damaged or in two folders, or the folders are of different
            runs.
        OutputError: `out` cannot be written; it is then as before.
    """
    options, runtime = OutputConfig(shards, overwrite, verified), Runtime(threads=threads)
    wanted = "a list of folders"
    if isinstance(folders, str) or not isinstance(folders, Iterable):
        raise UsageError(f"`folders={folders!r:.60}`: give {wanted}.")
    folders = list(folders)
    for folder in folders:
        check_type("folders", folder, str | Path, wanted)
    with session(progress, on_event) as run:
        return merging.merge(folders, output_folder(out), options, runtime, on_event=run)


def convert(
    model: str | Path | Source,
    out: str | Path,
    *,
    hf_config: str | Path | None = None,
    dtype: str | None = None,
    layout: str | None = None,
    threads: int | None = None,
    shards: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
) -> Converted:
    """Write `model` as a Hugging Face checkpoint, without quantizing anything.

    A Megatron checkpoint gets Hugging Face's names, and a quantized one is decoded; an NVFP4
    checkpoint keeps its codes and scales if `layout` is given. What was written is compared with
    `model`, byte for byte.

    Args:
        model: The folder that Megatron wrote (torch_dist), or a quantized checkpoint.
        out: The folder to write.
        hf_config: The folder with the Hugging Face configuration and tokenizer.
        dtype: As in `plan`.
        layout: The name of the layout to write an NVFP4 checkpoint in: "modelopt",
            "modelopt-stacked" or "compressed-tensors".
        threads: Worker threads; by default one for each core.
        shards: Files that a decoder layer is cut into, at least.
        overwrite: True starts over if an unfinished run has left something in `out`.
        trust_remote_code, progress, on_event: As in `quantize`.

    Raises:
        FourfoldError: `out` is then as before, or holds what the same call resumes from.
    """
    options, runtime = OutputConfig(shards, overwrite), Runtime(threads=threads)
    with (
        session(progress, on_event) as run,
        opened(model, hf_config, trust_remote_code=trust_remote_code, dtype=dtype) as source,
    ):
        return conversion.convert(
            source, output_folder(out), options, runtime, on_event=run, layout=layout
        )


def generate(
    out: str | Path,
    prompt: str,
    *,
    source: str | Path | Source | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    simulate_activations: bool | None = None,
    stream: bool | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
) -> Generation:
    """Let the quantized checkpoint `out`, and its source if given, continue a prompt.

    Args:
        out: A checkpoint that `load` can read.
        prompt: The beginning of the text, taken as it is.
        source: The checkpoint that `out` was made from.
        max_new_tokens: The most tokens to write.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn.
        seed: Random seed for sampling.
        simulate_activations: Round activations as engines do; by default if they round any.
        stream: Load one layer at a time; by default if the model does not fit into memory.
        device: cpu, cuda, cuda:N or auto.
        trust_remote_code, progress, on_event: As in `quantize`.

    Raises:
        UsageError: The options make no sense.
        SourceError, ModelError, ResourceError: A checkpoint cannot be read or run, or lacks a
            tokenizer.
    """
    sampling = Sampling(max_new_tokens, temperature, seed)
    check_type("out", out, str | Path, "a checkpoint's folder, or a name on the hub")
    check_type("prompt", prompt, str, "the beginning of a text")
    with session(progress, on_event) as run:
        return generation.generate(
            out,
            prompt,
            sampling,
            source=source,
            simulate_activations=simulate_activations,
            stream=stream,
            device=device,
            trust_remote_code=trust_remote_code,
            on_event=run,
        )


def evaluate(
    source: str | Path | Source,
    outs: str | Path | Sequence[str | Path],
    text: str | Path | EvaluationConfig,
    *,
    length: int | None = None,
    windows: int | None = None,
    simulate_activations: bool | None = None,
    cache: str | Path | bool = True,
    record: bool = False,
    device: str = "auto",
    hf_config: str | Path | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
) -> Evaluation:
    """Measure quantized checkpoints beside their source: KL divergence, agreement, perplexity.

    Models run layer by layer, so none of them has to fit into memory.

    Args:
        source: The checkpoint that the others were made from: any that `quantize` reads from disk
            or from the hub, or an open `Source`.
        outs: One checkpoint that `load` can read, or several; the first is what the others are
            compared with.
        text: A file or dataset to measure on; or an `EvaluationConfig`, with further options.
        length: Tokens of a window; see `EvaluationConfig`.
        windows: The number of windows; see `EvaluationConfig`.
        simulate_activations: Round activations as engines do; by default if they round any.
        cache: The folder for predictions of the source, True for the default one, or False; see
            `EvaluationConfig`.
        record: Write the figures into the summary, report and model card of each checkpoint.
        device: cpu, cuda, cuda:N or auto.
        hf_config, dtype, trust_remote_code, progress, on_event: As in `quantize`.

    Raises:
        UsageError: The options make no sense, the text is too short, or a checkpoint is one of
            another model.
        SourceError, ModelError: A checkpoint cannot be read or run.
        ResourceError, OutputError: There is no room for the predictions of the source.
    """
    if isinstance(text, EvaluationConfig):
        config = text
        if (length, windows, cache) != (None, None, True):
            raise UsageError(
                "`length`, `windows` and `cache` have no effect beside an EvaluationConfig. Give "
                "them to it."
            )
    else:
        config = EvaluationConfig(text, length, windows, cache=cache)
    wanted = "a quantized checkpoint's folder, or a list of them"
    check_type("outs", outs, str | Path | Sequence, wanted)
    folders = [outs] if isinstance(outs, str | Path) else list(outs)
    for folder in folders:
        check_type("outs", folder, str | Path, wanted)
    if not folders:
        raise UsageError(f"`outs` is empty: give {wanted}.")
    with (
        session(progress, on_event) as run,
        opened(source, hf_config, trust_remote_code=trust_remote_code, dtype=dtype) as original,
    ):
        if record:
            for folder in folders:
                read_summary(folder)  # an error before the models run
        evaluation = evaluator.evaluate(
            original,
            folders,
            config,
            simulate_activations=simulate_activations,
            device=choose_device(device),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            on_event=run,
        )
        if record:
            for folder, figures in zip(folders, evaluation.models, strict=True):
                note_evaluation(Path(folder).expanduser(), entry_of(evaluation, figures), run)
        return evaluation


def sensitivity(
    source: str | Path | Source,
    text: str | Path | EvaluationConfig,
    recipe: str | Path | Recipe = COMPONENTS_RECIPE,
    *,
    candidates: Sequence[str] = CANDIDATES,
    device: str = "auto",
    threads: int | None = None,
    hf_config: str | Path | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
    on_event: OnEvent | None = None,
) -> Sensitivity:
    """Measure what each component of a model costs in each format: its KL to the source, alone.

    A component is what engines want in one format: weights that they fuse, or all experts of a
    layer. The model runs layer by layer, so it need not fit into memory.

    Args:
        source: The checkpoint, as in `evaluate`.
        text: A file or dataset to measure on; or an `EvaluationConfig`. By default up to 8,192
            tokens in windows of 512, and fewer where the model is large.
        recipe: As in `plan`: what is quantized, and how in the first place.
        candidates: What components may become instead, as in a recipe's `budget`.
        device: cpu, cuda, cuda:N or auto.
        threads: Threads that quantize; by default one for each core.
        hf_config, dtype, trust_remote_code, progress, on_event: As in `quantize`.

    Raises:
        RecipeError, PlanError: The recipe does not fit the model.
        UsageError: The options make no sense, or the text is too short.
        SourceError, ModelError: The checkpoint cannot be read or run.
        ResourceError: A layer in several formats does not fit into memory.
    """
    config = text if isinstance(text, EvaluationConfig) else EvaluationConfig(text)
    check_type("candidates", candidates, list | tuple, f"a list of {', '.join(CANDIDATES)}")
    try:
        names = check_candidates(tuple(candidates))
    except ValueError as error:
        raise UsageError(f"`candidates`: {error}.") from None
    Runtime(threads=threads)
    with session(progress, on_event) as run:
        chosen = _load_recipe(recipe)
        with opened(
            source, hf_config, trust_remote_code=trust_remote_code, dtype=dtype
        ) as original:
            work = make_plan(original, chosen)
            return measure_sensitivity(
                original,
                work,
                config,
                names,
                device=choose_device(device),
                threads=threads or threads_available(),
                on_event=run,
            )


def _load_recipe(recipe: str | Path | Recipe) -> Recipe:
    wanted = "the name of a built-in recipe, a YAML file, or a Recipe"
    check_type("recipe", recipe, str | Path | Recipe, wanted)
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
