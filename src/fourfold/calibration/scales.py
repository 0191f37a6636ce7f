# SPDX-License-Identifier: Apache-2.0
"""Scales of activations and of the KV cache, computed from statistics.

    input_scale = amax / (6·448)        of an input site, by the recipe's `amax`:
        max          2^headroom times the largest input of everything that reads the site
        histogram    max(2¹⁴ · p₁, p₉₉.₉₉) of the percentiles of block amaxes (below)
        constant     a scale of 1, whatever the inputs: nothing is observed
    k_scale     = amax / 448            of the keys after rotary embedding; v_scale likewise

Block scales are E4M3: from 2⁻⁶, below which they lose digits, to 448, a bit less than 2¹⁵ apart.
Under the input scale of `max` a block that is 2¹⁴ times smaller than the largest keeps all digits.
`histogram` gives away what of this range the inputs do not use: the amax may be 2¹⁴ times that of
the block which 1 % of all blocks do not exceed, so that inputs beyond what calibration saw do not
saturate. Where inputs use all of the range, and more, blocks beyond the 99.99th percentile do. Bins
are rounded towards the smaller room below, and towards the larger above.

An expert that no token reached shares the scale of its layer's site. A site that no token reached
is an error. A site that saw only zeros gets the scale 1, as an all-zero weight does.
"""

from __future__ import annotations

import threading
from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from fourfold.calibration.asymmetry import Asymmetry
from fourfold.calibration.statistics import ModelSummary, Statistics
from fourfold.errors import CalibrationError, ObservationError
from fourfold.formats.base import FORMATS
from fourfold.formats.nvfp4.e4m3 import E4M3_MAX
from fourfold.models.expert_hooks import Product
from fourfold.models.inventory import LinearWeight
from fourfold.models.names import SINGLE_EXPERT, natural
from fourfold.planning import KVScales, Plan
from fourfold.statistics import BLOCK_AMAXES, KEPT, STATISTICS, State, statistic_of
from fourfold.statistics.block_amaxes import percentile
from fourfold.storage.names import STATISTICS as FILE

CONSTANT_INPUT_SCALE = 1.0
"""For NVFP4, that of the amax 2688."""

_E4M3_RANGE = 2.0**14
_SMALL_BLOCKS, _LARGE_BLOCKS = 1.0, 99.99
"""Percentiles of block amaxes."""


def model_summary(plan: Plan) -> ModelSummary:
    """Return the summary of the model that a plan quantizes."""
    return ModelSummary(plan.inventory.architecture, plan.inventory.digest)


