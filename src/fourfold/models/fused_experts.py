# SPDX-License-Identifier: Apache-2.0
"""Cut a layer's routed experts out of their raw tensors, whatever the family's layout on disk.

This works on small stand-ins for the raw tensors (see `regions`). transformers' conversion turns
them into the experts parameter, the module's parts are sliced out of that, and the positions in a
slice say where that part lies in the raw tensor. Two experts are probed and the others follow their
pattern; the number of elements proves that every byte of the raw tensors belongs to one part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fourfold.errors import ModelError, SourceError
from fourfold.models.experts import ExpertsModule, Part, Projection, part_of
from fourfold.models.families import DEFAULT, family_of
from fourfold.models.module_tree import ModuleTree
from fourfold.models.names import EXPERT_NUMBER
from fourfold.models.regions import Located, Region, locate, number, reduction
from fourfold.storage.safetensors_header import TensorInfo

Sources = Mapping[str | None, Sequence[str]]
"""Raw keys of one parameter, by the conversion's source pattern, ordered by expert."""


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One expert's projection (or its bias): its name in the output, and its place on disk.

    `name` is None for a bias with a raw tensor of its own, which is copied as it is.
    """

    name: str | None
    expert: int
    projection: Projection
    region: Region
    is_bias: bool


def cut_experts(
    module: ExpertsModule,
    tree: ModuleTree,
    sources: Mapping[str, Sources],
    infos: Mapping[str, TensorInfo],
) -> list[ExpertPart]:
    """Return all projections of all experts of one experts module.

    Raises:
        ModelError: if the layout on disk is not one of slices, strides and transpositions.
        SourceError: if experts are missing or have different shapes.
    """
    experts: list[ExpertPart] = []
    for parameter in dict.fromkeys(part.parameter for part in module.parts):
        target = f"{module.path}.{parameter}"
        parts = [part for part in module.parts if part.parameter == parameter]
        try:
            experts += _Cut(module, tree, target, parts, sources[target], infos).run()
        except ModelError as error:
            raise ModelError(f"{target}: {error}") from error
    return experts


def fused_name(model_types: Sequence[str], key: str, expert: int, projection: Projection) -> str:
    """Return the output name of one expert's projection in the fused tensor `key`."""
    family = family_of(*model_types)
    for stack in (*family.stacks, *DEFAULT.stacks):
        match = re.match(stack.key, key)
        if match:
            leaf = getattr(family.names, projection)
            if leaf is None:
                raise ModelError(f"{key}: the family's experts have no {projection}")
            experts = stack.experts.format(stem=match.group("stem"))
            return f"{experts}.{expert}.{leaf}"
    raise ModelError(f"{key}: no name is known for the single experts of this tensor")


