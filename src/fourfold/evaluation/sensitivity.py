# SPDX-License-Identifier: Apache-2.0
"""`fourfold sensitivity`: what each component of a model costs in each format, measured.

For every component (weights that engines fuse, or all routed experts of a layer) and every option,
the KL divergence of the source with that component alone in that option. `variants` says what is
computed.

**Cost.** A component's variant runs the layers from its own to the last. So a token costs, in
multiply-adds,

    Σ over layers of  (1 + variants of this and all earlier layers) · weights of the layer in use

As many tokens are read as `MOST_TOKENS`, or as the limit `MULTIPLY_ADDS` allows, but at least
`LEAST_TOKENS`: for a large model a few hundred. benchmarks/sensitivity.py says how well these rank.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fourfold.calibration.encoding import Encoder
from fourfold.calibration.padding import pad_ids
from fourfold.config import EvaluationConfig
from fourfold.documents import Shown, document
from fourfold.evaluation.figures import Interval, mean_interval
from fourfold.evaluation.variants import Variants, check_memory
from fourfold.evaluation.windows import Windows, read_windows
from fourfold.events import OnEvent, ignore
from fourfold.planning import Plan
from fourfold.planning.components import Component, components_of, title_of
from fourfold.planning.work import active_weights
from fourfold.recipes.budget import AS_RECIPE, AS_SOURCE, CANDIDATES
from fourfold.storage.source import Source
from fourfold.storage.units import aligned, printable

MOST_TOKENS, LEAST_TOKENS = 8192, 256
LENGTH = 512
"""Tokens of a window, by default."""
MULTIPLY_ADDS = 2e14
"""About an hour of two CPU cores."""


@dataclass(frozen=True)
class OptionFigures:
    """A component in one format, beside the source. KL in nats a token."""

    option: str
    """As a recipe names it; `recipe` for what the recipe's own rules say."""
    format: str
    """For people: "NVFP4 W4A4"."""
    bits: float
    """Bits for each weight, scales included."""
    kl: float
    kl_interval: Interval | None
    """95 %, by a bootstrap over windows; None for a single window."""


@dataclass(frozen=True)
class ComponentFigures:
    """What one component costs in each option."""

    component: str
    role: str
    layer: int
    weights: int
    options: tuple[OptionFigures, ...]