class ActivationScales:
    """The scales that a plan asks for, computed from statistics."""

    def __init__(self, plan: Plan, statistics: Statistics) -> None:
        self.plan, self.statistics = plan, statistics
        self.asymmetry: dict[str, Asymmetry] = {}
        """The part of the change of its inputs that the weights of a site make up for, where it
        was chosen by what held-out texts confirm."""
        self._lock = threading.Lock()
        self._states: dict[tuple[str, str, int], State] = {}
        """Finished states, by site and statistic."""

    def drop_large(self, module: str = "") -> None:
        """Drop all statistics but those that are kept, of sites inside a module, or everywhere."""
        self.statistics.drop_large(module)
        self._states.clear()

    def amax(self, site: str) -> float:
        """Return the largest input that anything at an input site saw.

        Raises:
            ObservationError: No calibration token reached the site.
        """
        linears = self.plan.sites[site]
        is_expert = linears[0].expert is not None
        amaxes = [self._amax(linear) for linear in (linears[:1] if is_expert else linears)]
        seen = [amax for amax in amaxes if amax is not None]
        if not seen:
            raise ObservationError(
                f"{site}: no calibration token reached it ({linears[0].name} and "
                f"{len(linears) - 1} more). Use other or more calibration data, or a keep pattern."
            )
        return max(seen)

    def _amax(self, linear: LinearWeight) -> float | None:
        """The largest input of a linear layer, or of all experts of an experts module."""
        if linear.expert is None:
            single = self.statistics.linear_of(linear.module)
            return None if single is None else single.amax
        amaxes = self._expert_amaxes(linear)
        return None if amaxes is None else float(amaxes.max())

    def _expert_amaxes(self, linear: LinearWeight) -> Tensor | None:
        """The largest input `[E]` of an expert's product; None if no expert saw a token."""
        experts = self.statistics.experts_of(linear.module)
        if experts is None or not int(experts.tokens.sum()):
            return None
        is_down = linear.input_site.endswith(f".{Product.DOWN}")
        return experts.down_amax if is_down else experts.gate_up_amax

    def input_scale(self, site: str) -> float:
        """Return the observed `input_scale` of every linear weight at a site; never 0."""
        scheme = self.plan.scheme_of(self.plan.sites[site][0])
        assert scheme.activations is not None
        amax = self.amax(site) * 2.0**scheme.headroom
        if scheme.amax == "histogram":
            amax = histogram_amax(self._block_amaxes(site), amax)
        return FORMATS[scheme.activations].input_scale(amax)

    def scale_of(self, linear: LinearWeight) -> float:
        """Return the stored scale of a linear weight's inputs."""
        if not self.plan.scheme_of(linear).observes_inputs:
            return CONSTANT_INPUT_SCALE
        return self.input_scale(linear.input_site)

    def _block_amaxes(self, site: str) -> Tensor:
        """The histogram of an input site; of experts that are modules of their own, their sum."""
        names = {self.plan.site_of(linear, BLOCK_AMAXES) for linear in self.plan.sites[site]}
        states = (self.statistics.sites.get(name, {}) for name in names)
        return torch.stack([x[BLOCK_AMAXES] for x in states if BLOCK_AMAXES in x]).sum(dim=0)

    def tokens(self, linear: LinearWeight) -> int | None:
        """Return how many tokens were routed to an expert, or how many rows a linear layer saw."""
        if linear.expert is None:
            single = self.statistics.linear_of(linear.module)
            return single.rows if single is not None else None
        experts = self.statistics.experts_of(linear.module)
        return int(experts.tokens[linear.expert]) if experts is not None else None

    def own_amax(self, linear: LinearWeight) -> float | None:
        """Return the largest input that this linear weight itself saw; None if it saw none."""
        if linear.expert is None:
            return self._amax(linear)
        amaxes = self._expert_amaxes(linear) if self.tokens(linear) else None
        return None if amaxes is None else float(amaxes[linear.expert])

    def statistics_of(self, linear: LinearWeight) -> dict[str, Tensor]:
        """Return what an algorithm reads of the inputs that a linear weight itself saw.

        These are the tensors of their finished states, by name; zeros if no row reached the weight.
        """
        tensors: dict[str, Tensor] = {}
        for name in self.plan.algorithm_needs(linear):
            statistic, state = STATISTICS[name], self._finished(linear, name)
            has_experts = self.plan.site(linear, name).experts is not None
            number = linear.expert if has_experts else None
            tensors |= state if number is None else statistic.of_expert(state, number)
        return tensors

    def asymmetry_of(self, linear: LinearWeight) -> float:
        """Return the part of the change of its inputs that a weight makes up for."""
        stated = self.plan.recipe.calibration.asymmetric
        if stated != "auto":
            return stated
        sites = (self.plan.site(linear, name).name for name in self.plan.algorithm_needs(linear))
        return max((self.asymmetry[x].part for x in sites if x in self.asymmetry), default=0.0)

    def asymmetric_gain_of(self, linear: LinearWeight) -> float | None:
        """Return the part of the squared change of a weight's inputs that it makes up for on
        held-out texts; None if that was not measured."""
        sites = (self.plan.site(linear, name).name for name in self.plan.algorithm_needs(linear))
        gains = [self.asymmetry[site].gain for site in sites if site in self.asymmetry]
        return max(gains, default=None)

    def _finished(self, linear: LinearWeight, name: str) -> State:
        """A statistic's finished state at the site of a linear weight."""
        site, statistic = self.plan.site(linear, name), STATISTICS[name]
        collected = self.statistics.sites.get(site.name, {})
        key = site.name, name, id(collected)
        with self._lock:
            if key not in self._states:
                state = {key: x for key, x in collected.items() if statistic_of(key) is statistic}
                if not state and name not in KEPT and self.tokens(linear):
                    raise ObservationError(
                        f"{linear.name}: tokens reached it, and its {name} was not measured. "
                        "This is a defect of fourfold; please report it."
                    )
                self._states[key] = statistic.finish(state or statistic.new(site))
                if name not in KEPT:  # the sums are not needed any more
                    for part in state:
                        del collected[part]
            return self._states[key]

    def unreached(self, layers: Container[int | None] | None = None) -> dict[str, list[int]]:
        """Return the quantized experts that no token reached, by experts module; only those of
        `layers`, if given."""
        unreached: dict[str, list[int]] = {}
        linears = [x for x in self.plan.observed if layers is None or x.layer in layers]
        for path in sorted({linear.module for linear in linears}, key=natural):
            experts = self.statistics.experts_of(path)
            if experts is not None and experts.unreached:
                unreached[path] = experts.unreached
        for linear in linears:  # experts that are linear layers of their own
            match = SINGLE_EXPERT.search(linear.name) if linear.expert is None else None
            if match and self.statistics.linear_of(linear.module) is None:
                numbers = unreached.setdefault(linear.name[: match.start()].rstrip("."), [])
                if int(match["number"]) not in numbers:
                    numbers.append(int(match["number"]))
        return unreached

    def kv(self, job: KVScales) -> tuple[float, float]:
        """Return `k_scale` and `v_scale` of an attention module, as float32 values."""
        path = self.plan.inventory.layer_paths[job.layer]
        if f"{path}.kv" not in self.statistics.sites:
            raise ObservationError(
                f"{job.name}: calibration saw no keys and values there. "
                "Choose `kv_cache: {format: fp8, scale: cast}`, which needs none."
            )
        key, value = (_kv_scale(amax) for amax in self.statistics.kv_of(path))
        return key, value

    def check(self, layer: int | None) -> None:
        """Raise `ObservationError` if anything that a layer needs was not observed; None stands for
        the non-layer tensors."""
        for site, linears in self.plan.sites.items():
            if linears[0].layer == layer and self.plan.scheme_of(linears[0]).observes_inputs:
                self.amax(site)
        for job in self.plan.kv_scales:
            if job.layer == layer:
                self.kv(job)

    def check_all(self) -> None:
        """Raise `ObservationError` if anything that is needed was not observed."""
        for layer in (None, *range(len(self.plan.inventory.layer_paths))):
            self.check(layer)

    def check_fit(self) -> None:
        """Raise `CalibrationError` if the statistics are not of this plan's model."""
        model, wanted = self.statistics.model, model_summary(self.plan)
        if model != wanted:
            raise CalibrationError(
                f"the statistics are of another model: {model.architecture} with other weights "
                f"(digest {model.digest[:12]}) than this {wanted.architecture} "
                f"({wanted.digest[:12]}). Give those of this model."
            )
        if self.plan.recipe.calibration.all_experts and not self.statistics.data.all_experts:
            raise CalibrationError(
                "the statistics were taken without calibration.all_experts, which recipe "
                f"{self.plan.recipe.name} wants. Leave it out, or calibrate again."
            )
        for path in {linear.module for linear in self.plan.observed}:
            experts = self.statistics.experts_of(path)
            count = self.plan.inventory.experts_counts.get(path)
            if experts is not None and len(experts.tokens) != count:
                raise CalibrationError(
                    f"{path}: the statistics are of {len(experts.tokens)} experts, the model has "
                    f"{count}. Give those of this model."
                )
            if experts is None and self.statistics.linear_of(path) is None:
                raise CalibrationError(
                    f"{path}: the statistics have nothing of it. "
                    "Give those of this model, from a recipe that quantizes as much."
                )
        for linear in self.plan.observed:
            missing = self.plan.needs_of(linear) - KEPT
            if BLOCK_AMAXES in self.plan.needs_of(linear) and not self._has_histogram(linear):
                missing |= {BLOCK_AMAXES}
            for name in sorted(missing):
                raise CalibrationError(
                    f"{linear.name}: recipe {self.plan.recipe.name} needs the statistic {name}, "
                    f"which {FILE} does not hold. Calibrate again, with `calib`."
                )
        self.check_all()

    def _has_histogram(self, linear: LinearWeight) -> bool:
        """True unless rows reached a weight's site and no histogram is there."""
        state = self.statistics.sites.get(self.plan.site_of(linear, BLOCK_AMAXES), {})
        return BLOCK_AMAXES in state or not state


def histogram_amax(histogram: Tensor, observed: float) -> float:
    """Return the largest input that an input scale shall hold.

    Args:
        histogram: Block amaxes of the inputs, as `statistics.block_amaxes` counts them.
        observed: The largest input of all.
    """
    small, _ = percentile(histogram, _SMALL_BLOCKS)
    _, large = percentile(histogram, _LARGE_BLOCKS)
    return max(_E4M3_RANGE * small, min(large, observed))


def _kv_scale(amax: float) -> float:
    tiny = float(np.finfo(np.float32).tiny)
    return max(float(np.float32(amax) / np.float32(E4M3_MAX)), tiny) if amax else 1.0
