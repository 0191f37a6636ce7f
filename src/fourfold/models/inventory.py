"""Every linear weight of a model: its name, shape, role, and where its bytes lie.

    raw keys ──rules of transformers──▶ parameters of the module tree ──▶ linear weights

The module tree says what is a linear layer and what is an experts module; transformers' rules
tie each raw key to its place there; names in the output come from the raw keys alone. Raw keys
that the tree does not know (MTP layers) are in the inventory too: those that stand beside a
decoder layer's own (`mtp.layers.0.mlp.experts.gate_up_proj`) are cut like them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fourfold.errors import ModelError, SourceError
from fourfold.models.engines import is_stack
from fourfold.models.experts import Projection
from fourfold.models.families import fuse, kept_because
from fourfold.models.fused_experts import ExpertPart, cut_experts
from fourfold.models.internals import Place
from fourfold.models.module_tree import ModuleTree, build_tree
from fourfold.models.regions import Region, whole
from fourfold.models.roles import (
    EMBEDDING_NAME,
    MAY_LACK,
    MTP_KEY,
    TOWER,
    Role,
    role_of_linear,
)
from fourfold.storage.safetensors_header import TensorInfo, shown
from fourfold.storage.source import Source

_FOLDABLE = {
    Role.EXPERTS, Role.SHARED_EXPERTS, Role.MLP, Role.ATTENTION, Role.LINEAR_ATTENTION,
}  # fmt: skip
"""Roles of a decoder layer that an MTP layer's weights may be cut like."""

_NUMBERED = re.compile(r"[0-9]+|[^0-9]+")
_LAYER = re.compile(r"(?:^|.*?\.)(?:layers|h|blocks)\.([0-9]{1,9})\.")
SINGLE_EXPERT = re.compile(r"(?<=\.experts\.)(expert_)?(?P<number>[0-9]{1,9})(?=\.)")
"""Experts that are modules of their own (NLLB, custom code) share their layer's input sites."""

_EXPERT = re.compile(r"(?<=\.experts\.)[0-9]{1,9}(?=\.)")


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """One logical 2-D matrix `[out, in]`, wherever it lies on disk.

    `name` is its name in the output, without `.weight`. `scale_group` and `input_site` are names
    that the weights of one group, or of one site, share. `module` is the experts module (for
    routed experts) or the linear module itself, in memory's names.
    """

    name: str
    role: Role
    region: Region
    dtype: str
    layer: int | None
    module: str
    scale_group: str
    input_site: str
    expert: int | None = None
    projection: Projection | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.region.shape
        return rows, cols


