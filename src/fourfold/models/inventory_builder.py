# SPDX-License-Identifier: Apache-2.0
"""Take the inventory of a source: find every linear weight in its headers and configuration.

    raw keys ──rules of transformers──▶ parameters of the module tree ──▶ linear weights

The module tree says which modules are linear layers and experts modules; transformers' rules tie
each raw key to its place there. Names in the output come from the raw keys alone. Raw keys that the
tree has no place for are in the inventory too; among them, MTP layers are cut like the decoder
layers that they resemble (`mtp`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fourfold.errors import ModelError, SourceError
from fourfold.models.experts import Projection
from fourfold.models.families import is_stack
from fourfold.models.fused_experts import ExpertPart, cut_experts
from fourfold.models.fusion import FusedModule, fuse, kept_because
from fourfold.models.internals import Place
from fourfold.models.inventory import ExpertBias, Inventory, LinearWeight, RawTensor
from fourfold.models.module_tree import LinearModule, ModuleTree, build_tree
from fourfold.models.mtp import is_mtp, mtp_linears, stack_of
from fourfold.models.names import SINGLE_EXPERT, natural
from fourfold.models.peculiarities import peculiarities_of
from fourfold.models.published import published_names, unpublished
from fourfold.models.regions import whole
from fourfold.models.roles import EMBEDDING_NAME, MAY_LACK, TOWER, Role, role_of_linear
from fourfold.models.ties import Tie, tie_of
from fourfold.storage.safetensors_header import shown
from fourfold.storage.source import Source

_NOT_A_LINEAR = "its layout on disk is not that of a linear layer"
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_forward_module.")
"""Prefixes that torch.compile, DistributedDataParallel, FSDP and DeepSpeed put before names."""

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")


def take_inventory(source: Source) -> Inventory:
    """Find every linear weight of `source`; reads headers and configuration only.

    A source whose tensors are called as in transformers' memory is renamed.

    Raises:
        ModelError: if the architecture cannot be built or its experts cannot be cut out.
        SourceError: if the checkpoint lacks a parameter of its architecture.
    """
    _check_config(source)
    tree = build_tree(source.folder, trust_remote_code=source.trust_remote_code)
    if names := published_names(tree, source.tensors):
        source.rename(names)
    return _Builder(source, tree).build()


def _check_config(source: Source) -> None:
    """Refuse a configuration that transformers would fail on, or build without end."""
    parts = [source.config, *(x for x in source.config.values() if isinstance(x, Mapping))]
    for part in parts:
        kind = part.get("model_type")
        if not isinstance(kind, str | None):
            raise ModelError(
                f"{source.folder / 'config.json'}: model_type is {shown(kind)}, not a name. "
                "Download it again."
            )
        for name in _LAYER_COUNTS:
            count = part.get(name)
            if isinstance(count, int) and count > len(source.tensors):
                raise ModelError(
                    f"{source.folder / 'config.json'}: {name} is {count:,}, but the checkpoint has "
                    f"{len(source.tensors):,} tensors. Does config.json belong to it?"
                )


class _Builder:
    """Collects the parts of one inventory."""

    def __init__(self, source: Source, tree: ModuleTree) -> None:
        self.infos = source.tensors
        self.tree = tree
        self.tie = tie_of(source.config)
        self.places = {key: tree.conversion.place(key) for key in sorted(self.infos, key=natural)}
        self.layer_index = {path: index for index, path in enumerate(tree.layers)}
        self.linears: list[LinearWeight] = []
        self.biases: list[ExpertBias] = []
        self.roles: dict[str, Role] = {}
        self.blocked: dict[str, str] = {}
        self.doubles: list[tuple[str, str]] = []

    def build(self) -> Inventory:
        self._check_complete()
        self._find_doubles()
        self._cut_experts()
        self._find_linears()
        self._find_mtp()
        return Inventory(
            model_types=self.tree.model_types,
            architecture=self.tree.architecture,
            linears=tuple(_with_groups(self.linears, self.tree.model_types)),
            biases=tuple(self.biases),
            tensors={key: self._raw(key) for key in self.infos},
            blocked=self.blocked,
            tied_linears=self._tied_linears(),
            tie=self.tie,
            tied_keys=self._tied_keys(),
            doubles=tuple(self.doubles),
            unknown=tuple(key for key, place in self.places.items() if place.target is None),
            denied=tuple(self._denied()),
            unpublished=tuple(unpublished(self.tree, self.infos)),
            layer_paths=self.tree.layers,
            norms=self.tree.norms,
            vocab_size=self.tree.vocab_size,
            hidden_size=self.tree.hidden_size,
            max_positions=self.tree.max_positions,
            experts_per_token=self.tree.experts_per_token,
        )

    # ------------------------------------------------------------------------------ parameters

    def _check_complete(self) -> None:
        """Every parameter and buffer has a tensor, or is tied to one that has."""
        one_of_each = {(place.target, place.pattern): place for place in self.places.values()}
        covered = set(self.tree.tied)
        for place in one_of_each.values():
            covered.update(self.tree.conversion.targets(place))
        buffers = (name for name in sorted(self.tree.buffers) if not MAY_LACK.search(name))
        missing = [name for name in (*self.tree.parameters, *buffers) if name not in covered]
        if missing:
            raise SourceError(
                f"{missing[0]}: the checkpoint has no tensor for it ({len(missing)} of "
                f"{self.tree.architecture}'s are missing). {self._why_missing(missing)}"
            )

    def _why_missing(self, missing: Sequence[str]) -> str:
        """The likely cause for parameters without tensors, and what to do."""
        for name in missing:
            longer = next((key for key in self.infos if key.endswith(f".{name}")), None)
            if longer is not None:
                prefix = longer.removesuffix(name)
                cause = (
                    "it was saved from a compiled or wrapped model. Save the inner model"
                    if prefix in _WRAPPERS
                    else "is the config that of an inner model? Give the whole model's"
                )
                return f"Names begin with {prefix!r} there: {cause}, or remove the prefix."
        heads = {f"{path}.weight" for path in self.tree.heads}
        if heads.issuperset(missing):
            return "If the head shares the embedding, set tie_word_embeddings in config.json."
        return "Is a shard missing, or the config another model's?"

    def _tied_linears(self) -> tuple[str, ...]:
        stored = {place.target for place in self.places.values()}
        names = (name.removesuffix(".weight") for name in self.tree.tied - stored)
        return tuple(sorted(name for name in names if name in self.tree.linears))

    def _tied_keys(self) -> dict[str, str]:
        if self.tie is Tie.NO:
            return {}
        stored = {place.target: key for key, place in self.places.items()}
        return {
            stored[target]: stored[origin]
            for target, origin in self.tree.ties.items()
            if target in stored and origin in stored
        }

    def _find_doubles(self) -> None:
        """Find keys that become the same parameter; parameters that are cut must be there once."""
        firsts: dict[object, str] = {}
        layouts: dict[str | None, tuple[object, str]] = {}
        for key, place in self.places.items():
            if place.target is None:
                continue
            rule, numbers = self.tree.conversion.rule_of(place), tuple(re.findall(r"\d+", key))
            other, double = layouts.setdefault(place.target, (rule, key))
            if rule is other:
                double = firsts.setdefault((place.target, place.pattern, numbers), key)
            if double == key:
                continue
            if rule or other or place.target.rpartition(".")[0] in self.tree.experts:
                raise SourceError(
                    f"{key} in {self.infos[key].file.name}: holds what {double} holds, too "
                    f"({place.target}). Take one of them out of the checkpoint."
                )
            self.doubles.append((double, key))

    def _layer_of(self, path: str) -> int | None:
        """The index of the decoder layer that contains the parameter at `path`, or None."""
        for dot in re.finditer(r"\.\d+(?=\.)", path):
            index = self.layer_index.get(path[: dot.end()])
            if index is not None:
                return index
        return None

    # --------------------------------------------------------------------------------- experts

    def _cut_experts(self) -> None:
        sources: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key, place in self.places.items():
            for target in self.tree.conversion.targets(place):
                sources[target][place.pattern].append(key)
        for module in self.tree.experts.values():
            layer = self._layer_of(f"{module.path}.")
            for part in cut_experts(module, self.tree, sources, self.infos):
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
        """Keep the weights of an experts module whose layout is not known."""
        role = role_of_linear(f"{path}.x", [])
        role = Role.EXPERTS if role is Role.OTHER else role
        for key, place in self.places.items():
            if place.target is not None and place.target.startswith(f"{path}."):
                self.roles[key] = _role_in_engines(key, role)
                self.blocked[key] = (
                    f"{path} is a {class_name}, an experts module whose layout is not known"
                )

    # -------------------------------------------------------------------------- linear layers

    def _find_linears(self) -> None:
        for key, place in self.places.items():
            if place.target is None or key in self.roles:
                continue
            self._check_shape(key, place)
            targets = self.tree.conversion.targets(place)
            modules = [self.tree.linears.get(name.removesuffix(".weight")) for name in targets]
            linears = [module for module in modules if module is not None]
            is_weight = all(name.endswith(".weight") for name in targets)
            if is_weight and len(linears) == len(targets):
                self._add_linear(key, place, linears)
            else:
                self.roles[key] = self._role_of_other(place)
                if linears:
                    self.blocked[key] = _NOT_A_LINEAR

    def _check_shape(self, key: str, place: Place) -> None:
        """A tensor that is only renamed has the shape of its parameter."""
        expected = self.tree.parameters.get(place.target or "")
        info = self.infos[key]
        if place.pattern is None and expected is not None and info.shape != expected:
            raise ModelError(
                f"{key} in {info.file.name}: shape {list(info.shape)}, the architecture says "
                f"{list(expected)}. Does config.json belong to this checkpoint?"
            )

    def _add_linear(self, key: str, place: Place, modules: Sequence[LinearModule]) -> None:
        """Add a tensor that is the weight of one linear layer, or of several fused on disk."""
        info, stem = self.infos[key], key.removesuffix(".weight")
        self.roles[key] = role = _role_in_engines(key, modules[0].role)
        outs, ins = sum(module.out_features for module in modules), modules[0].in_features
        shape_fits = info.shape == (outs, ins) or (
            place.pattern is not None and len(info.shape) == 2 and info.shape[1] == ins
        )
        if not shape_fits or stem == key:
            self.blocked[key] = _NOT_A_LINEAR
            return
        self.linears.append(
            LinearWeight(
                name=stem,
                role=role,
                region=whole(key, info.shape),
                dtype=info.dtype,
                layer=self._layer_of(str(place.target)),
                module=modules[0].path,
                scale_group=stem,
                # Experts that are modules of their own (NLLB) share their layer's input sites.
                input_site=SINGLE_EXPERT.sub("*", stem) if role is Role.EXPERTS else stem,
            )
        )

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

    # ------------------------------------------------------------------------------ everything

    def _find_mtp(self) -> None:
        """Assign roles to the keys that the tree has no place for, and cut MTP layers."""
        unknown = [key for key, place in self.places.items() if place.target is None]
        stacks = {
            stack_of(key)
            for key, place in self.places.items()
            if self._layer_of(place.target or "") is not None
        }
        for key in unknown:
            is_mtp_key = is_mtp(key, stacks, self.tree.num_hidden_layers)
            self.roles[key] = Role.MTP if is_mtp_key else Role.OTHER
        mtp_keys = [key for key in unknown if self.roles[key] is Role.MTP]
        self.linears += list(mtp_linears(mtp_keys, self.linears, self.infos))

    def _denied(self) -> Iterator[str]:
        """Biases without a place beside weights that have one."""
        for key, place in self.places.items():
            stem = re.sub(r"[._]bias$", "", key)
            if place.target is None and stem != key:
                weight = self.places.get(f"{stem}.weight") or self.places.get(stem)
                if weight is not None and weight.target is not None:
                    yield key

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
        parameters = () if place.target is None else tuple(self.tree.conversion.targets(place))
        return RawTensor(info, role, self._layer_of(place.target or ""), is_matrix, parameters)


def _role_in_engines(key: str, role: Role) -> Role:
    """`role`, or `other` for a layer that engines build unquantized whatever its role."""
    kept = kept_because(key.removesuffix(".weight")) is not None
    return Role.OTHER if kept and role not in {Role.ROUTER, Role.VISION} else role


def _with_groups(
    linears: Sequence[LinearWeight], model_types: Iterable[str | None]
) -> Iterator[LinearWeight]:
    """Put sibling layers that engines fuse into one scale group and one input site."""
    names = (linear.name for linear in linears if linear.expert is None)
    groups = _groups_of(names, peculiarities_of(*model_types).fused)
    for linear in linears:
        group = groups.get(linear.name) if linear.expert is None else None
        yield replace(linear, scale_group=group, input_site=group) if group else linear


def _groups_of(names: Iterable[str], of_family: Sequence[FusedModule]) -> dict[str, str]:
    """The name of its group for each linear layer that engines fuse with siblings."""
    siblings: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, last = name.rpartition(".")
        siblings[parent].add(last)
    return {
        f"{parent}.{part}": f"{parent}.{'+'.join(parts)}"
        for parent, last_names in siblings.items()
        for _, parts in fuse(last_names, of_family)
        for part in parts
    }
