"""From statistics to what is written: `input_scale` of every input site, `k_scale`, `v_scale`.

    input_scale = f · amax / (6·448)    amax over all that read the site, f = 2^headroom
    k_scale     = amax / 448            of the keys after rotary embedding; v_scale likewise

An expert that no token reached shares its layer's site and needs nothing of its own. A site that
nothing reached is an error. A site that only saw zeros gets 1, as an all-zero weight does.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np

from fourfold.calibration.statistics import ModelSummary, Statistics
from fourfold.errors import CalibrationError, ObservationError
from fourfold.formats import nvfp4
from fourfold.layouts.modelopt import FP8_MAX
from fourfold.models.inventory import SINGLE_EXPERT, LinearWeight, natural
from fourfold.models.watching import Product
from fourfold.planning import KVScales, Plan
from fourfold.recipes.schema import Activations


def model_summary(plan: Plan) -> ModelSummary:
    """What statistics must be of, to serve a plan."""
    return ModelSummary(plan.inventory.architecture, plan.inventory.digest)


class ActivationScales:
    """The scales that a plan asks for, from what calibration found."""

    def __init__(self, plan: Plan, statistics: Statistics) -> None:
        self.plan, self.statistics = plan, statistics

    @cached_property
    def _factor(self) -> float:
        activations = self.plan.recipe.activations
        return activations.factor if isinstance(activations, Activations) else 1.0

    def amax(self, site: str) -> float:
        """The largest input that anything at an input site saw.

        Raises `ObservationError` where nothing reached it.
        """
        found = [self._amax(linear) for linear in self._readers(site)]
        seen = [amax for amax in found if amax is not None]
        if not seen:
            readers = self.plan.sites[site]
            raise ObservationError(
                f"{site}: no calibration token reached it ({readers[0].name} and "
                f"{len(readers) - 1} more). Use other or more calibration data, or a keep pattern."
            )
        return max(seen)

    def _readers(self, site: str) -> Iterable[LinearWeight]:
        linears = self.plan.sites[site]
        return linears[:1] if linears[0].module in self.statistics.experts else linears

    def _amax(self, linear: LinearWeight) -> float | None:
        """Of one reader's module: of all its experts, for an experts module."""
        experts = self.statistics.experts.get(linear.module)
        if experts is None:
            single = self.statistics.linears.get(linear.module)
            return single.amax if single is not None else None
        if not int(experts.tokens.sum()):
            return None
        is_down = linear.input_site.endswith(f".{Product.DOWN}")
        amaxes = experts.down_amax if is_down else experts.gate_up_amax
        return float(amaxes.max())

    def input_scale(self, site: str) -> float:
        """What is written as `input_scale` of every linear weight at a site; never 0."""
        return nvfp4.global_scale(self.amax(site) * self._factor)

    def tokens(self, linear: LinearWeight) -> int | None:
        """How many tokens were routed to an expert; how many rows a linear layer saw."""
        if linear.expert is None:
            single = self.statistics.linears.get(linear.module)
            return single.rows if single is not None else None
        experts = self.statistics.experts.get(linear.module)
        return int(experts.tokens[linear.expert]) if experts is not None else None

    def own_amax(self, linear: LinearWeight) -> float | None:
        """The largest input that this linear weight itself saw; None where it saw none."""
        if linear.expert is None or not self.tokens(linear):
            return None if linear.expert is not None else self._amax(linear)
        experts = self.statistics.experts[linear.module]
        is_down = linear.input_site.endswith(f".{Product.DOWN}")
        amaxes = experts.down_amax if is_down else experts.gate_up_amax
        return float(amaxes[linear.expert])

    def unreached(self) -> dict[str, list[int]]:
        """Experts that no token reached, by experts module, of those that the plan quantizes."""
        found: dict[str, list[int]] = {}
        for path in sorted({linear.module for linear in self.plan.linears}, key=natural):
            experts = self.statistics.experts.get(path)
            if experts is not None and experts.unreached:
                found[path] = experts.unreached
        for linear in self.plan.linears:  # experts that are layers of their own
            number = SINGLE_EXPERT.search(linear.name)
            if linear.expert is None and number and linear.module not in self.statistics.linears:
                experts_of = found.setdefault(linear.name[: number.start()].rstrip("."), [])
                experts_of += [int(number["number"])] * (int(number["number"]) not in experts_of)
        return found

    def kv(self, job: KVScales) -> tuple[float, float]:
        """`k_scale` and `v_scale` of an attention module, float32."""
        path = self.plan.inventory.layer_paths[job.layer]
        if path not in self.statistics.kv:
            raise ObservationError(
                f"{job.name}: calibration saw no keys and values there. "
                "Choose `kv_cache: {format: fp8, scale: cast}`, which needs none."
            )
        key, value = (_kv_scale(amax) for amax in self.statistics.kv[path])
        return key, value

    def check(self, layer: int | None) -> None:
        """Raise `ObservationError` where anything that a unit needs was not seen."""
        for site, linears in self.plan.sites.items():
            if linears[0].layer == layer:
                self.amax(site)
        for job in self.plan.kv_scales:
            if job.layer == layer:
                self.kv(job)

    def check_fit(self) -> None:
        """Raise where these statistics are not of this plan's model."""
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
        for path in {linear.module for site in self.plan.sites.values() for linear in site}:
            experts = self.statistics.experts.get(path)
            count = self.plan.inventory.experts_counts.get(path)
            if experts is not None and len(experts.tokens) != count:
                raise CalibrationError(
                    f"{path}: the statistics are of {len(experts.tokens)} experts, the model has "
                    f"{count}. Give those of this model."
                )
            if experts is None and path not in self.statistics.linears:
                raise CalibrationError(
                    f"{path}: the statistics have nothing of it. "
                    "Give those of this model, from a recipe that quantizes as much."
                )
        for layer in (None, *range(len(self.plan.inventory.layer_paths))):
            self.check(layer)


def _kv_scale(amax: float) -> float:
    tiny = float(np.finfo(np.float32).tiny)
    return max(float(np.float32(amax) / np.float32(FP8_MAX)), tiny) if amax else 1.0
