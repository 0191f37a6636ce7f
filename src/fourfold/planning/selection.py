# SPDX-License-Identifier: Apache-2.0
"""The linear weights that a recipe quantizes in a model, and everything that speaks against it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

from fourfold.algorithms.base import algorithm_of
from fourfold.errors import PlanError, RecipeError
from fourfold.formats.base import FORMATS
from fourfold.layouts.base import LAYOUTS
from fourfold.models.fusion import kept_because
from fourfold.models.inventory import ExpertBias, Inventory, LinearWeight, RawTensor
from fourfold.models.peculiarities import peculiarities_of
from fourfold.models.roles import Role
from fourfold.models.ties import FIELD, Tie
from fourfold.planning.rows import Action, KVScales, Row, ScaleGroup
from fourfold.planning.schemes import (
    check_blocks_of_rows,
    check_fused,
    check_roles,
    pattern_of,
    rules_of_linears,
)
from fourfold.recipes import Recipe
from fourfold.storage.safetensors_header import COMPUTE_DTYPES, nbytes_of


class Selection:
    """The linear weights of a model that a recipe quantizes, with their schemes; checked."""

    def __init__(self, recipe: Recipe, inventory: Inventory) -> None:
        """Raises `RecipeError` or `PlanError` if the recipe and the model do not fit."""
        self.recipe, self.inventory = recipe, inventory
        self.layout = LAYOUTS[recipe.layout]
        self._peculiar = peculiarities_of(*inventory.model_types)
        check_roles(recipe, inventory)
        self._rules = rules_of_linears(recipe, inventory)
        self.chosen = {
            linear.name: linear
            for linear in inventory.linears
            if (rule := self._rules.get(linear.name)) is not None and not rule.keep
        }
        if not self.chosen:
            raise RecipeError(f"recipe {recipe.name}: keep leaves nothing to quantize.")
        self.schemes = {name: self._rules[name].scheme for name in self.chosen}
        self._check_schemes()
        self._check_even()
        self._check_chosen()
        self._check_wholeness()
        check_fused(self.chosen.values(), self.schemes)
        check_blocks_of_rows(self.chosen.values(), self.schemes)
        self.layout.check(self.schemes, self._peculiar)
        self.modules = {linear.module for linear in self.chosen.values()}

    def _check_schemes(self) -> None:
        for scheme in dict.fromkeys(self.schemes.values()):
            fmt, inputs = FORMATS[scheme.weights], scheme.activations
            if not algorithm_of(scheme).supports(fmt):
                raise RecipeError(
                    f"recipe {self.recipe.name}: {scheme.algorithm} does not quantize to "
                    f"{fmt.title}. Choose another scale under weights."
                )
            if inputs is not None and not FORMATS[inputs].rounds_activations:
                raise RecipeError(
                    f"recipe {self.recipe.name}: engines do not round activations to {inputs}. "
                    "Choose another format under activations."
                )

    def _check_even(self) -> None:
        """Raise `PlanError` for weights whose rows do not divide into blocks."""
        uneven = [
            linear
            for linear in self.chosen.values()
            if linear.shape[1] % FORMATS[self.schemes[linear.name].weights].block
        ]
        if not uneven:
            return
        first, fused = uneven[0], {name for linear in uneven for name in _fused(linear)}
        kept = [x for x in self.chosen.values() if not fused.isdisjoint(_fused(x))]
        patterns = sorted({_pattern(linear) for linear in kept})
        remedy = (
            f"Add to the recipe: keep: {json.dumps(patterns)}."
            if len(kept) < len(self.chosen)
            else "Engines fuse them with all others that the recipe quantizes: choose other roles."
        )
        raise PlanError(
            f"{first.name}: input dimension {first.shape[1]} is not a multiple of "
            f"{FORMATS[self.schemes[first.name].weights].block} ({len(uneven)} such weights). "
            f"{remedy}"
        )

    def _check_chosen(self) -> None:
        for linear in self.chosen.values():
            if linear.role is Role.MTP and self._rules[linear.name].observes_inputs:
                raise RecipeError(
                    f"recipe {self.recipe.name}: {linear.name}: transformers does not run MTP "
                    "layers, so their inputs cannot be calibrated. Leave the role mtp out."
                )
            if self.inventory.tie is Tie.YES and linear.region.key in self.inventory.tied_keys:
                raise PlanError(
                    f"{linear.name}: config.json ties it to the embedding ({FIELD}), so engines "
                    f"would not read its quantized weight. Leave role {linear.role} out, or set "
                    f"{FIELD} to false in config.json."
                )
            _check_dtype(linear)

    def _check_wholeness(self) -> None:
        """Scale groups, and the experts of a layer, are quantized whole or not at all."""
        chosen: dict[str, LinearWeight] = {}
        left: dict[str, LinearWeight] = {}
        for linear in self.inventory.linears:
            side = chosen if linear.name in self.chosen else left
            for name in _fused(linear):
                side.setdefault(name, linear)
        for name in chosen.keys() & left.keys():
            raise PlanError(
                f"{left[name].name} would stay as it is while {chosen[name].name} is quantized, "
                "but engines fuse them. Widen or narrow the patterns of the recipe."
            )

    def groups(self) -> list[ScaleGroup]:
        """Return the scale groups of the chosen weights."""
        members: dict[str, list[LinearWeight]] = defaultdict(list)
        for linear in self.chosen.values():
            is_of_layer = self._rules[linear.name].weights.scale_group == "layer"
            is_shared = is_of_layer and linear.expert is not None
            members[linear.input_site if is_shared else linear.scale_group].append(linear)
        return [
            ScaleGroup(name, tuple(linears), self.schemes[linears[0].name])
            for name, linears in members.items()
        ]

    def biases(self) -> list[ExpertBias]:
        """Return the fused biases of experts that are written one by one."""
        biases = [bias for bias in self.inventory.biases if bias.module in self.modules]
        for bias in biases:
            _check_dtype(bias)
        return biases

    def kv_scales(self) -> list[KVScales]:
        """Return the attention modules whose keys and values get scales.

        Raises:
            PlanError: The layout cannot state the format of the KV cache.
        """
        kv_format = self.recipe.kv_format
        if kv_format is not None and kv_format not in self.layout.kv_formats:
            raise PlanError(
                f"kv_cache: the {self.layout.name} layout cannot state the format {kv_format}. "
                f"Choose {' or '.join(sorted(self.layout.kv_formats))}, or none."
            )
        is_calibrated = self.recipe.calibrates_kv
        if not is_calibrated and not (kv_format is not None and self.layout.needs_kv_scales):
            return []
        linears = [x for x in self.inventory.linears if x.role is Role.ATTENTION]
        layers = {x.name: x.layer for x in linears if x.layer is not None}
        of_module = {name.rpartition(".")[0]: layer for name, layer in layers.items()}
        return [
            KVScales(module, of_module[module], k_name, v_name, is_calibrated)
            for module, (k_name, v_name) in self.layout.kv_scale_names(layers).items()
        ]

    def row(self, raw: RawTensor) -> Row:
        """Return how the plan treats one tensor of the source."""
        key, numel, nbytes = raw.info.key, raw.info.numel, raw.info.nbytes
        linears = self.inventory.linears_by_key.get(key, ())
        chosen = [linear for linear in linears if linear.name in self.chosen]
        if chosen:
            after = sum(
                nbytes_of(spec.dtype, spec.shape)
                for linear in chosen
                for spec in self.layout.tensors(
                    linear.name, linear.shape, self.schemes[linear.name]
                ).values()
            )
            reason = f"role {raw.role}"
            return Row(key, Action.QUANTIZE, raw.role, reason, numel, nbytes, after, len(chosen))
        if key in self._split_keys:
            reason = "its experts are written one by one"
            return Row(key, Action.SPLIT, raw.role, reason, numel, nbytes, nbytes, 0)
        self._check_copied(raw)
        reason = self._why_kept(raw, linears)
        return Row(key, Action.COPY, raw.role, reason, numel, nbytes, nbytes, 0)

    def _check_copied(self, raw: RawTensor) -> None:
        """Raise `PlanError` if engines have no place for a tensor that is to be copied."""
        key, dtype = raw.info.key, raw.info.dtype
        stem, _, leaf = key.rpartition(".")
        if stem in self.chosen and leaf != "bias" and leaf not in self.layout.part_names:
            raise PlanError(
                f"{key} in {raw.info.file.name}: lies beside a weight that is quantized, where "
                "engines know no such tensor. Take it out of the checkpoint."
            )
        if self.layout.is_leftover(key, dtype):
            raise PlanError(
                f"{key} in {raw.info.file.name}: {dtype}, as a quantizer leaves it. "
                "Is the checkpoint quantized already?"
            )

    @cached_property
    def _split_keys(self) -> frozenset[str]:
        return frozenset(bias.region.key for bias in self.biases())

    def _why_kept(self, raw: RawTensor, linears: Sequence[LinearWeight]) -> str:
        for linear in linears:
            rule = self._rules.get(linear.name)
            if rule is not None and rule.keep:
                pattern = pattern_of(rule, linear.name)
                return f"keep pattern {pattern!r}" if pattern else f"a rule keeps role {raw.role}"
        if not linears:
            return "not a linear weight" if raw.role is not Role.MTP else "MTP"
        why = kept_because(raw.stem) or self._peculiar.kept_because(raw.stem)
        broad = (rule for rule in self.recipe.all_rules if not rule.keep and not rule.names)
        if why is None and any(raw.role in rule.all_roles for rule in broad):
            return "engines fuse it with others, and blocks of rows would reach over two of them"
        return why or f"role {raw.role} is not in the recipe"


def _check_dtype(part: LinearWeight | ExpertBias) -> None:
    """Raise `PlanError` for a weight, or the bias of an expert, that is no float."""
    if part.dtype not in COMPUTE_DTYPES:
        raise PlanError(
            f"{part.region.key}: dtype {part.dtype}; only {', '.join(COMPUTE_DTYPES)} can be "
            "quantized. Is it quantized already?"
        )


def _fused(linear: LinearWeight) -> tuple[str, ...]:
    """Names of what is quantized whole or not at all, and holds a linear weight."""
    experts = () if linear.expert is None else (linear.module,)
    return (linear.scale_group, *experts)


def _pattern(linear: LinearWeight) -> str:
    """A keep pattern for a linear weight in every layer; for an expert, for all of them."""
    name = linear.name if linear.expert is None else f"{linear.module}.*"
    return re.sub(r"\.\d+(?=\.)", ".*", name)
