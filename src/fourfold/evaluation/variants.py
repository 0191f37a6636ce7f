# SPDX-License-Identifier: Apache-2.0
"""Many variants of one model beside the model itself, in one pass through its layers.

A **variant** says of some components (`planning.components`) which option they have; all others are
as in the source. Every variant reads every window, as an ordinary call of the model that pauses
before each layer (`calibration.streaming`), so neither the model nor the layers of all variants
have to fit into memory. Where two variants have the same options in all layers up to one, that
layer computes once, and the other call goes on with a copy of its output:

    layer 0    source ─┬──────────┬── …     three variants of layer 0 and the source: 4 computations
               variants of layer 0: │ │ │
    layer 1    source ─┬─ …  and those of layer 0 and of layer 1: 7 computations

So a variant costs the layers from the first one on in which it differs from its neighbor in the
order of options, and the others cost nothing. That is exact if a layer's output is all that it
changes. It is checked: where a copy was handed on, the next layer must be called with the same
values as in the call that computed. If not, everything is computed for every variant.

**What a component computes with.** Weights have the values of their codes, which are chosen as when
they are written, by the recipe's algorithm if that looks at weights alone, by `mse` if it needs
statistics. Inputs are rounded as engines round them; the largest input of a site, from which its
scale comes, is that of the source on the same windows. Models compute in float32.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fourfold.algorithms.base import algorithm_of
from fourfold.calibration.activations import ActivationStore
from fourfold.calibration.observers import Observers
from fourfold.calibration.saved_activations import digest_of
from fourfold.calibration.scales import CONSTANT_INPUT_SCALE
from fourfold.calibration.statistics import DataSummary, Statistics
from fourfold.calibration.stream import Stream
from fourfold.calibration.streaming import LayerWeights, Pass, copied
from fourfold.distributed.machine import memory_available
from fourfold.distributed.ranks import Ranks
from fourfold.errors import ResourceError
from fourfold.evaluation.figures import Measured
from fourfold.evaluation.loading import OpenedModel
from fourfold.evaluation.predictions import DTYPE, check_predicts_text, state_store
from fourfold.evaluation.reference import Prediction, predict
from fourfold.events import OnEvent, WindowEvaluated, ignore
from fourfold.execution import ExecutionContext
from fourfold.execution.ahead import GroupsAhead
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.models.experts import Projection
from fourfold.models.internals import runnable
from fourfold.models.inventory import LinearWeight
from fourfold.planning import Plan, ScaleGroup
from fourfold.planning.components import Component
from fourfold.planning.rows import observed_site
from fourfold.recipes.budget import AS_SOURCE
from fourfold.sources.codecs.base import InputRounding
from fourfold.storage.output import OutputFolder
from fourfold.storage.source import Source
from fourfold.storage.units import size

TOP = 1024
"""How many of the source's likeliest tokens are compared one by one; the others count as one."""

Variant = Mapping[str, str]
"""By a component's name, its option; components that are not named are as in the source."""

Choices = tuple[str, ...]
"""Options of the components of a layer, in their order."""


class _NotSharedError(Exception):
    """A layer changes more than what it returns, so that its output cannot stand for it."""


def check_memory(
    plan: Plan, device: str = "cpu", *, processes: int = 1, available: int | None = None
) -> None:
    """Raise `ResourceError` if variants of a layer do not fit into memory.

    Args:
        plan: How the recipe quantizes the source.
        device: Where the model runs. The memory of a GPU is not checked.
        processes: The number of processes of this machine that measure.
        available: Bytes of free memory; by default those of this machine.
    """
    needed = processes * plan.variants_memory
    available = memory_available() if available is None else available
    if device == "cpu" and needed > available:
        among = f" on {processes} ranks" if processes > 1 else ""
        raise ResourceError(
            f"recipe {plan.recipe.name}: {size(needed)} of memory are needed{among} to measure "
            f"components in several formats, {size(available)} are available. Measure on a machine "
            "with more memory, or on a GPU."
        )


