# SPDX-License-Identifier: Apache-2.0
"""`fourfold eval`: quantized checkpoints beside their source, in figures.

    text ─▶ windows ─▶ source, layer by layer ─▶ predictions in a file ─┐
               └─────▶ each OUT, layer by layer ────────────────────────┴─▶ KL, agreement, …

Both are run in float32: the source as fourfold reads it, each OUT with dequantized weights and,
where engines round activations or the KV cache, with rounded ones. Every checkpoint is opened and
compared with the source before a weight is read.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fourfold.calibration.encoding import Encoder
from fourfold.calibration.padding import pad_ids
from fourfold.config import EvaluationConfig
from fourfold.errors import UsageError
from fourfold.evaluation.evaluated import Evaluation, ModelFigures
from fourfold.evaluation.figures import (
    Floats,
    Measured,
    mean,
    mean_interval,
    perplexity,
    ratio_interval,
)
from fourfold.evaluation.loading import OpenedModel
from fourfold.evaluation.predictions import DTYPE, Predictor
from fourfold.evaluation.reference import (
    Reference,
    default_folder,
    find_reference,
    identity_of,
    writing_reference,
)
from fourfold.evaluation.simulated_activations import check_rounded, is_rounded
from fourfold.evaluation.windows import Windows, read_windows
from fourfold.events import OnEvent, WarningIssued, ignore
from fourfold.formats.kv_cache import KVFormat
from fourfold.models.module_tree import ModuleTree, build_tree
from fourfold.sources.decoded import DecodedSource, open_decoded
from fourfold.storage.source import Source
from fourfold.storage.temporary import TemporaryFolder


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint to measure."""

    checkpoint: DecodedSource
    simulates: bool

    @property
    def name(self) -> str:
        return str(self.checkpoint.place)


@dataclass(frozen=True)
class _Outcome:
    """What was measured of a candidate, and what of it was rounded."""

    name: str
    measured: Measured
    rounds_inputs: bool
    kv_cache: KVFormat | None


