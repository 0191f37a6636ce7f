"""Which linear weights a recipe quantizes in a model, and everything that speaks against it."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cached_property

from fourfold.errors import PlanError, RecipeError
from fourfold.layouts import modelopt
from fourfold.models.fusion import kept_because
from fourfold.models.inventory import ExpertBias, Inventory, LinearWeight, RawTensor
from fourfold.models.roles import Role
from fourfold.planning.rows import Action, KVScales, Row, ScaleGroup
from fourfold.recipes import Recipe
from fourfold.storage.safetensors_header import nbytes_of

_NUMBER = re.compile(r"\d+")
QUANTIZABLE_DTYPES = ("BF16", "F16", "F32")


class Selection:
    """Which linear weights a recipe quantizes in this model, checked."""

    def __init__(self, recipe: Recipe, inventory: Inventory) -> None:
        self.recipe, self.inventory = recipe, inventory
        self._check_roles()
        kept = self._match_patterns()
        self.chosen = {
            linear.name: linear
            for linear in inventory.linears
            if linear.role in recipe.roles and linear.name not in kept
        }
        self.kept = kept
        self._check_chosen()
        self._check_wholeness()
        self.modules = {linear.module for linear in self.chosen.values()}

    def _check_roles(self) -> None:
        for key, reason in self.inventory.blocked.items():
            if self.inventory.tensors[key].role in self.recipe.roles:
                raise PlanError(
                    f"{key}: {reason}, so its weights cannot be cut out and quantized. "
                    f"Leave the role {self.inventory.tensors[key].role} out of the recipe."
                )
        present = {role for role, count in self.inventory.roles.items() if count}
        shown = ", ".join(f"{role} ({count})" for role, count in self.inventory.roles.items())
        for role in self.recipe.quantize:
            if role not in present:
                raise RecipeError(
                    f"recipe {self.recipe.name}: the model has no {role}. It has: {shown}."
                )
        if not self.recipe.roles & present:
            raise RecipeError(
                f"recipe {self.recipe.name}: the model has none of "
                f"{', '.join(sorted(self.recipe.roles))}. It has: {shown}."
            )

    def _match_patterns(self) -> dict[str, str]:
        """Linear weights that a `keep` pattern names: name → pattern."""
        names = [linear.name for linear in self.inventory.linears]
        kept: dict[str, str] = {}
        for pattern in self.recipe.keep:
            matches = [name for name in names if fnmatchcase(name, pattern)]
            if not matches:
                near = _nearest(pattern, names)
                hint = f" The nearest: {', '.join(near)}." if near else ""
                raise RecipeError(
                    f"recipe {self.recipe.name}: keep pattern {pattern!r} matches no linear "
                    f"weight of this model.{hint}"
                )
            kept |= dict.fromkeys(matches, pattern)
        return kept

    def _check_chosen(self) -> None:
        if not self.chosen:
            raise RecipeError(f"recipe {self.recipe.name}: keep leaves nothing to quantize.")
        odd = [x for x in self.chosen.values() if x.shape[1] % modelopt.BLOCK_SIZE]
        if odd:
            raise PlanError(
                f"{odd[0].name}: input dimension {odd[0].shape[1]} is not a multiple of "
                f"{modelopt.BLOCK_SIZE} ({len(odd)} such weights). "
                "Add a keep pattern for them to the recipe."
            )
        for linear in self.chosen.values():
            if self.recipe.is_w4a4 and linear.role is Role.MTP:
                raise RecipeError(
                    f"recipe {self.recipe.name}: {linear.name}: transformers does not run MTP "
                    "layers, so their inputs cannot be calibrated. Leave the role mtp out."
                )
            if linear.dtype not in QUANTIZABLE_DTYPES:
                raise PlanError(
                    f"{linear.region.key}: dtype {linear.dtype}; only "
                    f"{', '.join(QUANTIZABLE_DTYPES)} can be quantized. Is it quantized already?"
                )

    def _check_wholeness(self) -> None:
        """Scale groups, and the experts of a layer, are quantized whole or not at all."""
        chosen: dict[str, LinearWeight] = {}
        left: dict[str, LinearWeight] = {}
        for linear in self.inventory.linears:
            side = chosen if linear.name in self.chosen else left
            side.setdefault(linear.scale_group, linear)
            if linear.expert is not None:
                side.setdefault(linear.module, linear)
        for name in chosen.keys() & left.keys():
            raise PlanError(
                f"{left[name].name} would stay as it is while {chosen[name].name} is quantized, "
                f"but engines fuse them. Widen or narrow the recipe's keep patterns "
                f"{list(self.recipe.keep)}."
            )

    def groups(self) -> list[ScaleGroup]:
        members: dict[str, list[LinearWeight]] = defaultdict(list)
        of_layers = self.recipe.weights.scale_group == "layer"
        for linear in self.chosen.values():
            is_shared = of_layers and linear.expert is not None
            members[linear.input_site if is_shared else linear.scale_group].append(linear)
        return [ScaleGroup(name, tuple(linears)) for name, linears in members.items()]

    def biases(self) -> list[ExpertBias]:
        """Fused biases of experts that are written one by one."""
        return [bias for bias in self.inventory.biases if bias.module in self.modules]

    @cached_property
    def _kv_names(self) -> dict[str, tuple[str, str]]:
        linears = [x for x in self.inventory.linears if x.role is Role.ATTENTION]
        return modelopt.kv_scale_names(x.name for x in linears if x.layer is not None)

    def kv_scales(self) -> list[KVScales]:
        """The attention modules whose keys and values get scales."""
        if not self.recipe.calibrates_kv:
            return []
        return [
            KVScales(name, layer, k_name, v_name)
            for name, (k_name, v_name) in self._kv_names.items()
            if (layer := self._layer_of(k_name)) is not None
        ]

    def _layer_of(self, scale: str) -> int | None:
        return self.inventory.tensors[f"{scale.rpartition('.')[0]}.weight"].layer

    def kv_notes(self) -> Iterable[str]:
        """What a user should know of the KV cache's scales."""
        if self.recipe.calibrates_kv and not self._kv_names:
            yield (
                "no attention layer here has a k_proj that engines know a KV scale for (MLA's "
                "latent cache, Wqkv): they take 1.0, and there is nothing to calibrate"
            )

    def row(self, raw: RawTensor) -> Row:
        key, numel, nbytes = raw.info.key, raw.info.numel, raw.info.nbytes
        linears = self.inventory.linears_by_key.get(key, ())
        chosen = [linear for linear in linears if linear.name in self.chosen]
        if chosen:
            after = sum(
                nbytes_of(*spec)
                for linear in chosen
                for spec in modelopt.tensors_of(
                    linear.name, linear.shape, activations=self.recipe.is_w4a4
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
        """Nothing that is copied may be what no engine has a place for beside packed weights."""
        key, dtype = raw.info.key, raw.info.dtype
        stem, _, leaf = key.rpartition(".")
        if stem in self.chosen and leaf not in ("bias", *modelopt.PARTS):
            raise PlanError(
                f"{key} in {raw.info.file.name}: lies beside a weight that is quantized, where "
                "engines know no such tensor. Take it out of the checkpoint."
            )
        if modelopt.LEFTOVER.search(key) or (leaf == modelopt.CODES and dtype == "U8"):
            raise PlanError(
                f"{key} in {raw.info.file.name}: {dtype}, as a quantizer leaves it. "
                "Is the checkpoint quantized already?"
            )

    @cached_property
    def _split_keys(self) -> frozenset[str]:
        return frozenset(bias.region.key for bias in self.biases())

    def _why_kept(self, raw: RawTensor, linears: Sequence[LinearWeight]) -> str:
        pattern = next((self.kept[x.name] for x in linears if x.name in self.kept), None)
        if pattern is not None:
            return f"keep pattern {pattern!r}"
        if not linears:
            return "not a linear weight" if raw.role is not Role.MTP else "MTP"
        return kept_because(raw.stem) or f"role {raw.role} is not in the recipe"


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that are most like a pattern; one of those that differ in numbers alone.

    `difflib` compares letter by letter: too slow for each expert of a large model.
    """
    parts = set(pattern.split("."))
    best: dict[str, tuple[int, str]] = {}
    for name in names:
        shared = sum(part in parts for part in name.split("."))
        kind = _NUMBER.sub("#", name)
        if kind not in best or shared > best[kind][0]:
            best[kind] = shared, name
    return difflib.get_close_matches(pattern, [name for _, name in best.values()], n=3, cutoff=0.3)