class _Cut:
    """Cuts one experts parameter."""

    def __init__(
        self,
        module: ExpertsModule,
        tree: ModuleTree,
        target: str,
        parts: Sequence[Part],
        sources: Sources,
        infos: Mapping[str, TensorInfo],
    ) -> None:
        self.module, self.tree, self.target = module, tree, target
        self.parts, self.sources, self.infos = parts, sources, infos
        self.memory_shape = tree.parameters[target]
        self.keys = [key for group in sources.values() for key in group]
        self.is_fused = all(len(group) == 1 for group in sources.values()) and (
            len(infos[self.keys[0]].shape) == len(self.memory_shape)
        )
        place = tree.conversion.place(self.keys[0])
        self.targets = tree.conversion.targets(place)
        self.is_mixed = len(self.targets) > 1
        """One list of experts on disk becomes several modules in memory (ERNIE 4.5 VL)."""

    def run(self) -> list[ExpertPart]:
        is_stacked = self.parts[0].axes.startswith("(")
        for group in () if self.is_mixed else self.sources.values():
            self._check_alike(group)
            if not is_stacked:
                self._check_count(group)
        experts = self._stacked() if is_stacked else self._probed()
        self._check_cover(experts)
        return experts

    def _check_alike(self, group: Sequence[str]) -> None:
        first = self.infos[group[0]]
        for key in group:
            if self.infos[key].shape != first.shape:
                raise SourceError(
                    f"{key}: shape {list(self.infos[key].shape)}, but {first.key} has "
                    f"{list(first.shape)}. Experts of one layer must be alike."
                )

    def _check_count(self, group: Sequence[str]) -> None:
        """There are as many experts on disk as in the architecture, numbered without a gap."""
        expected = self.module.num_experts
        numbers = [int(number) for key in group for number in EXPERT_NUMBER.findall(key)]
        count = self.infos[group[0]].shape[0] if self.is_fused else len(group)
        if count != expected or not (self.is_fused or numbers == list(range(expected))):
            raise SourceError(
                f"{group[0]}: {count} experts on disk, {expected} in the architecture "
                f"({self.module.path}). Is a shard missing, or the config another model's?"
            )

    def _stacked(self) -> list[ExpertPart]:
        """Cut experts that lie one below the other in a 2-D tensor."""
        (part,), (key,) = self.parts, self.keys
        rows, cols = self.infos[key].shape
        if (rows, cols) != self.memory_shape:
            raise ModelError(f"{key} has shape {[rows, cols]}, not {list(self.memory_shape)}")
        height, transposed = rows // self.module.num_experts, part.axes == "(ei)o"
        regions = [
            Region(key, None, range(e * height, (e + 1) * height), range(cols), transposed)
            for e in range(self.module.num_experts)
        ]
        return [self._expert_part(part, e, region) for e, region in enumerate(regions)]

    def _probed(self) -> list[ExpertPart]:
        """Run the conversion on stand-ins for two experts (for all, if they are mixed)."""
        probed = self._how_many_to_probe()
        skip = 1 if self.is_fused else 0
        memory_dims = [self.tree.parameters[target][1:] for target in self.targets]
        raw_dims = [self.infos[key].shape[skip:] for key in self.keys]
        scale = reduction(*memory_dims, *raw_dims)
        layout: list[tuple[str | None, int]] = []
        shapes: list[tuple[int, ...]] = []
        for pattern, group in self.sources.items():
            for ordinal, key in enumerate(group if self.is_mixed else group[:probed]):
                dims = tuple(size // scale for size in self.infos[key].shape[skip:])
                layout.append((pattern, ordinal))
                shapes.append((probed, *dims) if self.is_fused else dims)
        memory = self._convert(layout, number(shapes), probed, scale)
        experts = []
        for part in self.parts:
            places = [
                locate(part_of(memory, part, expert, probed), shapes, scale)
                for expert in range(probed)
            ]
            experts += self._all_experts(part, places, layout)
        return experts

    def _how_many_to_probe(self) -> int:
        if self.is_mixed:
            return self.memory_shape[0]
        groups = [] if self.is_fused else [len(group) for group in self.sources.values()]
        return min(2, self.memory_shape[0], *groups)

    def _convert(
        self,
        layout: Sequence[tuple[str | None, int]],
        numbers: Sequence[torch.Tensor],
        probed: int,
        scale: int,
    ) -> torch.Tensor:
        """The parameter in memory that the stand-ins `numbers` become."""
        shapes = {
            target: (probed, *(size // scale for size in self.tree.parameters[target][1:]))
            for target in self.targets
        }
        pattern = layout[0][0]
        if pattern is not None and self.tree.conversion.is_ambiguous(
            pattern, self.infos[self.keys[0]].shape
        ):
            raise ModelError(
                f"{self.keys[0]} has shape {list(self.infos[self.keys[0]].shape)}: transformers "
                "tells by the shape whether it is transposed, and this shape fits both ways"
            )
        if pattern is None:
            (memory,) = numbers
        else:
            tensors: dict[str, list[torch.Tensor]] = {}
            for (name, _), tensor in zip(layout, numbers, strict=True):
                tensors.setdefault(str(name), []).append(tensor)
            converted = self.tree.conversion.convert(self.targets[0], pattern, tensors, shapes)
            memory = converted[self.target]
        if tuple(memory.shape) != shapes[self.target]:
            raise ModelError(
                f"{self.keys[0]} has shape {list(self.infos[self.keys[0]].shape)}, which does not "
                f"become {list(self.memory_shape)}. Does config.json belong to this checkpoint?"
            )
        return memory

    def _all_experts(
        self, part: Part, places: Sequence[Located], layout: Sequence[tuple[str | None, int]]
    ) -> list[ExpertPart]:
        """Extend the pattern of the probed experts to all experts."""
        first = places[0]
        spans = first.rows, first.cols, first.transposed
        pattern, start = layout[first.ordinal]
        keys = self.sources[pattern]
        for expert, place in enumerate(places):
            index = place.lead if self.is_fused else layout[place.ordinal][1] - start
            own_spans = place.rows, place.cols, place.transposed
            if index != expert or own_spans != spans or layout[place.ordinal][0] != pattern:
                raise ModelError("its experts do not lie in order")
        if self.is_fused:
            regions = [Region(keys[0], e, *spans) for e in range(self.infos[keys[0]].shape[0])]
        else:
            count = len(places) if self.is_mixed else len(keys)
            regions = [Region(keys[start + e], None, *spans) for e in range(count)]
        return [self._expert_part(part, e, region) for e, region in enumerate(regions)]

    def _expert_part(self, part: Part, expert: int, region: Region) -> ExpertPart:
        name: str | None
        if self.is_fused:
            name = fused_name(self.tree.model_types, region.key, expert, part.projection)
        else:
            name = None if part.is_bias else region.key.removesuffix(".weight")
        return ExpertPart(name, expert, part.projection, region, part.is_bias)

    def _check_cover(self, experts: Sequence[ExpertPart]) -> None:
        """Every element of the raw tensors belongs to exactly one part."""
        parts = sum(math.prod(part.region.shape) for part in experts)
        keys = {part.region.key for part in experts} if self.is_mixed else self.keys
        raw = sum(self.infos[key].numel for key in keys)
        if parts != raw or len({part.region for part in experts}) != len(experts):
            raise ModelError(f"its experts cover {parts:,} of {raw:,} elements")