@dataclass(frozen=True, slots=True)
class ExpertBias:
    """One expert's bias inside a fused bias parameter; split off where its weights are."""

    name: str
    region: Region
    dtype: str
    module: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor of the source: what it is for, and the layer it belongs to."""

    info: TensorInfo
    role: Role
    layer: int | None
    is_matrix: bool
    """Whether an engine may build it as a linear layer: it must be on the ignore lists then."""

    @property
    def stem(self) -> str:
        return self.info.key.removesuffix(".weight")


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds. `blocked`: raw key → why its weights cannot be cut out."""

    model_types: tuple[str, ...]
    architecture: str
    linears: tuple[LinearWeight, ...]
    biases: tuple[ExpertBias, ...]
    tensors: Mapping[str, RawTensor]
    blocked: Mapping[str, str]
    tied_linears: tuple[str, ...]
    """Linear layers without a tensor of their own (a tied head), in memory's names."""
    unknown: tuple[str, ...]
    """Raw keys that the module tree has no place for."""
    layer_paths: tuple[str, ...]
    """Decoder layers, in memory's names."""
    vocab_size: int
    hidden_size: int
    max_positions: int | None

    @cached_property
    def linears_by_key(self) -> Mapping[str, tuple[LinearWeight, ...]]:
        """Linear weights by the raw key that holds them."""
        found: dict[str, list[LinearWeight]] = defaultdict(list)
        for linear in self.linears:
            found[linear.region.key].append(linear)
        return {key: tuple(group) for key, group in found.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names and shapes of all linear weights: the same for the same model."""
        lines = sorted(f"{x.name} {x.shape[0]} {x.shape[1]}" for x in self.linears)
        return hashlib.sha256("\n".join([self.architecture, *lines]).encode()).hexdigest()

    @cached_property
    def experts_counts(self) -> Mapping[str, int]:
        """How many experts each experts module has, by its path in memory."""
        counts: dict[str, int] = {}
        for linear in self.linears:
            if linear.expert is not None and linear.role is not Role.MTP:
                counts[linear.module] = max(counts.get(linear.module, 0), linear.expert + 1)
        return counts

    @cached_property
    def roles(self) -> Mapping[Role, int]:
        """How many linear weights each role has."""
        return Counter(linear.role for linear in self.linears)


def take_inventory(source: Source) -> Inventory:
    """Find every linear weight of `source`; reads headers and configuration only.

    Raises `ModelError` for an architecture that cannot be built or taken apart, `SourceError`
    where the checkpoint lacks a parameter of its architecture.
    """
    _check_config(source)
    tree = build_tree(source.folder, trust_remote_code=source.trust_remote_code)
    return _Taking(source, tree).run()


def _check_config(source: Source) -> None:
    """Refuse what would fail, or take for ever, while the model is built.

    More layers than there are tensors; a part whose type is no name.
    """
    parts = [source.config, *(x for x in source.config.values() if isinstance(x, Mapping))]
    for part in parts:
        kind = part.get("model_type")
        if not isinstance(kind, str | None):
            raise ModelError(
                f"{source.folder / 'config.json'}: model_type is {shown(kind)}, not a name. "
                "Download it again."
            )
        for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"):
            count = part.get(name)
            if isinstance(count, int) and count > len(source.tensors):
                raise ModelError(
                    f"{source.folder / 'config.json'}: {name} is {count:,}, but the checkpoint has "
                    f"{len(source.tensors):,} tensors. Does config.json belong to it?"
                )


def natural(key: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that counts numbers as numbers: layer 2 before layer 10."""
    runs = _NUMBERED.findall(key)
    return tuple(
        (0, len(x.lstrip("0")), x.lstrip("0")) if x.isdecimal() else (1, 0, x) for x in runs
    )


class _Taking:
    """One taking of an inventory: the source, the tree, and what has been found so far."""

    def __init__(self, source: Source, tree: ModuleTree) -> None:
        self.infos = source.tensors
        self.tree = tree
        self.places = {key: tree.conversion.place(key) for key in sorted(self.infos, key=natural)}
        self.layer_index = {path: index for index, path in enumerate(tree.layers)}
        self.linears: list[LinearWeight] = []
        self.biases: list[ExpertBias] = []
        self.roles: dict[str, Role] = {}
        self.blocked: dict[str, str] = {}

    def run(self) -> Inventory:
        self._check_complete()
        self._cut_experts()
        self._find_linears()
        self._find_unknown()
        tensors = {key: self._raw(key) for key in self.infos}
        return Inventory(
            model_types=self.tree.model_types,
            architecture=self.tree.architecture,
            linears=tuple(_with_groups(self.linears)),
            biases=tuple(self.biases),
            tensors=tensors,
            blocked=self.blocked,
            tied_linears=self._tied_linears(),
            unknown=tuple(key for key, place in self.places.items() if place.target is None),
            layer_paths=self.tree.layers,
            vocab_size=self.tree.vocab_size,
            hidden_size=self.tree.hidden_size,
            max_positions=self.tree.max_positions,
        )

    def _check_complete(self) -> None:
        """Every parameter and buffer has a tensor, or is tied to one that has."""
        conversion = self.tree.conversion
        covered: set[str] = set()
        seen: set[tuple[str | None, str | None]] = set()
        for place in self.places.values():
            if (place.target, place.pattern) not in seen:
                seen.add((place.target, place.pattern))
                covered.update(conversion.targets(place))
        covered |= self.tree.tied
        buffers = (name for name in sorted(self.tree.buffers) if not MAY_LACK.search(name))
        missing = [name for name in (*self.tree.parameters, *buffers) if name not in covered]
        if missing:
            raise SourceError(
                f"{missing[0]}: the checkpoint has no tensor for it ({len(missing)} of "
                f"{self.tree.architecture}'s are missing). "
                "Is a shard missing, or the config another model's?"
            )

    def _tied_linears(self) -> tuple[str, ...]:
        stored = {place.target for place in self.places.values()}
        names = (name.removesuffix(".weight") for name in self.tree.tied - stored)
        return tuple(sorted(name for name in names if name in self.tree.linears))

    def _cut_experts(self) -> None:
        sources: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key, place in self.places.items():
            for target in self.tree.conversion.targets(place):
                sources[target][place.pattern].append(key)
        for module in self.tree.experts.values():
            parts = cut_experts(module, self.tree, sources, self.infos)
            layer = self._layer_of(f"{module.path}.")
            for part in parts:
                self._add_expert(module.path, layer, part)
        for path, class_name in self.tree.unknown_experts.items():
            self._block_unknown(path, class_name)

    def _add_expert(self, module: str, layer: int | None, part: ExpertPart) -> None:
        dtype = self.infos[part.region.key].dtype
        role = Role.VISION if TOWER.search(module) else Role.EXPERTS
        self.roles[part.region.key] = role
        if part.is_bias:
            if part.name is not None:
                self.biases.append(ExpertBias(part.name, part.region, dtype, module, layer))
            return
        assert part.name is not None
        half = "down" if part.projection is Projection.DOWN else "gate_up"
        self.linears.append(
            LinearWeight(
                name=part.name,
                role=role,
                region=part.region,
                dtype=dtype,
                layer=layer,
                module=module,
                scale_group=f"{module}.{part.expert}.{half}",
                input_site=f"{module}.{half}",
                expert=part.expert,
                projection=part.projection,
            )
        )

    def _block_unknown(self, path: str, class_name: str) -> None:
        for key, place in self.places.items():
            if place.target is not None and place.target.startswith(f"{path}."):
                inside = role_of_linear(f"{path}.x", [])
                self.roles[key] = _role(key, Role.EXPERTS if inside is Role.OTHER else inside)
                self.blocked[key] = (
                    f"{path} is a {class_name}, an experts module whose layout is not known"
                )

    def _find_linears(self) -> None:
        for key, place in self.places.items():
            if place.target is None or key in self.roles:
                continue
            self._check_shape(key, place)
            targets = self.tree.conversion.targets(place)
            layers = [self.tree.linears.get(name.removesuffix(".weight")) for name in targets]
            if not all(name.endswith(".weight") for name in targets) or None in layers:
                self.roles[key] = self._role_of_other(place)
                if any(layers) or self._feeds_linear(targets):
                    self.blocked[key] = "its layout on disk is not that of a linear layer"
                continue
            found = [layer for layer in layers if layer is not None]
            self.roles[key] = role = _role(key, found[0].role)
            info = self.infos[key]
            outs, ins = sum(layer.out_features for layer in found), found[0].in_features
            shape_fits = info.shape == (outs, ins) or (
                place.pattern is not None and len(info.shape) == 2 and info.shape[1] == ins
            )
            if not shape_fits or not key.endswith(".weight"):
                self.blocked[key] = "its layout on disk is not that of a linear layer"
                continue
            self._add_linear(key, role, found[0].path, self._layer_of(place.target))

    def _check_shape(self, key: str, place: Place) -> None:
        """A tensor that is only renamed has the shape of its parameter."""
        wanted = self.tree.parameters.get(place.target or "")
        info = self.infos[key]
        if place.pattern is None and wanted is not None and info.shape != wanted:
            raise ModelError(
                f"{key} in {info.file.name}: shape {list(info.shape)}, the architecture says "
                f"{list(wanted)}. Does config.json belong to this checkpoint?"
            )

    def _feeds_linear(self, targets: Iterable[str]) -> bool:
        return any(
            name.endswith(".weight") and name.removesuffix(".weight") in self.tree.linears
            for name in targets
        )

    def _add_linear(self, key: str, role: Role, module: str, layer: int | None) -> None:
        info, stem = self.infos[key], key.removesuffix(".weight")
        region = whole(key, info.shape)
        site = SINGLE_EXPERT.sub("*", stem) if role is Role.EXPERTS else stem
        self.linears.append(
            LinearWeight(stem, role, region, info.dtype, layer, module, stem, site)
        )  # fmt: skip

    def _role_of_other(self, place: Place) -> Role:
        target = place.target or ""
        module = target.rpartition(".")[0]
        if module in self.tree.embeddings:
            return Role.EMBEDDING
        if module in self.tree.routers:
            return Role.ROUTER
        if module in self.tree.linears:
            return self.tree.linears[module].role
        if module in self.tree.experts:
            return Role.EXPERTS
        return Role.VISION if role_of_linear(target, []) is Role.VISION else Role.OTHER

    def _find_unknown(self) -> None:
        """Keys that the tree does not know: MTP layers, cut like the decoder layers they copy."""
        models = _first_by_suffix(self.linears)
        for key, place in self.places.items():
            if place.target is not None:
                continue
            self.roles[key] = role = self._role_of_unknown(key)
            if role is Role.MTP:
                for model in models.get(_suffix(key), ()):
                    if model.role in _FOLDABLE:
                        self._add_mtp(key, model)

    def _role_of_unknown(self, key: str) -> Role:
        layer = _LAYER.match(key)
        past_end = layer is not None and int(layer.group(1)) >= self.tree.num_hidden_layers
        return Role.MTP if MTP_KEY.search(key) or past_end else Role.OTHER

    def _add_mtp(self, key: str, model: LinearWeight) -> None:
        info, like = self.infos[key], self.infos[model.region.key]
        if info.shape != like.shape:
            return
        prefix, old = _prefix(key), _prefix(model.region.key)
        number = _EXPERT.search(key)
        expert = model.expert if number is None else int(number.group())
        name = prefix + model.name.removeprefix(old)
        if number is not None:
            name = _EXPERT.sub(number.group(), name)
        module = prefix + model.module
        half = model.input_site.rpartition(".")[2]
        grouped = model.expert is not None
        self.linears.append(
            replace(
                model,
                name=name,
                role=Role.MTP,
                region=replace(model.region, key=key),
                dtype=info.dtype,
                layer=None,
                module=module,
                scale_group=f"{module}.{expert}.{half}" if grouped else name,
                input_site=f"{module}.{half}" if grouped else name,
                expert=expert,
            )
        )

    def _layer_of(self, path: str) -> int | None:
        for dot in re.finditer(r"\.\d+(?=\.)", path):
            index = self.layer_index.get(path[: dot.end()])
            if index is not None:
                return index
        return None

    def _raw(self, key: str) -> RawTensor:
        info, role, place = self.infos[key], self.roles[key], self.places[key]
        stem = key.removesuffix(".weight")
        is_matrix = (
            not (role is Role.EMBEDDING and EMBEDDING_NAME.search(stem))
            and len(info.shape) >= 2
            and (
                stem != key
                or role in {Role.EXPERTS, Role.MTP}
                or key in self.blocked
                or is_stack(stem)
            )
        )
        return RawTensor(info, role, self._layer_of(place.target or ""), is_matrix)


def _role(key: str, role: Role) -> Role:
    """`role`, or `other` for a layer that engines build unquantized whatever it was."""
    kept = kept_because(key.removesuffix(".weight")) is not None
    return Role.OTHER if kept and role not in {Role.ROUTER, Role.VISION} else role


def _prefix(key: str) -> str:
    """`model.layers.3.` of `model.layers.3.mlp.gate.weight`; empty where there is no layer."""
    layer = _LAYER.match(key)
    return layer.group() if layer else ""


def _suffix(key: str) -> str:
    return _EXPERT.sub("#", key.removeprefix(_prefix(key)))


def _first_by_suffix(linears: Sequence[LinearWeight]) -> dict[str, list[LinearWeight]]:
    """For each key's name inside its layer, the weights of the first such key."""
    first: dict[str, str] = {}
    found: dict[str, list[LinearWeight]] = defaultdict(list)
    for linear in linears:
        key = linear.region.key
        if linear.layer is not None and first.setdefault(_suffix(key), key) == key:
            found[_suffix(key)].append(linear)
    return found


def _with_groups(linears: Sequence[LinearWeight]) -> Iterable[LinearWeight]:
    """Put sibling layers that engines fuse into one scale group and one input site."""
    siblings: dict[str, set[str]] = defaultdict(set)
    for linear in linears:
        if linear.expert is None:
            parent, _, last = linear.name.rpartition(".")
            siblings[parent].add(last)
    groups = {
        f"{parent}.{part}": f"{parent}.{'+'.join(parts)}"
        for parent, lasts in siblings.items()
        for _, parts in fuse(lasts)
        for part in parts
    }
    for linear in linears:
        name = groups.get(linear.name)
        alone = linear.expert is not None or name is None
        yield linear if alone else replace(linear, scale_group=str(name), input_site=str(name))
