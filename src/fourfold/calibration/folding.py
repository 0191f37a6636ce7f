# SPDX-License-Identifier: Apache-2.0
"""Choose the factors that are folded into a model before it is quantized.

    texts ─▶ every layer, as the source computes it ─▶ rows of its activations
                 │                                           │
                 │                    `smoothing`: factors, chosen and judged on different texts
                 ▼                                           │
        the layer again, folded: the same output bit for bit ◀┘, or its factors are dropped

The model runs layer by layer (`streaming`), before anything is written. Folds change nothing that
it computes, so one pass serves for all layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fourfold.calibration.data import Batch
from fourfold.calibration.observers import Observers
from fourfold.calibration.reading import ending_at_the_head, read_batch, reads_text_twice
from fourfold.calibration.smoothing import Reader, Site, Sizes, Smoothing, rms, smooth
from fourfold.calibration.stream import RecordedRows, Stream
from fourfold.calibration.streaming import LayerWeights, Pass, StreamedModel
from fourfold.errors import UsageError
from fourfold.events import LayerFolded, OnEvent, ignore
from fourfold.models.folds import Fold, Kind
from fourfold.models.internals import runnable
from fourfold.models.inventory import LinearWeight
from fourfold.planning import Plan
from fourfold.planning.rows import observed_site
from fourfold.sources.folded import Factors, FoldedSource
from fourfold.statistics.second_moment import by_expert
from fourfold.storage.source import Source

T = TypeVar("T")

TEXTS = 64
"""Samples that are read at most."""

TOKENS = 1 << 15
"""Tokens that they have at most, if there are more than the fewest that are needed."""

LEAST_TEXTS = 4
"""The fewest samples: one for each of `PARTS`."""

PARTS = ("fit", "choose", "fit", "judge")
"""What texts are for, in turn."""

ROWS: Mapping[str, int] = {"fit": 1024, "choose": 512, "judge": 512}
"""Rows of an activation that are kept of each part, at most."""

LEAST_ROWS = 24
"""An expert with fewer rows of a part is left alone."""

EXPERTS = 8
"""Experts of a layer that a choice looks at."""


@dataclass(frozen=True)
class FoldChoice:
    """What was decided about some folds that share it: a norm, or the ups of a layer's experts."""

    name: str
    """The norm, or the input site of the downs."""
    layer: int
    kind: Kind
    smoothing: Smoothing
    folds: int
    """The number of folds that have factors."""
    is_exact: bool = True
    """False if the folded layer computed something else."""

    @property
    def is_kept(self) -> bool:
        """True if the factors are used."""
        return self.folds > 0 and self.is_exact and self.smoothing.is_kept

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as plain data, which the summary holds."""
        return {
            "name": self.name,
            "layer": self.layer,
            "kind": self.kind.value,
            "a": self.smoothing.a,
            "b": self.smoothing.b,
            "loss_before": self.smoothing.before,
            "loss_after": self.smoothing.after,
            "folds": self.folds,
            "exact": self.is_exact,
            "kept": self.is_kept,
        }


def texts_of(batches: Sequence[Batch]) -> list[Batch]:
    """Return the samples that folds are chosen and judged on, each as a batch of its own.

    Raises:
        UsageError: There are too few.
    """
    samples = [
        Batch(batch.input_ids[row : row + 1].clone(), batch.attention_mask[row : row + 1].clone())
        for batch in batches
        for row in range(len(batch.input_ids))
    ]
    if len(samples) < LEAST_TEXTS:
        raise UsageError(
            f"`folds`: at least {LEAST_TEXTS} calibration samples are needed, some of them to "
            f"choose and to judge by; there are {len(samples)}. Give more `calib_size`."
        )
    longest = max(sample.input_ids.numel() for sample in samples)
    return samples[: max(LEAST_TEXTS, min(TEXTS, TOKENS // longest))]


class Folding:
    """One pass of a few texts through a streamed model, which chooses the factors of all layers."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        batches: Sequence[Batch],
        *,
        device: str = "cpu",
        on_event: OnEvent = ignore,
    ) -> None:
        """Build the model; nothing is read or run yet.

        Args:
            plan, source: What is quantized and folded, in which checkpoint.
            batches: The calibration data, of which some is used.
            device: The device that the model runs on.
            on_event: Called with a `LayerFolded` for every layer.
        """
        self.plan, self.source, self.on_event = plan, source, on_event
        self.folds = plan.folds
        self.exponents: dict[str, Tensor] = {}
        """The factors that are kept, by name of the fold."""
        self.choices: list[FoldChoice] = []
        self.texts = texts_of(batches)
        self.parts = [PARTS[number % len(PARTS)] for number in range(len(self.texts))]
        self.streamed = StreamedModel(source, device=device, head=False)
        self.calls = range(0)
        """The calls of a second stream: none."""
        self._rows: dict[tuple[str, int | None, str], list[Tensor]] = defaultdict(list)
        """By site, expert and part; of a few experts."""
        self._squares: dict[tuple[str, int | None], tuple[Tensor, int]] = {}
        """Sums of squares, float64 `[channels]`, and the number of rows, of those to fit by."""
        self._looked_at = self._experts_to_look_at()
        self._text = 0

    def weights(self, layer: int) -> LayerWeights:
        """Return the source's parameters of a layer."""
        return self.streamed.weights(layer)

    def choose(self) -> Factors:
        """Run the texts through all layers, and return the factors."""
        layers = {fold.layer for fold in self.folds.values()}
        model, tree = self.streamed.model, self.streamed.tree
        modules = {self._reader(fold).module for fold in self.folds.values()}
        experts = {path: tree.experts[path] for path in sorted(modules & tree.experts.keys())}
        observers = Observers(model, experts, sorted(modules - experts.keys()), statistics={})
        with ExitStack() as stack:
            stack.enter_context(observers.attached())
            stack.enter_context(ending_at_the_head(model))

            def resume(number: int) -> None:
                self._harvest(observers)
                self._text = number
                observers.see(self.texts[number].attention_mask)

            def enter(layer: int, why: Pass) -> None:
                is_first = why is Pass.FIRST
                observers.ignored = None if is_first else tree.layers[layer]
                observers.stream = Stream({}, self._sites(layer)) if is_first else None

            steps = self.streamed.run(
                [partial(self._call, text) for text in self.texts],
                on_resume=resume,
                on_layer=enter,
                keep_embeddings=reads_text_twice(runnable(model)),
                second=self,
            )
            for layer in stack.enter_context(closing(steps)):
                self._harvest(observers)
                observers.stream, observers.ignored = None, tree.layers[layer]
                if layer in layers:
                    self._choose_layer(layer)
                self._rows.clear()
                self._squares.clear()
                self.on_event(LayerFolded(layer, len(tree.layers)))
                layers.discard(layer)
                if not layers:
                    break
        return Factors(self.exponents, choices=[choice.to_dict() for choice in self.choices])

    def _call(self, text: Batch, model: Any) -> None:
        read_batch(runnable(model), text, self.streamed.device)

    # -------------------------------------------------------------------------------- the rows

    def _reader(self, fold: Fold) -> LinearWeight:
        """A quantized weight of a fold: where it reads, the activation is recorded."""
        return next(linear for linear in fold.linears if linear.name in self.plan.schemes)

    def _sites(self, layer: int) -> frozenset[str]:
        folds = (fold for fold in self.folds.values() if fold.layer == layer)
        return frozenset(observed_site(self._reader(fold)) for fold in folds)

    def _harvest(self, observers: Observers) -> None:
        """Keep some of the rows that the text which ran last has shown."""
        if observers.stream is None:
            return
        part = self.parts[self._text]
        count = -(-ROWS[part] // self.parts.count(part))
        for site, recorded in observers.stream.recorded.items():
            is_down = recorded[0].experts is not None and site.endswith(".down")
            for expert, rows_RI in _by_expert(recorded) if is_down else [(None, _joined(recorded))]:
                if part == "fit":
                    squares, number = self._squares.get((site, expert), (0.0, 0))
                    added = rows_RI.double().square().sum(dim=0).cpu()
                    self._squares[site, expert] = squares + added, number + len(rows_RI)
                if expert is None or expert in self._looked_at[site]:
                    self._rows[site, expert, part].append(_spread(rows_RI, count).float().cpu())
        observers.stream.recorded.clear()

    def _experts_to_look_at(self) -> Mapping[str, set[int]]:
        """Some experts of each site of downs."""
        experts: dict[str, list[int]] = defaultdict(list)
        for fold in self.folds.values():
            site, expert = self._place(fold)
            if expert is not None:
                experts[site].append(expert)
        return {site: set(_spread_items(sorted(of), EXPERTS)) for site, of in experts.items()}

    def _place(self, fold: Fold) -> tuple[str, int | None]:
        """The site where a fold's activation is recorded, and its expert, if it is of one."""
        reader = self._reader(fold)
        return observed_site(reader), reader.expert if fold.kind is Kind.UP else None

    def _quantized(self, fold: Fold) -> list[LinearWeight]:
        """The quantized weights of a fold that are looked at."""
        return _some([linear for linear in fold.linears if linear.name in self.plan.schemes])

    def _sizes_of(self, fold: Fold) -> Sizes | None:
        """The sizes of a fold's channels; None if there are too few rows."""
        squares, count = self._squares.get(self._place(fold), (None, 0))
        if squares is None or count < LEAST_ROWS:
            return None
        weights = torch.cat([self._values(linear) for linear in self._quantized(fold)])
        return Sizes((squares / count).sqrt(), rms(weights))

    def _site_of(self, fold: Fold) -> Site | None:
        """The rows of a fold's activation, and what reads it; None if there are too few rows."""
        place, empty_RI = self._place(fold), torch.empty(0, fold.channels)
        rows = {part: torch.cat(self._rows.get((*place, part), [empty_RI])) for part in ROWS}
        if min(map(len, rows.values())) < LEAST_ROWS:
            return None
        readers = [
            Reader(x.name, self._values(x), self.plan.schemes[x.name], x.scale_group)
            for x in self._quantized(fold)
        ]
        return Site(rows["fit"], rows["choose"], rows["judge"], readers)

    def _values(self, linear: LinearWeight) -> Tensor:
        region = linear.region
        return region.view(self.streamed.held.slab(region.key, *region.slab)).float()

    # ------------------------------------------------------------------------------ the choice

    def _choose_layer(self, layer: int) -> None:
        groups: dict[str, list[Fold]] = defaultdict(list)
        for fold in self.folds.values():
            if fold.layer == layer:
                name = fold.name if fold.kind is Kind.NORM else fold.linears[0].input_site
                groups[name].append(fold)
        choices: list[FoldChoice] = []
        of_layer: dict[str, Tensor] = {}
        for name, folds in groups.items():
            smoothing, factors = self._choose_group(folds)
            if smoothing is None:
                continue
            choices.append(FoldChoice(name, layer, folds[0].kind, smoothing, len(factors)))
            if smoothing.is_kept:
                of_layer |= factors
        if of_layer and not self._is_exact(layer, of_layer):
            choices = [replace(choice, is_exact=False) for choice in choices]
            of_layer.clear()
        self.choices += choices
        self.exponents |= of_layer

    def _choose_group(self, folds: Sequence[Fold]) -> tuple[Smoothing | None, dict[str, Tensor]]:
        """Choose for one norm, or for all ups of an experts module."""
        sites = [site for fold in folds if (site := self._site_of(fold)) is not None]
        if not sites:
            return None, {}
        smoothing, factors = smooth(sites), dict[str, Tensor]()
        for fold in folds:
            sizes = self._sizes_of(fold)
            if sizes is not None:
                factors[fold.name] = sizes.exponents(smoothing.a, smoothing.b)
        return smoothing, {name: k for name, k in factors.items() if bool(k.any())}

    def _is_exact(self, layer: int, factors: Mapping[str, Tensor]) -> bool:
        """True if the folded layer computes what the source's does, bit for bit."""
        source = self.streamed.weights(layer)
        expected = self._output(layer)
        keys = {
            region.key
            for name in factors
            for region in (*self.folds[name].writers, *self.folds[name].readers)
        }
        folded = FoldedSource(self.streamed.held, self.folds, Factors(factors))
        self.streamed.load(layer, folded, self._with_siblings(layer, keys))
        result = self._output(layer)
        self.streamed.use(source)
        is_same = len(expected) == len(result) > 0
        return is_same and all(map(torch.equal, expected, result))

    def _with_siblings(self, layer: int, keys: set[str]) -> set[str]:
        """Raw tensors with all others that become the same parameters."""
        tensors = self.plan.inventory.tensors
        parameters = {name for key in keys for name in tensors[key].parameters}
        return {
            key
            for key in self.streamed.keys_of(layer)
            if parameters.intersection(tensors[key].parameters)
        }

    def _output(self, layer: int) -> list[Tensor]:
        """The tensors that a layer returns for the first text."""
        tensors: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            values = output if isinstance(output, tuple | list) else (output,)
            tensors.extend(x.clone() for x in values if isinstance(x, Tensor))

        with self.streamed.layers[layer].register_forward_hook(keep):
            self.streamed.run_again(layer, 0)
        return tensors


def _joined(recorded: Sequence[RecordedRows]) -> Tensor:
    """All rows but those of padding."""
    parts = []
    for rows in recorded:
        rows_RI = rows.rows_RI.reshape(-1, rows.rows_RI.shape[-1])
        if rows.experts is not None:
            is_text = rows.experts >= 0
            rows_RI = rows_RI[is_text if is_text.ndim == 1 else is_text.any(dim=1)]
        parts.append(rows_RI)
    return torch.cat(parts)


def _by_expert(recorded: Sequence[RecordedRows]) -> Iterator[tuple[int, Tensor]]:
    """Each expert and its rows."""
    of_expert: dict[int, list[Tensor]] = defaultdict(list)
    for rows in recorded:
        assert rows.experts is not None
        number_R, row_R = by_expert(rows.experts)
        for expert in torch.unique(number_R).tolist():
            of_expert[expert].append(rows.rows_RI[row_R[number_R == expert]])
    for expert, parts in of_expert.items():
        yield expert, torch.cat(parts)


def _spread(rows_RI: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spread."""
    if len(rows_RI) <= count:
        return rows_RI
    return rows_RI[torch.linspace(0, len(rows_RI) - 1, count).long().to(rows_RI.device)]


def _spread_items(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def _some(linears: Sequence[LinearWeight]) -> list[LinearWeight]:
    """All linear weights but experts', and the whole scale groups of a few experts."""
    experts = sorted({linear.expert for linear in linears if linear.expert is not None})
    looked_at = set(_spread_items(experts, EXPERTS))
    return [x for x in linears if x.expert is None or x.expert in looked_at]
