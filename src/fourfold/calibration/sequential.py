# SPDX-License-Identifier: Apache-2.0
"""Quantize the parts of a layer one after the other, each on what the parts before it compute.

    q, k, v  →  o  →  gate, up of all experts  →  down of all experts

Each of these is a **stage**: weights that read activations which no other weight of the stage has
changed. Before a stage is quantized, the texts run through the layer twice: as the source computes,
and as the layers and stages that are quantized already do, with inputs, keys and values rounded as
engines round them. From both come, for inputs x of the source and x̂ of the quantized stream,

    H = Σ x̂·x̂ᵀ    and    C = Σ (x − x̂)·x̂ᵀ,

the second moment that algorithms minimize, and the cross moment that tells them how far the inputs
have moved (`algorithms.second_order`).

The rows of one batch are in memory at a time. Sums are those of `statistics.second_moment`: they do
not depend on how ranks share out the batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

from torch import Tensor

from fourfold.calibration.asymmetry import Energies, confirmed_part, energies, predictor
from fourfold.calibration.kv_cache import KVCache, States, why_exact
from fourfold.calibration.observers import Observers
from fourfold.calibration.scales import ActivationScales
from fourfold.calibration.statistics import Sites, reduced
from fourfold.calibration.stream import RecordedRows, Stream, differences
from fourfold.calibration.streaming import LayerWeights, StreamedModel
from fourfold.distributed.machine import give_back_memory
from fourfold.distributed.ranks import Ranks
from fourfold.models.inventory import LinearWeight
from fourfold.models.names import SINGLE_EXPERT
from fourfold.models.roles import Role
from fourfold.planning import Plan, ScaleGroup
from fourfold.planning.rows import observed_site
from fourfold.sources.codecs.base import InputRounding
from fourfold.statistics import STATISTICS, Site, State
from fourfold.statistics.second_moment import SecondMoment
from fourfold.storage.source import Source

HELD_OUT = 8
"""One of so many batches is held out for that choice."""

SiteRows = Sequence[tuple[RecordedRows, Tensor | None]]
"""Rows of the quantized stream at a site, and how each differs from the source's, if known."""

MLP_ROLES = frozenset({Role.EXPERTS, Role.SHARED_EXPERTS, Role.MLP})


class Quantizer(Protocol):
    """Quantizes scale groups when calibration asks for it."""

    def quantize(self, groups: Sequence[ScaleGroup]) -> None:
        """Quantize some groups."""

    def source(self, source: Source) -> Source:
        """Return a view of a source in which these groups have their quantized values."""

    def clear(self) -> None:
        """Forget the groups of a layer, which is written."""


@dataclass(frozen=True)
class Stage:
    """Scale groups that are quantized at the same time."""

    groups: tuple[ScaleGroup, ...]

    @property
    def linears(self) -> list[LinearWeight]:
        """The linear weights of the stage."""
        return [linear for group in self.groups for linear in group.linears]