class Variants:
    """Measures variants of a source on the same windows; the source itself runs once."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        components: Sequence[Component],
        windows: Sequence[Tensor],
        *,
        device: str = "cpu",
        threads: int,
        activation_memory: int | None = None,
        scratch: Path | None = None,
        shares: bool = True,
        on_event: OnEvent = ignore,
    ) -> None:
        """Build the model; nothing is read or run yet.

        Args:
            plan: How the recipe quantizes the source.
            source: The checkpoint.
            components: The plan's components.
            windows: The token ids that are read, each int64 [W].
            device: The device that the model runs on.
            threads: Threads that quantize.
            activation_memory: Bytes of hidden states in memory; None for half of what is free.
            scratch: The folder of a file for those beyond that.
            shares: False computes every layer for every variant.
            on_event: Called with a `WindowEvaluated` for windows that have passed a layer.
        """
        self.plan, self.components, self.windows = plan, components, windows
        self.device, self.scratch, self.on_event = device, scratch, on_event
        self.activation_memory, self.shares = activation_memory, shares
        self.opened = OpenedModel(source, dtype=DTYPE, device=device, reads_text_once=True)
        check_predicts_text(runnable(self.opened.model))
        held = self.opened.streamed.held  # the present layer's tensors are in memory
        context = ExecutionContext(plan, held, OutputFolder(Path()), threads)
        self.exchange = _Exchange(self.opened, context, components)
        self.inputs = _Inputs(plan, components)
        self.source_predictions: dict[int, Prediction] = {}
        """By window, once the source has run."""

    def measure(self, variants: Sequence[Variant], what: str) -> list[Measured]:
        """Measure variants; `what` is what events call them.

        Returns:
            For each variant the KL of every position, in nats, and the other figures of a model.

        Raises:
            ModelError: The model does not predict the next token, fails, or predicts NaN or Inf.
            WeightLostError: A format cannot hold a weight.
        """
        distinct = list(dict.fromkeys(map(self._choices, variants)))
        source = self._choices({})
        if not self.source_predictions:
            distinct = [source, *(x for x in distinct if x != source)]
        measured = self._run(distinct, what)
        return [measured[self._choices(variant)] for variant in variants]

    def _choices(self, variant: Variant) -> tuple[Choices, ...]:
        """The options of all components, layer by layer."""
        options: dict[int, list[str]] = defaultdict(list)
        for component in self.components:
            options[component.layer].append(variant.get(component.name, AS_SOURCE))
        return tuple(tuple(options[layer]) for layer in range(len(self.opened.streamed.layers)))

    def _run(self, distinct: list[tuple[Choices, ...]], what: str) -> dict[Any, Measured]:
        # Variants with equal beginnings are neighbors then, and `bf16` comes before all others.
        ordered = sorted(distinct)
        beginnings = Counter(x[: n + 1] for x in ordered for n in range(len(x)))
        run = _Run(self, ordered, beginnings, what)
        try:
            run.pass_layers()
        except _NotSharedError:
            self.shares = False
            return self._run(distinct, what)
        return dict(zip(ordered, run.measured, strict=True))

    def store(self, calls: int) -> ActivationStore:
        """Return where the hidden states of so many calls wait."""
        tokens = sum(map(len, self.windows)) * calls // len(self.windows)
        return state_store(self.opened, tokens, self.device, self.activation_memory, self.scratch)


class _Run:
    """One pass of variants through the layers."""

    def __init__(
        self,
        owner: Variants,
        ordered: Sequence[tuple[Choices, ...]],
        sharing: Mapping[tuple[Choices, ...], int],
        what: str,
    ) -> None:
        self.owner, self.ordered, self.sharing, self.what = owner, ordered, sharing, what
        self.measured = [Measured() for _ in ordered]
        self.call = 0
        """The number of the call that runs now: windows of a variant one after the other."""
        self.shared_by: tuple[Choices, ...] = ()
        """The options, up to the present layer, of the variants that share outputs now."""
        self.shared: dict[int, tuple[str, Any]] = {}
        """By window, the digest of a layer's arguments, and its output."""
        self.passed = 0

    def pass_layers(self) -> None:
        owner, streamed = self.owner, self.owner.opened.streamed
        calls = range(len(self.ordered) * len(owner.windows))
        with ExitStack() as stack:
            self.observers = stack.enter_context(owner.inputs.observing(owner.opened))
            for index, layer in enumerate(streamed.layers):
                layer.forward = partial(self._forward, index, layer.forward)
                stack.callback(delattr, layer, "forward")
            steps = streamed.run(
                [partial(self._read, number) for number in calls],
                store=owner.store(len(calls)),
                on_resume=self._resume,
                on_layer=self._enter,
                keep_embeddings=False,
            )
            stack.callback(steps.close)
            for layer in steps:
                self.passed = (layer + 1) * len(calls)
                self._say(layer)
                owner.exchange.end()

    def _resume(self, call: int) -> None:
        self.call = call

    def _enter(self, layer: int, _: Pass) -> None:
        self.shared_by = ()
        self.shared.clear()
        counts = Counter(choices[layer] for choices in self.ordered)
        self.owner.exchange.begin(layer, counts.most_common(1)[0][0])

    def _say(self, layer: int) -> None:
        layers = len(self.owner.opened.streamed.layers)
        total = layers * len(self.ordered) * len(self.owner.windows)
        self.owner.on_event(WindowEvaluated(self.what, layer, layers, self.passed, total))

    def _read(self, number: int, model: Any) -> None:
        owner = self.owner
        variant, window = divmod(number, len(owner.windows))
        ids_W = owner.windows[window]
        ids_BW = ids_W[None].to(owner.device, copy=True)
        logits_WV = runnable(model)(input_ids=ids_BW, use_cache=False).logits[0]
        predictions = owner.source_predictions
        if window not in predictions:
            top = min(TOP, logits_WV.shape[-1])
            predictions[window] = predict("the source", window, logits_WV, ids_W, None, top)
        self.measured[variant].add(self.what, window, predictions[window], logits_WV, ids_W)

    def _forward(self, layer: int, exact: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward: what another variant has computed already, or the layer itself."""
        variant, window = divmod(self.call, len(self.owner.windows))
        choices = self.ordered[variant]
        first = choices[: layer + 1]
        is_shared = self.owner.shares and self.sharing[first] > 1
        digest = digest_of((args, kwargs)) if is_shared else ""
        if first != self.shared_by:
            self.shared_by = first
            self.shared.clear()
            self._use(first)
        if is_shared and window in self.shared:
            wanted, output = self.shared[window]
            if digest != wanted:
                raise _NotSharedError
            return copied(output)
        output = exact(*args, **kwargs)
        self.passed += 1
        self._say(layer)
        if is_shared:
            self.shared[window] = digest, copied(output)
        return output

    def _use(self, first: tuple[Choices, ...]) -> None:
        """Give the present layer the weights of a variant, and let its inputs be rounded."""
        owner, layer = self.owner, len(first) - 1
        owner.exchange.use(first[-1])
        if all(option == AS_SOURCE for choices in first for option in choices):
            self.observers.stream = None  # these inputs are the source's
            return
        owner.inputs.take(self.observers)
        roundings = owner.inputs.roundings(owner.exchange.groups(layer, first[-1]))
        self.observers.stream = Stream(roundings)


@dataclass
class _Exchange:
    """The weights of the layer that is loaded, as the options of its components want them."""

    opened: OpenedModel
    context: ExecutionContext
    components: Sequence[Component]
    layer: int = field(default=-1, init=False)
    used: Choices = field(default=(), init=False)
    kept: dict[Choices, LayerWeights] = field(default_factory=dict, init=False)
    """Parameters for a few of the options that come up."""
    often: Choices = field(default=(), init=False)
    """The options that most variants have in this layer."""

    @cached_property
    def ahead(self) -> GroupsAhead:
        """What quantizes."""
        return GroupsAhead(self.context, Ranks(), in_float32=True)

    def begin(self, layer: int, often: Choices) -> None:
        """Start a layer, which has just been loaded; most variants have the options `often`."""
        self.layer, self.often = layer, often
        self.used = (AS_SOURCE,) * len(often)
        self.kept = {self.used: self.opened.streamed.weights(layer)}

    def end(self) -> None:
        """Forget the parameters of a layer, which is freed now."""
        self.kept.clear()

    def groups(self, layer: int, choices: Choices) -> list[ScaleGroup]:
        """The scale groups of a layer that options quantize, with schemes for measuring."""
        components = [component for component in self.components if component.layer == layer]
        return [
            replace(group, scheme=_measuring(group.scheme))
            for component, option in zip(components, choices, strict=True)
            for group in component.groups_in(option)
        ]

    def use(self, choices: Choices) -> None:
        """Give the layer the weights of its components' options."""
        if choices == self.used:
            return
        if choices not in self.kept:
            source = (AS_SOURCE,) * len(choices)
            self.kept = {x: w for x, w in self.kept.items() if x in (source, self.often)}
            self.kept[choices] = self._quantized(choices, source)
        self.opened.streamed.use(self.kept[choices])
        self.used = choices

    def _quantized(self, choices: Choices, source: Choices) -> LayerWeights:
        streamed = self.opened.streamed
        streamed.use(self.kept[source])
        groups = self.groups(self.layer, choices)
        # What rounds inputs is not a matter of weights, and needs no scale here.
        weights_only = [replace(x, scheme=replace(x.scheme, activations=None)) for x in groups]
        self.ahead.quantize(weights_only)
        keys = {linear.region.key for group in groups for linear in group.linears}
        streamed.load(self.layer, self.ahead.source(streamed.held), keys)
        self.ahead.clear()
        return streamed.weights(self.layer)


def _measuring(scheme: Scheme) -> Scheme:
    """The scheme that stands for another while it is measured: without statistics of inputs."""
    if not algorithm_of(scheme).needs:
        return scheme
    return replace(scheme, algorithm="mse", options=())


class _Inputs:
    """The scales of rounded inputs, from the largest inputs that the source has."""

    def __init__(self, plan: Plan, components: Sequence[Component]) -> None:
        self.statistics = Statistics(DataSummary("", "", 0, 0, 0))
        self.linears = [linear for component in components for linear in component.linears]
        self.amaxes: dict[str, float] = {}
        """By input site, once it is known."""
        self.readers: dict[str, list[LinearWeight]] = defaultdict(list)
        for linear in self.linears:
            self.readers[linear.input_site].append(linear)

    @contextmanager
    def observing(self, opened: OpenedModel) -> Iterator[Observers]:
        """Attach observers to everything that may be rounded."""
        modules, tree = {linear.module for linear in self.linears}, opened.streamed.tree
        experts = {path: tree.experts[path] for path in sorted(modules & tree.experts.keys())}
        observers = Observers(opened.model, experts, sorted(modules - experts.keys()))
        with observers.attached():
            yield observers

    def take(self, observers: Observers) -> None:
        """Take what was observed of the present layer, unless it is known."""
        fresh = Statistics(self.statistics.data)
        observers.take(fresh)
        for site, state in fresh.sites.items():
            self.statistics.sites.setdefault(site, state)

    def roundings(self, groups: Sequence[ScaleGroup]) -> dict[str, InputRounding]:
        """How inputs are rounded, by observed site, where these groups are quantized."""
        roundings = {}
        for group in groups:
            scheme = group.scheme
            if scheme.activations is not None:
                for linear in group.linears:
                    scale = self._scale(linear, scheme) if scheme.has_input_scale else None
                    roundings[observed_site(linear)] = InputRounding(scheme.activations, scale)
        return roundings

    def _scale(self, linear: LinearWeight, scheme: Scheme) -> float:
        if not scheme.observes_inputs:
            return CONSTANT_INPUT_SCALE
        assert scheme.activations is not None
        if linear.input_site not in self.amaxes:
            readers = self.readers[linear.input_site]
            self.amaxes[linear.input_site] = max(map(self._amax, readers))
        amax = self.amaxes[linear.input_site] * 2.0**scheme.headroom
        return FORMATS[scheme.activations].input_scale(amax)

    def _amax(self, linear: LinearWeight) -> float:
        """The largest input of a module; 0 if no token reached it."""
        if linear.expert is None:
            single = self.statistics.linear_of(linear.module)
            return 0.0 if single is None else single.amax
        experts = self.statistics.experts_of(linear.module)
        if experts is None:
            return 0.0
        is_down = linear.projection is Projection.DOWN
        return float((experts.down_amax if is_down else experts.gate_up_amax).max())