@dataclass(frozen=True, repr=False)
class Sensitivity(Shown):
    """What each component costs. Printing it gives what the command prints."""

    source: str
    recipe: str
    text: str
    """The name of the file or dataset."""
    text_digest: str
    """SHA-256 of the windows' token ids."""
    windows: int
    length: int
    """Tokens of a window."""
    is_estimate: bool
    """True if fewer tokens were read because the model is large."""
    together: float
    """The KL of all components as the recipe has them, at the same time."""
    components: tuple[ComponentFigures, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return document(
            "sensitivity", **{**vars(self), "components": [asdict(x) for x in self.components]}
        )

    @property
    def headline(self) -> str:
        """The source, the recipe and the text."""
        return (
            f"{printable(self.source)}, recipe {self.recipe}: KL of each component alone on "
            f"{self.windows:,} windows of {self.length:,} tokens from {printable(self.text)}"
        )

    @property
    def remarks(self) -> list[str]:
        """What the figures mean."""
        alone = math.fsum(
            option.kl
            for component in self.components
            for option in component.options
            if option.option == "recipe"
        )
        lines = [
            "KL in nats a token; weights that need statistics of inputs are measured with `mse`",
            f"all components as the recipe has them: {self.together:.3e} together, {alone:.3e} "
            "as a sum",
        ]
        if self.is_estimate:
            lines.append(
                f"an estimate: {self.windows * self.length:,} tokens, because the model is large "
                "(`tokens` reads more)"
            )
        return lines

    def rows(self) -> list[list[str]]:
        """The table: a row for each component, a column for each option, headings first."""
        titles: dict[str, list[str]] = defaultdict(list)
        for component in self.components:
            for figures in component.options:
                titles[figures.option].append(figures.format)
        options = [option for option in (AS_RECIPE, *CANDIDATES) if option in titles]
        heads = [titles[x][0] if len(set(titles[x])) == 1 else "as the recipe" for x in options]
        rows = [["component", "weights", *heads]]
        for component in self.components:
            kl = {figures.option: f"{figures.kl:.2e}" for figures in component.options}
            cells = [kl.get(option, "") for option in options]
            rows.append([printable(component.component), f"{component.weights:,}", *cells])
        return rows

    def __str__(self) -> str:
        return "\n".join([self.headline, *aligned(self.rows(), left=1), *self.remarks])


def measure_sensitivity(
    source: Source,
    plan: Plan,
    config: EvaluationConfig,
    candidates: Sequence[str],
    *,
    device: str = "cpu",
    threads: int = 1,
    on_event: OnEvent = ignore,
) -> Sensitivity:
    """Measure what each component of a plan costs, alone, as the recipe has it and as each
    candidate.

    Args:
        source: The checkpoint, open.
        plan: How the recipe quantizes it.
        config: The text, and how much of it is read.
        candidates: Options of `recipes.budget`, besides those of the recipe.
        device: The device that the model runs on.
        threads: Threads that quantize.
        on_event: Called with a `WindowEvaluated` for windows that have passed a layer.

    Raises:
        CalibrationError, UsageError: The text cannot be read, or is too short.
        ModelError: The model does not predict the next token, or fails.
        ResourceError: The variants of a layer do not fit into memory.
    """
    begun = time.perf_counter()
    check_memory(plan, device)
    components = components_of(plan)
    choices = [
        (component, option)
        for component in components
        for option in (AS_RECIPE, *candidates)
        if option != AS_SOURCE and component.has(option)
    ]
    wanted = tokens_within(cost_of_token(plan, [component for component, _ in choices]))
    windows = _windows(source, plan, config, wanted)
    variants = Variants(
        plan,
        source,
        components,
        list(windows.ids_NW),
        device=device,
        threads=threads,
        activation_memory=config.activation_memory,
        on_event=on_event,
    )
    alone = [{component.name: option} for component, option in choices]
    whole = {component.name: AS_RECIPE for component in components}
    *measured, together = variants.measure([*alone, whole], "components")
    figures: dict[str, list[OptionFigures]] = defaultdict(list)
    for (component, option), of_variant in zip(choices, measured, strict=True):
        kl_N = of_variant.kl_of_windows
        bits = 8 * component.nbytes(option) / component.numel
        title = title_of(option, component)
        figures[component.name].append(
            OptionFigures(option, title, bits, float(kl_N.mean()), mean_interval(kl_N))
        )
    return Sensitivity(
        source=str(source.place),
        recipe=plan.recipe.name,
        text=windows.origin,
        text_digest=windows.digest,
        windows=len(windows.ids_NW),
        length=windows.ids_NW.shape[1],
        is_estimate=config.tokens is None and config.windows is None and wanted < MOST_TOKENS,
        together=float(together.kl_of_windows.mean()),
        components=tuple(
            ComponentFigures(x.name, x.role.value, x.layer, x.numel, tuple(figures[x.name]))
            for x in components
        ),
        seconds=time.perf_counter() - begun,
    )


def cost_of_token(plan: Plan, varied: Sequence[Component]) -> float:
    """Return the multiply-adds of a token in variants, each of one component in `varied`."""
    of_layer = Counter(component.layer for component in varied)
    active = active_weights(plan)
    streams, cost = 1, 0.0
    for layer in range(len(plan.inventory.layer_paths)):
        streams += of_layer[layer]
        cost += streams * active.get(layer, 0.0)
    return cost


def tokens_within(cost: float, limit: float = MULTIPLY_ADDS) -> int:
    """Return how many tokens are read if each costs so many multiply-adds."""
    return int(min(MOST_TOKENS, max(LEAST_TOKENS, limit / max(cost, 1.0))))


def _windows(source: Source, plan: Plan, config: EvaluationConfig, tokens: int) -> Windows:
    """Read the text; `tokens` of it, unless the configuration says how much."""
    longest = plan.inventory.max_positions
    trusted, pads = source.trust_remote_code, pad_ids(source.config)
    hint, size = source.tokenizer_hint, plan.inventory.vocab_size
    encoder = Encoder(source.folder, size, trusted, hint, pads)
    length = config.length or min(LENGTH, tokens, longest or LENGTH)
    own = EvaluationConfig(config.text, length, config.windows, config.tokens)
    windows = read_windows(own, encoder, longest)
    if config.windows is None and config.tokens is None:
        count = max(1, tokens // length)
        windows = Windows(windows.ids_NW[:count], windows.origin)
    return windows