class SequentialLayers:
    """Quantizes layer after layer of a streamed model."""

    def __init__(
        self,
        plan: Plan,
        streamed: StreamedModel,
        scales: ActivationScales,
        ranks: Ranks,
        batches: int,
        on_batch: Callable[[int, int], object] = lambda *_: None,
    ) -> None:
        """Prepare for a number of batches, which all ranks together have.

        Of this rank's calls, the first half are the source's stream, the others the quantized one.
        `on_batch` is called with a layer and a call's number whenever a stage has seen its texts.
        """
        self.on_batch = on_batch
        self.plan, self.streamed, self.scales, self.ranks = plan, streamed, scales, ranks
        self.batches = range(ranks.rank, batches, ranks.size)
        self.held_out = frozenset(
            range(batches)[HELD_OUT - 1 :: HELD_OUT] or range(1, batches)[-1:]
        )
        self.calls = range(len(self.batches), 2 * len(self.batches))
        self.asymmetric = plan.recipe.calibration.asymmetric
        self.kv_format = plan.recipe.kv_format
        """The format of keys and values in the quantized stream; None if they are not rounded."""
        if self.kv_format is not None:
            facts = KVCache(self.kv_format), plan.inventory, streamed.held.config
            if why_exact(streamed.model, *facts) is not None:
                self.kv_format = None
        self.quantizer: Quantizer | None = None
        """Set before the first layer."""
        self._groups: dict[int | None, list[ScaleGroup]] = defaultdict(list)
        for group in plan.groups:
            self._groups[group.linears[0].layer].append(group)
        self._quantized: dict[int, LayerWeights] = {}

    def stream(self, layer: int) -> Stream:
        """Return what rounds the inputs of a layer in the quantized stream."""
        return Stream(self._roundings(layer), round_states=self._round_states(layer))

    def weights(self, layer: int) -> LayerWeights:
        """Return the parameters of a layer with its quantized values, and forget them."""
        return self._quantized.pop(layer)

    def quantize_layer(self, layer: int, observers: Observers) -> None:
        """Quantize a layer, stage by stage. Its statistics are complete, and it is loaded."""
        assert self.quantizer is not None
        raw: Source = self.streamed.held
        if not raw.fetching.is_transient:  # they are on the disk; memory is for moments
            self.streamed.held.release()
            raw = self.streamed.held.source
            give_back_memory()
        source = quantized = self.streamed.weights(layer)
        orders = self.ranks.gather(observers.order)  # a rank may lack sites that no token reached
        order = list(dict.fromkeys(site for of_rank in orders for site in of_rank))
        stages = stages_of(self._groups[layer], order)
        for number, stage in enumerate(stages):
            later = {
                observed_site(linear)
                for other in stages[number + 1 :]
                for linear in other.linears
                if linear.expert is None
            }
            self._measure(stage, later, layer, observers, (source, quantized))
            self.quantizer.quantize(stage.groups)
            self.scales.drop_large(self.streamed.tree.layers[layer])
            self.streamed.use(quantized)
            keys = {linear.region.key for linear in stage.linears}
            self.streamed.load(layer, self.quantizer.source(raw), keys)
            give_back_memory()  # the values of experts, one by one
            quantized = self.streamed.weights(layer)
        self.streamed.use(source)
        self._quantized[layer] = quantized

    def done(self) -> None:
        """Forget a layer that is written."""
        assert self.quantizer is not None
        self.quantizer.clear()

    def _measure(
        self,
        stage: Stage,
        later: Collection[str],
        layer: int,
        observers: Observers,
        weights: tuple[LayerWeights, LayerWeights],
    ) -> None:
        """Add the moments that the algorithms of a stage need, of all ranks, to the statistics.

        Nothing else refers to them, so that their memory is free once they are not needed.
        """
        sites: dict[Site, set[str]] = defaultdict(set)
        for linear in stage.linears:
            for name in self.plan.algorithm_needs(linear):
                sites[self.plan.site(linear, name)].add(name)
        if not sites:
            return
        states = {site: self._new(site, needs) for site, needs in sites.items()}
        shown = count()

        def rows_of(calls: Iterable[int]) -> Iterator[tuple[Site, SiteRows]]:
            for call in calls:
                yield from self._rows_of(call, layer, observers, weights, sites, later)
                self.on_batch(layer, next(shown))

        is_split = self.asymmetric == "auto"
        held_out = self.held_out if is_split else ()
        training, checks = (
            [call for call, batch in enumerate(self.batches) if (batch in held_out) == is_check]
            for is_check in (False, True)
        )
        for site, rows in rows_of(training):
            self._add(states[site], sites[site], rows)
        if is_split:
            predictors = self._predictors(sites, states)
            found: dict[str, list[Energies]] = {site.name: [] for site in sites}
            for site, rows in rows_of(checks):
                self._add(states[site], sites[site], rows)
                for statistic, k in predictors[site]:
                    found[site.name] += [
                        energies(statistic, k, recorded.rows_RI, moved, recorded.experts)
                        for recorded, moved in rows
                        if moved is not None
                    ]
            of_ranks = self.ranks.gather(found)
            for site in sites:
                of_site = [Energies(*x) for of_rank in of_ranks for x in of_rank[site.name]]
                self.scales.asymmetry[site.name] = confirmed_part(of_site)
        for name, sums in self._reduced(states).items():
            self.scales.statistics.sites.setdefault(name, {}).update(sums)

    def _predictors(
        self, sites: Mapping[Site, set[str]], states: Mapping[Site, State]
    ) -> dict[Site, list[tuple[SecondMoment, Tensor]]]:
        """What predicts the change of inputs at each site, given this rank's sums."""
        sums, device = self._reduced(states), self.streamed.device
        return {
            site: [
                (statistic, predictor(statistic, sums[site.name]).to(device))
                for statistic in map(STATISTICS.__getitem__, needs)
                if isinstance(statistic, SecondMoment)
            ]
            for site, needs in sites.items()
        }

    def _reduced(self, states: Mapping[Site, State]) -> Sites:
        """The sums of all ranks, on the CPU."""
        return reduced(self.ranks, {site.name: on_cpu(state) for site, state in states.items()})

    def _new(self, site: Site, needs: set[str]) -> State:
        state: State = {}
        for name in needs:
            statistic = STATISTICS[name]
            state |= statistic.new(site, self.streamed.device)
            if self.asymmetric and isinstance(statistic, SecondMoment):
                state |= statistic.new_cross(site, self.streamed.device)
        return state

    def _rows_of(
        self,
        call: int,
        layer: int,
        observers: Observers,
        weights: tuple[LayerWeights, LayerWeights],
        sites: Iterable[Site],
        later: Collection[str],
    ) -> Iterator[tuple[Site, SiteRows]]:
        """Run one batch through a layer, in both streams; yield the rows of each site."""
        source, quantized = weights
        names = frozenset(site.name for site in sites)
        round_states = self._round_states(layer)
        stream = Stream(self._roundings(layer), names, later, round_states)
        twin = Stream({}, names, later)
        self._run(layer, len(self.batches) + call, observers, stream, quantized)
        if self.asymmetric:
            self._run(layer, call, observers, twin, source)
        for site in sites:
            rows, of_source = stream.recorded[site.name], twin.recorded[site.name]
            moved: Sequence[Tensor | None] = [None] * len(rows)
            if SINGLE_EXPERT.search(site.name):  # the streams may route other tokens to it
                of_source = []
            if self.asymmetric:
                moved = differences(rows, of_source, by_expert=site.name.endswith(".down"))
            yield site, list(zip(rows, moved, strict=True))

    def _add(self, state: State, needs: Iterable[str], rows: SiteRows) -> None:
        for statistic in map(STATISTICS.__getitem__, needs):
            for recorded, moved in rows:
                statistic.update(state, recorded.rows_RI, recorded.experts)
                if moved is not None and isinstance(statistic, SecondMoment):
                    statistic.update_cross(state, recorded.rows_RI, moved, recorded.experts)

    def _run(
        self, layer: int, call: int, observers: Observers, stream: Stream, weights: LayerWeights
    ) -> None:
        self.streamed.use(weights)
        observers.stream = stream
        self.streamed.run_again(layer, call)
        observers.stream = None

    def _round_states(self, layer: int) -> Callable[[Tensor, Tensor], States] | None:
        """What rounds keys and values in a layer, as the KV cache of an engine does."""
        if self.kv_format is None:
            return None
        path = self.streamed.tree.layers[layer]
        scales = {
            self.streamed.tree.layers[job.layer]: self.scales.kv(job)
            for job in self.plan.kv_scales
            if job.layer == layer
        }
        return partial(KVCache(self.kv_format, scales).round, path)

    def _roundings(self, layer: int) -> Mapping[str, InputRounding]:
        """How inputs are rounded in a layer, by site."""
        roundings: dict[str, InputRounding] = {}
        for group in self._groups[layer]:
            scheme = group.scheme
            if scheme.activations is None:
                continue
            for linear in group.linears:
                scale = self.scales.scale_of(linear) if scheme.has_input_scale else None
                roundings[observed_site(linear)] = InputRounding(scheme.activations, scale)
        return roundings


