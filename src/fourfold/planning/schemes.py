# SPDX-License-Identifier: Apache-2.0
"""Find the rule of a recipe that decides about each linear weight, and the scheme it gives."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from fourfold.errors import PlanError, RecipeError
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.models.inventory import Inventory, LinearWeight
from fourfold.models.peculiarities import peculiarities_of
from fourfold.recipes import QUANTIZABLE_ROLES, Recipe, Rule

_NUMBER = re.compile(r"\d+")


def check_roles(recipe: Recipe, inventory: Inventory) -> None:
    """Raise an error unless the model has the roles that the recipe quantizes, and they can be."""
    rules = [rule for rule in recipe.all_rules if not rule.keep]
    quantized = frozenset(role for rule in rules for role in rule.all_roles)
    for key, reason in inventory.blocked.items():
        role = inventory.tensors[key].role
        if role in quantized:
            raise PlanError(
                f"{key}: {reason}, so its weights cannot be cut out and quantized. "
                f"Leave the role {role} out of the recipe."
            )
    present = {role for role, count in inventory.roles.items() if count}
    shown = ", ".join(f"{role} ({count})" for role, count in inventory.roles.items())
    for name in (name for rule in recipe.all_rules for name in rule.roles):
        if name not in present:
            raise RecipeError(f"recipe {recipe.name}: the model has no {name}. It has: {shown}.")
    if all(rule.all_roles for rule in rules) and not quantized & present:
        raise RecipeError(
            f"recipe {recipe.name}: the model has none of {', '.join(sorted(quantized))}. "
            f"It has: {shown}."
        )


def rules_of_linears(recipe: Recipe, inventory: Inventory) -> dict[str, Rule]:
    """Return the first rule that matches, by the name of the linear weight.

    A pattern, or a whole rule, that matches nothing is a `RecipeError`. What an engine cannot load
    quantized in this family, or in this format, is kept unless a rule names it.
    """
    peculiar = peculiarities_of(*inventory.model_types)
    present = {role for role, count in inventory.roles.items() if count}
    decided: dict[str, Rule] = {}
    for number, rule in enumerate(recipe.all_rules, start=1):
        if rule.all_roles and not rule.all_roles & present:
            continue  # all of them optional
        label = f"recipe {recipe.name}: " + (f"rule {number}: " if recipe.rules else "")
        linears = [linear for linear in inventory.linears if _has_role(rule, linear)]
        if not rule.keep and not rule.names:
            uneven = _uneven(linears, FORMATS[rule.weights.format].row_block)
            linears = [
                linear
                for linear in linears
                if not peculiar.kept_because(linear.name)
                and (linear.expert is not None or linear.scale_group not in uneven)
            ]
        names = _matching(rule, [linear.name for linear in linears], label)
        left = [name for name in names if name not in decided]
        if recipe.rules and not left:
            raise RecipeError(
                f"{label}earlier rules decide about all that it matches, and the first match "
                "wins. Move it up or remove it."
            )
        decided |= dict.fromkeys(left, rule)
    return decided


def pattern_of(rule: Rule, name: str) -> str | None:
    """Return the pattern of a rule that a name matches."""
    return next((pattern for pattern in rule.names if fnmatchcase(name, pattern)), None)


def _has_role(rule: Rule, linear: LinearWeight) -> bool:
    if rule.all_roles:
        return linear.role in rule.all_roles
    return rule.keep or linear.role in QUANTIZABLE_ROLES


def _matching(rule: Rule, names: Sequence[str], label: str) -> Iterable[str]:
    """The names that match one of the rule's patterns, all of which must match something."""
    if not rule.names:
        return names
    matching: dict[str, None] = {}
    for pattern in rule.names:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = _nearest(pattern, names)
            hint = f" The nearest: {', '.join(near)}." if near else ""
            kind = "keep pattern" if rule.keep else "pattern"
            raise RecipeError(
                f"{label}{kind} {pattern!r} matches no linear weight of this model.{hint}"
            )
        matching |= dict.fromkeys(matches)
    return matching


def check_fused(linears: Iterable[LinearWeight], schemes: Mapping[str, Scheme]) -> None:
    """Raise `PlanError` unless weights that engines fuse have schemes that fit together."""
    first: dict[tuple[str, str], LinearWeight] = {}  # by kind and name of what engines fuse
    for linear in linears:
        scheme = schemes[linear.name]
        other = first.setdefault(("group", linear.scale_group), linear)
        if schemes[other.name] != scheme:
            raise PlanError(_differ(linear, other, "engines fuse them"))
        if linear.expert is not None:
            other = first.setdefault(("module", linear.module), linear)
            theirs = schemes[other.name]
            if (theirs.weights, theirs.activations) != (scheme.weights, scheme.activations):
                raise PlanError(_differ(linear, other, "engines run a layer's experts as one"))
        if scheme.has_input_scale:
            other = first.setdefault(("site", linear.input_site), linear)
            theirs = schemes[other.name]
            if (theirs.headroom, theirs.amax) != (scheme.headroom, scheme.amax):
                raise PlanError(_differ(linear, other, "they share the scale of their input"))


def check_blocks_of_rows(linears: Iterable[LinearWeight], schemes: Mapping[str, Scheme]) -> None:
    """Raise `PlanError` if blocks of rows would reach over two weights that engines fuse.

    One weight of a fused layer may end within a block: the last one, as DeepSeek's kv_a_proj.
    """
    by_format: dict[str, list[LinearWeight]] = defaultdict(list)
    for linear in linears:
        by_format[schemes[linear.name].weights].append(linear)
    for name, members in by_format.items():
        fmt = FORMATS[name]
        for one, other in _uneven(members, fmt.row_block).values():
            raise PlanError(
                f"{one.name} and {other.name}: engines fuse them, and {one.shape[0]} and "
                f"{other.shape[0]} outputs are no multiples of {fmt.row_block}, as {fmt.title} "
                "needs. Choose another format for them, or keep all that engines fuse with them."
            )


def blocks_reach_over(linears: Iterable[LinearWeight], row_block: int) -> bool:
    """True if blocks of rows would reach over two weights that engines fuse."""
    return bool(_uneven(linears, row_block))


def _uneven(
    linears: Iterable[LinearWeight], row_block: int
) -> dict[str, tuple[LinearWeight, LinearWeight]]:
    """Return the scale groups in which two weights or more end within a block: the first two."""
    ends: dict[str, list[LinearWeight]] = defaultdict(list)
    for linear in linears:
        if linear.shape[0] % row_block:
            ends[linear.scale_group].append(linear)
    return {group: (one[0], one[1]) for group, one in ends.items() if len(one) > 1}


def _differ(one: LinearWeight, other: LinearWeight, why: str) -> str:
    return (
        f"{one.name} and {other.name}: different rules of the recipe quantize them, but {why}. "
        "Let one rule match both."
    )


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
