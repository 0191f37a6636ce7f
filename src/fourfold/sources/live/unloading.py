# SPDX-License-Identifier: Apache-2.0
"""The inverse of loading: raw tensors, read from the parameters that they became in memory.

transformers' conversion turns raw tensors into parameters. It is run on tensors whose elements are
their own positions, and the result is inverted. Nothing here depends on the model's family:

- a raw tensor that is only renamed is its parameter;
- routed experts are cut out of their raw tensors as in the inventory (`fused_experts`), and each
  part is put back where it was cut from: a half, every second row, a transposition;
- everything else (fused q, k, v; interleaved shared experts; rotary permutations of vision towers)
  is converted once with row numbers, or with element numbers if rows are cut; the resulting
  permutation serves all layers of the same shapes.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from fourfold.errors import ModelError
from fourfold.models.experts import Part, part_of
from fourfold.models.fused_experts import cut_experts
from fourfold.models.module_tree import ModuleTree
from fourfold.models.names import natural
from fourfold.models.regions import Region, number
from fourfold.storage.safetensors_header import TensorInfo

Values = Callable[[str], torch.Tensor]
"""Returns the parameter or buffer of a name."""

PROBE_WIDTH = 6
"""Elements of a row that are probed: no half and no pair of them looks like a whole row."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One expert's projection: where it lies in a raw tensor, and in which parameter."""

    region: Region
    parameter: str
    part: Part
    expert: int


_Pieces = dict[int | None, list[_Piece]]
"""The pieces of a raw tensor by expert; None if experts are not one of its dimensions."""


@dataclass(frozen=True, slots=True)
class _Order:
    """The position of each row of concatenated raw tensors in their concatenated parameters."""

    rows: torch.Tensor
    width: int
    """Elements of a row."""


@dataclass(frozen=True)
class _Group:
    """Raw tensors that are converted together, by pattern, and the parameters that they become."""

    targets: tuple[str, ...]
    keys: Mapping[str | None, Sequence[str]]

    @property
    def pattern(self) -> str | None:
        return next(iter(self.keys))

    @property
    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]


