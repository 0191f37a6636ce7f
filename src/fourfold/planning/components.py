# SPDX-License-Identifier: Apache-2.0
"""What mixed precision may store in another format: components, and their options.

A **component** is what engines want in one format: the linear weights that they fuse (q, k and v;
gate and up), or all routed experts of a layer. An **option** is the name of a way to store it:

    recipe      as the rules of the recipe say
    w4a16       NVFP4 weights of the same algorithm, inputs in 16 bits
    fp8, …      FP8 weights in the format of that name, and inputs in the same
    bf16        as the source has it

Only components inside decoder layers are listed: what lies outside of them (a head, MTP layers)
stays as the recipe says.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import Layout
from fourfold.models.inventory import LinearWeight
from fourfold.models.names import SINGLE_EXPERT, natural
from fourfold.models.roles import Role
from fourfold.planning.plan import Plan
from fourfold.planning.rows import ScaleGroup
from fourfold.planning.schemes import blocks_reach_over, rules_of_linears
from fourfold.recipes import Activations, Recipe, Rule, Weights
from fourfold.recipes.budget import AS_RECIPE, AS_SOURCE, W4A16
from fourfold.storage.safetensors_header import BITS, nbytes_of


@dataclass(frozen=True)
class Component:
    """Linear weights that are stored in one format."""

    name: str
    """The names of its weights, with what differs in braces; for experts, that of the module which
    holds them."""
    role: Role
    layer: int
    groups: tuple[ScaleGroup, ...]
    """Its scale groups, with the schemes of the recipe."""
    layout: Layout

    @cached_property
    def linears(self) -> tuple[LinearWeight, ...]:
        """Its linear weights."""
        return tuple(linear for group in self.groups for linear in group.linears)

    @cached_property
    def numel(self) -> int:
        """The number of weights, of all its matrices together."""
        return sum(math.prod(linear.shape) for linear in self.linears)

    def has(self, option: str) -> bool:
        """True if the component can be stored so, and the option is another than the recipe's."""
        if option in (AS_RECIPE, AS_SOURCE):
            return True
        if all(_scheme(option, group.scheme) == group.scheme for group in self.groups):
            return False
        if option == W4A16 and not self.is_nvfp4(AS_RECIPE):
            return False
        fmt = FORMATS[_scheme(option, self.groups[0].scheme).weights]
        return all(x.shape[1] % fmt.block == 0 for x in self.linears) and not blocks_reach_over(
            self.linears, fmt.row_block
        )

    def groups_in(self, option: str) -> tuple[ScaleGroup, ...]:
        """Return its scale groups with the schemes of an option; none for the source's."""
        if option == AS_SOURCE:
            return ()
        return tuple(replace(group, scheme=_scheme(option, group.scheme)) for group in self.groups)

    def is_nvfp4(self, option: str) -> bool:
        """True if the weights are NVFP4 then."""
        return any(group.scheme.weights == "nvfp4" for group in self.groups_in(option))

    def nbytes(self, option: str) -> int:
        """Return the bytes that the component takes in a checkpoint."""
        if option == AS_SOURCE:
            return sum(math.prod(x.shape) * BITS[x.dtype] // 8 for x in self.linears)
        return sum(
            nbytes_of(spec.dtype, spec.shape)
            for group in self.groups_in(option)
            for linear in group.linears
            for spec in self.layout.tensors(linear.name, linear.shape, group.scheme).values()
        )


def _scheme(option: str, scheme: Scheme) -> Scheme:
    """The scheme of an option, for a weight for which the recipe has `scheme`."""
    if option == AS_RECIPE:
        return scheme
    if option == W4A16:
        return replace(scheme, activations=None, headroom=0, amax="max")
    return Scheme(option, "max", option)


def title_of(option: str, component: Component) -> str:
    """Return how an option of a component is called in tables: "NVFP4 W4A4", "FP8", "BF16"."""
    if option == AS_SOURCE:
        return "/".join(sorted({linear.dtype for linear in component.linears}))
    scheme = component.groups_in(option)[0].scheme
    title = FORMATS[scheme.weights].title
    if scheme.weights != "nvfp4":
        return title
    return f"{title} {'W4A16' if scheme.activations is None else 'W4A4'}"


def components_of(plan: Plan) -> list[Component]:
    """Return the components of a plan, layer after layer."""
    members: dict[str, list[ScaleGroup]] = defaultdict(list)
    for group in plan.groups:
        linear = group.linears[0]
        if linear.layer is not None and linear.role is not Role.MTP:
            members[_key(linear)].append(group)
    components = []
    for groups in members.values():
        linears = [linear for group in groups for linear in group.linears]
        layer = linears[0].layer
        assert layer is not None
        name = _name_of([_pattern(linear) for linear in linears])
        components.append(Component(name, linears[0].role, layer, tuple(groups), plan.layout))
    return sorted(components, key=lambda component: (component.layer, natural(component.name)))


def _key(linear: LinearWeight) -> str:
    """A name that all weights of a component share; it may stand for several experts modules."""
    if expert := SINGLE_EXPERT.search(linear.name):
        return linear.name[: expert.start()]
    return linear.scale_group if linear.expert is None else linear.module


def _pattern(linear: LinearWeight) -> str:
    """The weight's name; of a routed expert's, with `*` in place of the expert's number."""
    return SINGLE_EXPERT.sub("*", linear.name)


def _name_of(patterns: Iterable[str]) -> str:
    """One name for weights: `model.layers.0.mlp.experts`, `….self_attn.{q,k,v}_proj`."""
    names = list(dict.fromkeys(patterns))
    if "*" in names[0]:
        return names[0].partition(".*")[0]
    if len(names) == 1:
        return names[0]
    parent, _, _ = names[0].rpartition(".")
    leaves = [name.removeprefix(f"{parent}.") for name in names]
    tail = re.search(r"_[a-z]+$", leaves[0])
    if tail and all(leaf.endswith(tail[0]) for leaf in leaves):
        return f"{parent}.{{{','.join(x.removesuffix(tail[0]) for x in leaves)}}}{tail[0]}"
    return f"{parent}.{{{','.join(leaves)}}}"


def promoted(plan: Plan, options: Mapping[str, str], components: Sequence[Component]) -> Recipe:
    """Return a plan's recipe with rules by name for components that are stored otherwise.

    Args:
        plan: The plan of the recipe itself.
        options: By the names of components, the option of each that is not `recipe`.
        components: The plan's components.
    """
    recipe = plan.recipe
    rules_of = rules_of_linears(recipe, plan.inventory)
    promotions: list[Rule] = []
    for component in components:
        option = options.get(component.name, AS_RECIPE)
        if option != AS_RECIPE:
            patterns: dict[Rule, dict[str, None]] = defaultdict(dict)
            for linear in component.linears:
                patterns[rules_of.pop(linear.name)][_pattern(linear)] = None
            promotions += [_rule(option, rule, tuple(names)) for rule, names in patterns.items()]
    if not promotions:
        return recipe.model_copy(update={"budget": None})
    needed = set(rules_of.values())  # a rule that matches nothing more would be an error
    return recipe.with_rules([*promotions, *(x for x in recipe.all_rules if x in needed)])


def _rule(option: str, rule: Rule, names: tuple[str, ...]) -> Rule:
    """The rule that gives an option to the weights of these names, for which `rule` is now."""
    if option == AS_SOURCE:
        return Rule(names=names, keep=True)
    if option == W4A16:
        return Rule(names=names, weights=rule.weights)
    weights = Weights(format=option, scale="max", scale_group=rule.weights.scale_group)
    return Rule(names=names, weights=weights, activations=Activations(format=option))