def on_cpu(state: State) -> State:
    """Return a state whose tensors are on the CPU."""
    return {name: tensor.cpu() for name, tensor in state.items()}


def stages_of(groups: Sequence[ScaleGroup], order: Sequence[str]) -> list[Stage]:
    """Return the stages of a layer.

    Args:
        groups: The layer's scale groups.
        order: The sites of the layer in the order in which its module first calls them.

    A stage is one activation, as q, k and v read it. The MLPs and experts of a layer make two: all
    that read its hidden states, and all that read what those compute.
    """
    places = {site: place for place, site in enumerate(order)}
    linears = [linear for group in groups for linear in group.linears]

    def place(linear: LinearWeight) -> int:
        return places.get(observed_site(linear), len(places))

    def first(key: Callable[[LinearWeight], str]) -> dict[str, int]:
        firsts: dict[str, int] = {}
        for linear in linears:
            firsts[key(linear)] = min(firsts.get(key(linear), len(places)), place(linear))
        return firsts

    of_input, of_parent = first(lambda x: x.input_site), first(_parent)
    mlp = min((place(x) for x in linears if x.role in MLP_ROLES), default=0)
    stages: dict[tuple[int, bool], list[ScaleGroup]] = defaultdict(list)
    for group in groups:
        linear = group.linears[0]
        if linear.role in MLP_ROLES:
            is_second = of_input[linear.input_site] > of_parent[_parent(linear)]
            stages[mlp, is_second].append(group)
        else:
            stages[of_input[linear.input_site], False].append(group)
    return [Stage(tuple(stages[key])) for key in sorted(stages)]


def _parent(linear: LinearWeight) -> str:
    """The module that holds a linear layer, or the experts module."""
    return linear.module if linear.expert is not None else linear.module.rpartition(".")[0]
