"""The inverse of loading: a raw tensor, read from the parameters that it became in memory.

transformers' conversion says what becomes of the raw tensors when they are loaded. It is asked
about its own positions, and the answer is read backwards; no family is known here:

- a raw tensor that is only renamed is its parameter;
- routed experts are cut out of their raw tensors as the inventory cuts them (`fused_experts`);
  each part is then put where it was cut: a half, every second row, a transposition;
- what is left (fused q, k, v; interleaved shared experts; rotary permutations of vision towers)
  is converted once with numbers for values. Where whole rows move, rows are numbered, else
  elements; the answer is kept for all layers of the same shapes.
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
"""Gives the parameter (or buffer) of a name."""

PROBE_WIDTH = 6
"""Elements of a row that are tried: neither halves nor pairs of them can pass for a whole row."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """One expert's projection: where it lies in a raw tensor, and in which parameter."""

    region: Region
    parameter: str
    part: Part
    expert: int


_Pieces = dict[int | None, list[_Piece]]
"""What a raw tensor holds: pieces by expert; None where experts are no dimension of it."""


@dataclass(frozen=True, slots=True)
class _Order:
    """Where each row of some raw tensors, one below the other, lies in their parameters' rows."""

    rows: torch.Tensor
    width: int
    """Elements of a row."""


@dataclass(frozen=True)
class _Group:
    """Raw tensors that are converted together, by pattern, and the parameters they become."""

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
        """Raw keys that have no place in the model."""
        self._groups = self._all_groups()
        self._group_of = {key: group for group in self._groups for key in group.all_keys}
        self._cuts: dict[str, Mapping[str, _Pieces]] = {}
        self._orders: dict[object, _Order] = {}
        self._lock = threading.Lock()

    def _all_groups(self) -> list[_Group]:
        conversion = self.tree.conversion
        found: dict[tuple[str, ...], dict[str | None, list[str]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for key in sorted(self.infos, key=natural):
            place = conversion.place(key)
            if place.target is None:
                self.unplaced.append(key)
            else:
                found[tuple(conversion.targets(place))][place.pattern].append(key)
        return [_Group(targets, keys) for targets, keys in found.items()]

    def parameters(self, key: str) -> Sequence[str]:
        """The parameters that `rows` of `key` may ask for."""
        return self._group_of[key].targets

    def misfit(self) -> str | None:
        """Why these raw tensors cannot be the model's; None where nothing speaks against it."""
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
        """Rows `start:stop` of the first dimension of `key`; a view where that is possible."""
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
        pieces, shape = self._pieces_of(key, group), self.infos[key].shape
        if None in pieces:
            return self._put(pieces[None], shape, values)[start:stop]
        return _stack([self._put(pieces[e], shape[1:], values) for e in range(start, stop)])

    def _put(self, pieces: Sequence[_Piece], shape: Sequence[int], values: Values) -> torch.Tensor:
        """The pieces of one expert, where they lie in the raw tensor."""
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

    def _pieces_of(self, key: str, group: _Group) -> _Pieces:
        """What a raw tensor of experts holds, by expert."""
        paths = dict.fromkeys(target.rpartition(".")[0] for target in group.targets)
        found = [self._cut(path)[key] for path in paths if key in self._cut(path)]
        return found[0]

    def _cut(self, path: str) -> Mapping[str, _Pieces]:
        """Every piece of an experts module, by raw key."""
        with self._lock:
            if path not in self._cuts:
                module = self.tree.experts[path]
                targets = [f"{path}.{part.parameter}" for part in module.parts]
                sources = {target: self._sources(target) for target in targets}
                parts = {(part.projection, part.is_bias): part for part in module.parts}
                found: dict[str, _Pieces] = defaultdict(lambda: defaultdict(list))
                for cut in cut_experts(module, self.tree, sources, self.infos):
                    part = parts[cut.projection, cut.is_bias]
                    piece = _Piece(cut.region, f"{path}.{part.parameter}", part, cut.expert)
                    found[cut.region.key][cut.region.expert].append(piece)
                self._cuts[path] = dict(found)
            return self._cuts[path]

    def _sources(self, target: str) -> Mapping[str | None, Sequence[str]]:
        return next(group.keys for group in self._groups if target in group.targets)

    def _rows_in_order(
        self, key: str, group: _Group, start: int, stop: int, values: Values
    ) -> torch.Tensor:
        order, shape = self._order_of(group), self.infos[key].shape
        each = math.prod(shape[1:])
        begin, end = (0, shape[0]) if each < order.width else (start, stop)
        before = group.all_keys[: group.all_keys.index(key)]
        first = sum(self.infos[other].numel for other in before) + begin * each
        wanted = order.rows[first // order.width : (first + (end - begin) * each) // order.width]
        rows = _gather([values(target) for target in group.targets], wanted, order.width)
        return rows.reshape(end - begin, *shape[1:])[start - begin : stop - begin]

    def _order_of(self, group: _Group) -> _Order:
        keys = group.all_keys
        same = (
            tuple((pattern, len(keys)) for pattern, keys in group.keys.items()),
            tuple(self.infos[key].shape for key in keys),
            tuple(self.shapes[target] for target in group.targets),
        )
        with self._lock:
            if same not in self._orders:
                self._orders[same] = self._probe(group)
            return self._orders[same]

    def _probe(self, group: _Group) -> _Order:
        """Ask the conversion: about a few elements of each row, or all where rows are cut."""
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
        """Where the parameters' rows come from, or (width None) their elements.

        None where rows do not stay whole.
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
            made = self.tree.conversion.convert(group.targets[0], patterns[0], tensors, shapes)
        except ModelError:
            if width is None:
                raise
            return None
        if any(tuple(made[target].shape) != shapes[target] for target in group.targets):
            return None
        rows = torch.cat([made[target].reshape(-1, width or 1) for target in group.targets])
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


def _gather(tables: Sequence[torch.Tensor], wanted: torch.Tensor, width: int) -> torch.Tensor:
    """The `wanted` rows of some tensors that lie one below the other."""
    dtype = reduce(torch.promote_types, (table.dtype for table in tables))
    rows, at = torch.empty((len(wanted), width), dtype=dtype), 0
    for table in (table.cpu().reshape(-1, width) for table in tables):
        mine = (wanted >= at) & (wanted < at + len(table))
        rows[mine] = table[wanted[mine] - at].to(dtype)
        at += len(table)
    return rows


def _stack(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))
