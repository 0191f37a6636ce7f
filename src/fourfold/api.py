"""The whole job: resolve, plan, check, fold, write, verify."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fourfold.calibration.data import CalibrationOptions
from fourfold.calibration.live import ForwardLoop
from fourfold.calibration.statistics import Statistics
from fourfold.distributed.launcher import launch
from fourfold.distributed.machine import (
    choose_device,
    peak_resident,
    threads_available,
)
from fourfold.distributed.ranks import Ranks
from fourfold.errors import (
    FourfoldError,
    UsageError,
)
from fourfold.events import BackendChosen, OnEvent, PlanMade, WarningIssued, ignore
from fourfold.execution import (
    Kernels,
    LinearResult,
    choose_kernels,
    warm_up,
    warm_up_device,
)
from fourfold.layouts import marker_files
from fourfold.planning import KVScales, Plan, ScaleGroup, make_plan
from fourfold.recipes import DEFAULT_RECIPE, Recipe
from fourfold.run.job import Job, write_rest
from fourfold.run.preflight import check_placed, check_room
from fourfold.run.resume import (
    forward_threads,
    parts_of,
)
from fourfold.run.strategies import Observation, choose_run
from fourfold.sources.opening import Model, job_ranks, opened
from fourfold.storage.names import REPORT, SUMMARY
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source
from fourfold.storage.units import size
from fourfold.verification import Report, verify

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Result:
    """What a finished job did. Prints as the command's closing lines."""

    out: Path
    plan: Plan
    linears: tuple[LinearResult, ...]
    report: Report | None
    """The verification; None where it was not asked for."""
    seconds: float
    peak_resident: int
    """The process's peak resident memory in bytes."""
    statistics: Statistics | None = None
    """What calibration found, or was given; None where nothing was calibrated."""

    unreached_experts: Mapping[str, list[int]] = field(default_factory=dict)
    """Experts that no calibration token was routed to, by experts module."""
    ranks: int = 1
    is_part: bool = False
    """Whether `out` holds only what some of the ranks wrote; `merge` joins the parts."""
    kernels: str = ""
    """Which kernels quantized the weights, and why these."""
    warnings: tuple[str, ...] = ()
    """What went otherwise than it was meant: slower kernels, a device without the memory."""

    @property
    def clean(self) -> bool:
        """Whether the output was verified without an error."""
        return self.report is not None and self.report.clean

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "out": str(self.out),
            "recipe": self.plan.recipe.name,
            "linear_weights_planned": len(self.plan.linears),
            "linear_weights_quantized": len(self.linears),
            "bytes_before": self.plan.nbytes,
            "bytes_after": self.plan.nbytes_after,
            "calibration": None if self.statistics is None else asdict(self.statistics.data),
            "unreached_experts": dict(self.unreached_experts),
            "kernels": self.kernels,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "peak_resident_bytes": self.peak_resident,
            "verification": None if self.report is None else self.report.to_dict(),
        }

    def __str__(self) -> str:
        planned, done = len(self.plan.linears), len(self.linears)
        parts = [f"{done:,} / {planned:,} linear weights quantized"]
        if self.report is not None:
            counts = self.report.counts
            parts.append(f"{counts.zero_block_scales:,} zero scales of {counts.block_scales:,}")
        parts.append(f"{size(self.plan.nbytes_after)} from {size(self.plan.nbytes)}")
        parts.append(
            "parts: join them with `fourfold merge`" if self.is_part else _verdict(self.report)
        )
        took = f"{self.seconds:,.1f} s, {size(self.peak_resident)} of memory at the peak"
        lines = [" · ".join(parts), *self._calibration_lines(), took]
        return "\n".join(lines)

    def _calibration_lines(self) -> Iterator[str]:
        if self.statistics is None:
            return
        data, total = self.statistics.data, self.plan.expert_count
        unreached = [f"{path}.{e}" for path, found in self.unreached_experts.items() for e in found]
        line = f"calibrated on {data.samples:,} samples of {data.seq:,} tokens from {data.origin}"
        if total:
            line += f" · {len(unreached):,} of {total:,} experts saw no token"
        yield line
        if unreached:
            more = f", … (all of them in {SUMMARY} and {REPORT})" if len(unreached) > 5 else ""
            yield f"scales from the layer's input for {', '.join(unreached[:5])}{more}"


def _verdict(report: Report | None) -> str:
    if report is None:
        return "not verified"
    return "verified" if report.clean else "NOT CLEAN: see the findings"