def evaluate(
    source: Source,
    outs: Sequence[str | Path],
    config: EvaluationConfig,
    *,
    simulate_activations: bool | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Measure quantized checkpoints against the open `source`; see `api.evaluate`.

    dtype: What `source` was opened with: predictions in the cache depend on it.
    """
    begun = time.perf_counter()
    tree = build_tree(source.folder, trust_remote_code=source.trust_remote_code)
    with ExitStack() as stack:
        opening = partial(_opened, source, tree, simulate_activations, trust_remote_code)
        candidates = [stack.enter_context(opening(out)) for out in outs]
        windows = read_windows(config, _encoder(source, tree), tree.max_positions)
        kept = min(config.top, tree.vocab_size)
        keeps = config.cache is not False
        options = {"kept": kept, "dtype": dtype, "device": torch.device(device).type}
        identity = identity_of(source, windows, **options) if keeps else None
        folder = stack.enter_context(_folder(config, is_kept=identity is not None))
        file = folder / f"{identity or 'source'}.safetensors"
        memory = config.activation_memory
        predictor = Predictor(windows.ids_NW, len(outs), device, memory, folder, on_event)
        reference, from_cache = _reference(source, windows, kept, file, predictor)
        outcomes = [_measure(candidate, reference, predictor) for candidate in candidates]
        first = outcomes[0].measured.kl_of_windows
        return Evaluation(
            source=str(source.place),
            text=windows.origin,
            text_digest=windows.digest,
            windows=len(windows.ids_NW),
            length=windows.ids_NW.shape[1],
            compared=kept,
            vocabulary=tree.vocab_size,
            rest=float(reference.rest_NW.double().mean()),
            perplexity=perplexity(reference.nll_NW[:, :-1].double().mean(-1).tolist()),
            models=tuple(
                _figures(outcome, first if number else None)
                for number, outcome in enumerate(outcomes)
            ),
            cache=str(file) if identity is not None else None,
            cache_bytes=reference.nbytes if identity is not None else 0,
            from_cache=from_cache,
            seconds=time.perf_counter() - begun,
        )


def _encoder(source: Source, tree: ModuleTree) -> Encoder:
    trusted, pads = source.trust_remote_code, pad_ids(source.config)
    return Encoder(source.folder, tree.vocab_size, trusted, source.tokenizer_hint, pads)


@contextmanager
def _opened(
    source: Source,
    tree: ModuleTree,
    simulate_activations: bool | None,
    trust_remote_code: bool,
    out: str | Path,
) -> Iterator[_Candidate]:
    """Open a checkpoint, and check that it is one of the same model."""
    opened = open_decoded(out, dtype=DTYPE, trust_remote_code=trust_remote_code)
    with closing(opened) as checkpoint:
        simulates = simulate_activations
        if simulates is None:
            simulates = is_rounded(checkpoint)
        elif simulates:
            check_rounded(checkpoint)
        own = build_tree(checkpoint.folder, trust_remote_code=trust_remote_code)
        for what, mine, theirs in (
            ("architecture", own.architecture, tree.architecture),
            ("vocabulary size", own.vocab_size, tree.vocab_size),
        ):
            if mine != theirs:
                raise UsageError(
                    f"{checkpoint.place}: its {what} is {mine}, that of {source.place} is "
                    f"{theirs}. Give a checkpoint that was made from this source."
                )
        yield _Candidate(checkpoint, simulates)


@contextmanager
def _folder(config: EvaluationConfig, *, is_kept: bool) -> Iterator[Path]:
    """The folder for predictions of the source; a temporary one if they are not kept."""
    if is_kept:
        cache = config.cache
        yield default_folder() if isinstance(cache, bool) else Path(cache).expanduser()
        return
    temporary = TemporaryFolder()
    try:
        yield temporary.path
    finally:
        temporary.remove()


def _reference(
    source: Source, windows: Windows, kept: int, file: Path, predictor: Predictor
) -> tuple[Reference, bool]:
    """Return the source's predictions, and True if they were in the cache."""
    reference = find_reference(file, windows, kept)
    if reference is not None:
        return reference, True
    predictor.models += 1
    with writing_reference(file, windows, kept) as writer:
        predictor.run("source", _model(source, predictor), writer.add)
        source.check_unchanged()
    return Reference(file), False


def _measure(candidate: _Candidate, reference: Reference, predictor: Predictor) -> _Outcome:
    """Run a checkpoint on all windows."""
    checkpoint, measured = candidate.checkpoint, Measured()
    kv_cache: KVFormat | None = None
    opened = _model(checkpoint, predictor)
    with ExitStack() as stack:
        if candidate.simulates:
            with _as_events(predictor.on_event):
                simulation = stack.enter_context(opened.simulate_activations(checkpoint))
            if (states := simulation.sites.kv_cache) is not None:
                kv_cache = states.format

        def measure(window: int, logits_WV: torch.Tensor) -> None:
            tokens_W = predictor.ids_NW[window]
            measured.add(candidate.name, window, reference[window], logits_WV, tokens_W)

        predictor.run(checkpoint.folder.name, opened, measure)
    rounds_inputs = candidate.simulates and bool(checkpoint.input_roundings)
    return _Outcome(candidate.name, measured, rounds_inputs, kv_cache)


def _model(source: Source, predictor: Predictor) -> OpenedModel:
    with _as_events(predictor.on_event):
        return OpenedModel(source, dtype=DTYPE, device=predictor.device, reads_text_once=True)


@contextmanager
def _as_events(on_event: OnEvent) -> Iterator[None]:
    """Issue Python's warnings as events, which the command shows as it shows its own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        on_event(WarningIssued(str(warning.message)))


def _figures(outcome: _Outcome, first_N: Floats | None) -> ModelFigures:
    """Summarize one checkpoint; `first_N` are the KLs of the first one, which has none itself."""
    measured, kl_N = outcome.measured, outcome.measured.kl_of_windows
    median, p90, p99 = measured.percentiles(50, 90, 99)
    ratio, ends = (None, None) if first_N is None else ratio_interval(kl_N, first_N)
    return ModelFigures(
        model=outcome.name,
        simulated=outcome.rounds_inputs,
        kv_cache=outcome.kv_cache,
        kl=float(kl_N.mean()),
        kl_interval=mean_interval(kl_N),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        top1=mean(measured.top1),
        top5=mean(measured.top5),
        perplexity=perplexity(measured.nll),
        ratio=ratio,
        ratio_interval=ends,
    )