class Unloading:
    """Reads raw tensors out of parameters. Safe for many threads."""

    def __init__(self, tree: ModuleTree, infos: Mapping[str, TensorInfo]) -> None:
        self.tree, self.infos = tree, infos
        self.shapes = {
            name: tuple(value.shape) for name, value in tree.conversion.model.state_dict().items()
        }
        self.unplaced: list[str] = []
        """Raw keys that become no parameter of the model."""
        self._groups = self._all_groups()
        self._group_of = {key: group for group in self._groups for key in group.all_keys}
        self._cuts: dict[str, Mapping[str, _Pieces]] = {}
        self._orders: dict[object, _Order] = {}
        self._lock = threading.Lock()

    def _all_groups(self) -> list[_Group]:
        conversion = self.tree.conversion
        groups: dict[tuple[str, ...], dict[str | None, list[str]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for key in sorted(self.infos, key=natural):
            place = conversion.place(key)
            if place.target is None:
                self.unplaced.append(key)
            else:
                groups[tuple(conversion.targets(place))][place.pattern].append(key)
        return [_Group(targets, keys) for targets, keys in groups.items()]

    def parameters(self, key: str) -> Sequence[str]:
        """Return the parameters that `rows` needs for `key`."""
        return self._group_of[key].targets

    def misfit(self) -> str | None:
        """Return why these raw tensors cannot be the model's, or None if they can."""
        covered = {target for group in self._groups for target in group.targets}
        missing = [name for name in self.tree.parameters if name not in covered | self.tree.tied]
        if missing:
            return f"{missing[0]} has no tensor ({len(missing)} such)"
        for group in self._groups:
            raw = sum(self.infos[key].numel for key in group.all_keys)
            if raw != sum(math.prod(self.shapes[target]) for target in group.targets):
                key = group.all_keys[0]
                memory = ", ".join(f"{x} {list(self.shapes[x])}" for x in group.targets)
                return f"{key} {list(self.infos[key].shape)} does not become {memory}"
        return None

    def rows(self, key: str, start: int, stop: int, values: Values) -> torch.Tensor:
        """Return rows `start:stop` of the first dimension of `key`, as a view if possible."""
        group = self._group_of[key]
        if group.pattern is None:
            value = values(group.targets[0])
            return value[start:stop] if value.ndim else value
        if group.targets[0].rpartition(".")[0] in self.tree.experts:
            return self._rows_of_experts(key, group, start, stop, values)
        return self._rows_in_order(key, group, start, stop, values)

    def _rows_of_experts(
        self, key: str, group: _Group, start: int, stop: int, values: Values
    ) -> torch.Tensor:
        cuts = (self._cut(target.rpartition(".")[0]) for target in group.targets)
        pieces, shape = next(cut[key] for cut in cuts if key in cut), self.infos[key].shape
        if None in pieces:
            return self._put(pieces[None], shape, values)[start:stop]
        return _stack([self._put(pieces[e], shape[1:], values) for e in range(start, stop)])

    def _put(self, pieces: Sequence[_Piece], shape: Sequence[int], values: Values) -> torch.Tensor:
        """Put the pieces of one expert where they lie in the raw tensor."""
        whole = torch.empty(0)
        for piece in pieces:
            region, module = piece.region, self.tree.experts[piece.parameter.rpartition(".")[0]]
            matrix = part_of(values(piece.parameter), piece.part, piece.expert, module.num_experts)
            if len(pieces) == 1 and matrix.numel() == math.prod(shape):
                return matrix.T if region.transposed else matrix
            if not whole.numel():
                whole = torch.empty(tuple(shape), dtype=matrix.dtype, device=matrix.device)
            slab = whole[slice(*region.slab)] if region.expert is None else whole[None]
            region.view(slab).copy_(matrix)
        return whole

    def _cut(self, path: str) -> Mapping[str, _Pieces]:
        """Every piece of an experts module, by raw key."""
        with self._lock:
            if path not in self._cuts:
                module = self.tree.experts[path]
                targets = {f"{path}.{part.parameter}" for part in module.parts}
                sources = {
                    target: group.keys
                    for group in self._groups
                    for target in targets.intersection(group.targets)
                }
                parts = {(part.projection, part.is_bias): part for part in module.parts}
                pieces: dict[str, _Pieces] = defaultdict(lambda: defaultdict(list))
                for cut in cut_experts(module, self.tree, sources, self.infos):
                    part = parts[cut.projection, cut.is_bias]
                    piece = _Piece(cut.region, f"{path}.{part.parameter}", part, cut.expert)
                    pieces[cut.region.key][cut.region.expert].append(piece)
                self._cuts[path] = dict(pieces)
            return self._cuts[path]

    def _rows_in_order(
        self, key: str, group: _Group, start: int, stop: int, values: Values
    ) -> torch.Tensor:
        order, shape = self._order_of(group), self.infos[key].shape
        row_size = math.prod(shape[1:])
        begin, end = (0, shape[0]) if row_size < order.width else (start, stop)
        before = group.all_keys[: group.all_keys.index(key)]
        first = sum(self.infos[other].numel for other in before) + begin * row_size
        last = first + (end - begin) * row_size
        positions = order.rows[first // order.width : last // order.width]
        rows = _gather([values(target) for target in group.targets], positions, order.width)
        return rows.reshape(end - begin, *shape[1:])[start - begin : stop - begin]

    def _order_of(self, group: _Group) -> _Order:
        keys = group.all_keys
        kind = (
            tuple((pattern, len(keys)) for pattern, keys in group.keys.items()),
            tuple(self.infos[key].shape for key in keys),
            tuple(self.shapes[target] for target in group.targets),
        )
        with self._lock:
            if kind not in self._orders:
                self._orders[kind] = self._probe(group)
            return self._orders[kind]

    def _probe(self, group: _Group) -> _Order:
        """Run the conversion on a few elements of each row, or on all if rows are cut."""
        shapes = [self.infos[key].shape for key in group.all_keys]
        lasts = {shape[-1:] for shape in (*shapes, *(self.shapes[t] for t in group.targets))}
        if len(lasts) == 1 and lasts != {()}:
            (width,) = lasts.pop()
            rows = self._numbers(group, min(width, PROBE_WIDTH))
            if rows is not None:
                return _Order(self._inverse(group, rows), width)
        numbers = self._numbers(group, None)
        if numbers is None:
            raise ModelError(f"{group.all_keys[0]}: its conversion gives other shapes than it did")
        return _Order(self._inverse(group, numbers), 1)

    def _numbers(self, group: _Group, width: int | None) -> torch.Tensor | None:
        """The positions that the parameters' rows come from, or their elements if `width` is None.

        None if rows do not stay whole.
        """

        def narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
            return shape if width is None else (*shape[:-1], width)

        tensors: dict[str, list[torch.Tensor]] = defaultdict(list)
        numbers = number([narrow(self.infos[key].shape) for key in group.all_keys])
        patterns = [str(pattern) for pattern, keys in group.keys.items() for _ in keys]
        for pattern, tensor in zip(patterns, numbers, strict=True):
            tensors[pattern].append(tensor)
        shapes = {target: narrow(self.shapes[target]) for target in group.targets}
        try:
            converted = self.tree.conversion.convert(group.targets[0], patterns[0], tensors, shapes)
        except ModelError:
            if width is None:
                raise
            return None
        if any(tuple(converted[target].shape) != shapes[target] for target in group.targets):
            return None
        rows = torch.cat([converted[target].reshape(-1, width or 1) for target in group.targets])
        first = rows[:, :1]
        whole = rows - first == torch.arange(width or 1)
        return first.flatten() // (width or 1) if bool(whole.all()) else None

    def _inverse(self, group: _Group, numbers: torch.Tensor) -> torch.Tensor:
        inverse = torch.full_like(numbers, -1)
        inverse[numbers.clamp(max=len(numbers) - 1)] = torch.arange(len(numbers))
        if bool((inverse < 0).any()):
            raise ModelError(
                f"{group.all_keys[0]}: {', '.join(group.targets)} do not hold all of its values"
            )
        return inverse


def _gather(tables: Sequence[torch.Tensor], positions: torch.Tensor, width: int) -> torch.Tensor:
    """The rows at `positions` of some concatenated tensors."""
    dtype = reduce(torch.promote_types, (table.dtype for table in tables))
    rows, at = torch.empty((len(positions), width), dtype=dtype), 0
    for table in (table.cpu().reshape(-1, width) for table in tables):
        is_here = (positions >= at) & (positions < at + len(table))
        rows[is_here] = table[positions[is_here] - at].to(dtype)
        at += len(table)
    return rows


def _stack(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))