def plan(
    model: Model,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    hf_config: str | Path | PretrainedConfig | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `quantize` would do to every tensor of `model`; reads no weight.

    model: a checkpoint's folder, a hub name, an open `Source`, or a model in memory.
    hf_config: for Megatron's, the folder with the Hugging Face configuration; for its models in
    memory, that configuration will do.
    recipe: the name of a built-in recipe, a YAML file, or a `Recipe`.

    Raises `RecipeError`, `SourceError`, `ModelError` or `PlanError`.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    with opened(model, hf_config, trust_remote_code=trust_remote_code) as source:
        made = make_plan(source, chosen)
        check_placed(source, made.inventory)
        return made


def quantize(
    model: Model,
    out: str | Path,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    hf_config: str | Path | PretrainedConfig | None = None,
    calib: Sequence[str | Path] = (),
    calib_size: int | None = None,
    calib_seq: int | None = None,
    batch_size: int = 8,
    packing: str = "packed",
    seed: int = 0,
    calibration: str | Path | Statistics | None = None,
    forward_loop: ForwardLoop | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    device_memory: int | None = None,
    activation_memory: int | None = None,
    threads: int | None = None,
    shards: int | None = None,
    overwrite: bool = False,
    verified: bool = True,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Result:
    """Quantize the checkpoint `model` into the folder `out`, and verify what was written.

    model, recipe, hf_config: as in `plan`; a model in memory is one of transformers, or of
    Megatron: then each rank gives its part (a list, where it has several chunks).
    calib, calib_size, calib_seq, batch_size, packing, seed: what the model reads while its
    activations are observed, where the recipe needs that; see `calibration.data`.
    calibration: the statistics of an earlier run, or the file with them; nothing is run then.
    forward_loop: for a model in memory, calls it on calibration data, instead of `calib`.
    tokenizer: for a model in memory, lies beside the weights that are written.
    device: where weights are quantized, and where the model runs for calibration: cpu, cuda,
    cuda:N, or auto. The output does not depend on where weights are quantized.
    device_memory: bytes of the device that quantization may take; by default up to 1 GiB, and no
    more than half of what is free.
    activation_memory: bytes of activations in memory; what is beyond waits in a file in `out`.
    threads: worker threads; one for each core by default. The output does not depend on it, but
    for what the matrix products of a calibration's run owe to it.
    shards: files that a decoder layer is cut into, at least; by default one for each rank.
    overwrite: replace a checkpoint that fourfold wrote into `out`, or an unfinished run.
    verified: read the output back and compare it with `model`, tensor by tensor.
    on_event: receives every event of the run; see `fourfold.events`.

    An unfinished run of the same job that `out` holds is continued. Under a launcher (torchrun),
    every rank calls this alike, and they share the work.

    Raises `FourfoldError`; `out` is then as if the job had not begun, or has no config.json and
    holds what the same call goes on from.
    """
    begun = time.perf_counter()
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        on_event(WarningIssued(text))

    with job_ranks(model) as ranks:  # first of all: the others hear of any error
        _check_arguments(out, threads, device_memory, shards)
        chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        files = tuple(map(str, calib))
        observation = Observation(
            CalibrationOptions(files, calib_size, calib_seq, batch_size, seed, _packing(packing)),
            calibration,
            forward_loop,
            choose_device(device),
            activation_memory,
            threads,
            on_event,
        )
        ranks.gather("called")  # whoever fails before this leaves nobody waiting in a collective
        with opened(
            model, hf_config, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        ) as source:
            workers = threads or max(1, threads_available() // ranks.local_size)
            is_live = source.model is not None
            observation.check(chosen, is_live=is_live)
            folder = OutputFolder(Path(out).expanduser(), ranks.rank, markers=marker_files())
            with source.agreeing():
                for origin in source.origin_folders:
                    folder.check(origin, overwrite=overwrite)
                parts = parts_of(folder, ranks, shards, overwrite, source)
                in_forward = forward_threads(folder, ranks, threads, overwrite)
                observation = replace(observation, threads=in_forward)
                with _warming_up(chosen, source, observation.device) as failures:
                    work = make_plan(source, chosen, parts=parts)
                    check_placed(source, work.inventory)
                    kernels = choose_kernels(
                        observation.device,
                        work,
                        workers,
                        memory=device_memory,
                        ranks=ranks.local_size,
                        warn=warn,
                    )
                    runs_model = calibration is None and not is_live
                    check_room(work, folder, kernels, ranks, runs_model=runs_model)
                on_event(PlanMade(work))
                kernels = _told(kernels, failures, on_event, warn)
            run = choose_run(work, source, observation, folder, ranks)
            rest = partial(write_rest, warn=warn)
            job = Job(work, source, folder, run, ranks, kernels, rest)
            with source.agreeing():
                if run.is_writer and ranks.size == 1:
                    folder.check_continues(job.identity, overwrite=overwrite)
            linears = job.write(overwrite, on_event)
            report = None
            if verified and run.is_writer and job.is_finisher:
                report = _verify_written(
                    work,
                    linears,
                    source,
                    folder,
                    threads=_threads_to_verify(workers, ranks),
                    on_event=on_event,
                )
            ranks.gather("verified")  # until then others may need what this rank has in memory
        return Result(
            out=folder.folder,
            plan=work,
            linears=tuple(linears),
            report=report,
            seconds=time.perf_counter() - begun,
            peak_resident=peak_resident(),
            statistics=None if run.scales is None else run.scales.statistics,
            unreached_experts={} if run.scales is None else run.scales.unreached(),
            ranks=ranks.size,
            is_part=not job.share.is_whole,
            kernels=str(kernels.choice),
            warnings=tuple(warnings),
        )


def _check_arguments(
    out: str | Path, threads: int | None, device_memory: int | None, shards: int | None
) -> None:
    if not str(out):
        raise UsageError("OUT is empty: give the folder to write.")
    if threads is not None and threads < 1:
        raise UsageError(f"threads={threads}: give 1 or more.")
    if device_memory is not None and device_memory < 1:
        raise UsageError(f"device_memory={device_memory}: give more than 0, in bytes.")
    if shards is not None and shards < 1:
        raise UsageError(f"shards={shards}: give 1 or more.")


def _told(
    kernels: Kernels,
    failures: Sequence[Exception],
    on_event: OnEvent,
    warn: Callable[[str], None],
) -> Kernels:
    """The kernels that will run, the CPU's where those of the device failed when they were tried;
    whoever wants to know is told."""
    if failures and kernels.pool is not None:
        kernels = kernels.on_cpu(failures[0])
    on_event(BackendChosen(str(kernels.choice), kernels.where, kernels.is_fallback))
    if kernels.is_fallback and launch().local_rank == 0:
        warn(str(kernels.choice))
    return kernels


def _verify_written(
    work: Plan,
    linears: list[LinearResult],
    source: Source,
    folder: OutputFolder,
    *,
    threads: int,
    on_event: OnEvent,
) -> Report:
    """Read the output back; against the source, unless that is on several ranks of its own."""
    is_readable = not source.is_sharded
    report = verify(
        folder.folder,
        source=source if is_readable else None,
        threads=threads,
        on_event=on_event,
    )
    if is_readable:
        _check_ledger(work, linears, report, folder)
    return report


def _threads_to_verify(workers: int, ranks: Ranks) -> int:
    """Those of all ranks of this machine: the others have nothing more to do."""
    if ranks.local_size == 1:
        return workers
    return min(workers * ranks.local_size, threads_available())


def _packing(packing: str) -> Literal["packed", "padded"]:
    return packing  # type: ignore[return-value]  # CalibrationOptions checks it


@contextmanager
def _warming_up(recipe: Recipe, source: Source, device: str) -> Iterator[list[Exception]]:
    """Compile the kernels on a thread meanwhile. An interpreter must not end while that runs.

    Yields what in the end holds the error of the device's kernels, where they cannot run.
    """
    nbytes: Counter[str] = Counter()
    for info in source.tensors.values():
        if len(info.shape) > 1 and info.dtype in _DTYPES:
            nbytes[info.dtype] += info.nbytes
    known = [_DTYPES[dtype] for dtype, _ in nbytes.most_common()]
    failures: list[Exception] = []

    def run() -> None:
        with suppress(UsageError):  # kernels that cannot run: told where they should
            warm_up(recipe.schemes, known)
        try:
            warm_up_device(device, recipe.schemes, known[:1])  # others at their first use
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="warm-up")
    thread.start()
    try:
        yield failures
    finally:
        thread.join()


def _check_ledger(
    work: Plan, linears: list[LinearResult], report: Report, folder: OutputFolder
) -> None:
    """Planned = written = verified, or something is wrong that no other check has seen."""
    made = (ScaleGroup, KVScales)
    copies = sum(not isinstance(job, made) for shard in work.shards for job in shard.jobs)
    verified = report.counts.compared_linears, report.counts.copied_tensors
    if report.clean and verified != (len(work.linears), copies):
        folder.remove(work.files)
        raise FourfoldError(
            f"{report.folder}: {len(work.linears)} linear weights and {copies} copied tensors "
            f"planned, {len(linears)} weights written, {verified[0]} and {verified[1]} verified. "
            "The checkpoint was removed. This is a defect of fourfold; please report it."
        )
