# SPDX-License-Identifier: Apache-2.0
"""The inventory of a model: every linear weight, its shape, role and place on disk.

`take_inventory` (in `inventory_builder`) makes one. See docs/inventory.md for how.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fourfold.models.experts import Projection
from fourfold.models.norms import Gain
from fourfold.models.regions import Region
from fourfold.models.roles import MAY_LACK, Role
from fourfold.models.ties import Tie
from fourfold.storage.safetensors_header import TensorInfo


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """One logical 2-D matrix `[out, in]`, wherever it lies on disk.

    `name` is its name in the output, without `.weight`. `scale_group` and `input_site` are names
    that the weights of one group, or of one site, share. `module` is the experts module (for
    routed experts) or the linear module itself, named as in memory.
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
        """[out, in]"""
        rows, cols = self.region.shape
        return rows, cols


@dataclass(frozen=True, slots=True)
class ExpertBias:
    """One expert's bias inside a fused bias parameter. It is split off where its weight is."""

    name: str
    region: Region
    dtype: str
    module: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor of the source, its role, and the layer it belongs to."""

    info: TensorInfo
    role: Role
    layer: int | None
    is_matrix: bool
    """True if an engine may build it as a linear layer, so that ignore lists must name it."""
    parameters: tuple[str, ...] = ()
    """The parameters and buffers in memory that it becomes; empty if there are none."""

    @property
    def stem(self) -> str:
        """The key without `.weight`."""
        return self.info.key.removesuffix(".weight")


@dataclass(frozen=True)
class Inventory:
    """The contents of a checkpoint."""

    model_types: tuple[str, ...]
    """`model_type` of the whole, then of its text model."""
    architecture: str
    linears: tuple[LinearWeight, ...]
    biases: tuple[ExpertBias, ...]
    tensors: Mapping[str, RawTensor]
    """By raw key."""
    blocked: Mapping[str, str]
    """Raw key → why its weights cannot be cut out."""
    tied_linears: tuple[str, ...]
    """Linear layers without a tensor of their own (a tied head), named as in memory."""
    tie: Tie
    """Whether the configuration ties the head to the embedding."""
    tied_keys: Mapping[str, str]
    """Raw keys that are stored although the configuration may tie them: key → what it ties to."""
    doubles: tuple[tuple[str, str], ...]
    """Pairs of raw keys for the same parameter."""
    unknown: tuple[str, ...]
    """Raw keys that the module tree has no place for."""
    denied: tuple[str, ...]
    """Those among them that are biases of layers which the architecture builds without one."""
    unpublished: tuple[str, ...]
    """Raw keys under which no published checkpoint holds anything: names in memory."""
    layer_paths: tuple[str, ...]
    """Decoder layers, named as in memory."""
    norms: Mapping[str, Gain]
    """How the weight of each norm scales its outputs, by module path in memory."""
    vocab_size: int
    hidden_size: int
    max_positions: int | None
    experts_per_token: int
    """The number of routed experts that read a token; 0 if the config does not say."""

    @cached_property
    def linears_by_key(self) -> Mapping[str, tuple[LinearWeight, ...]]:
        """Linear weights by the raw key that holds them."""
        by_key: dict[str, list[LinearWeight]] = defaultdict(list)
        for linear in self.linears:
            by_key[linear.region.key].append(linear)
        return {key: tuple(group) for key, group in by_key.items()}

    @cached_property
    def unplaced(self) -> tuple[str, ...]:
        """Raw keys that nothing accounts for: no parameter, no MTP layer, no buffer of old."""
        return tuple(
            key
            for key in self.unknown
            if self.tensors[key].role is not Role.MTP and not MAY_LACK.search(key)
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names and shapes of all linear weights; equal for equal models."""
        lines = sorted(f"{x.name} {x.shape[0]} {x.shape[1]}" for x in self.linears)
        return hashlib.sha256("\n".join([self.architecture, *lines]).encode()).hexdigest()

    @cached_property
    def experts_counts(self) -> Mapping[str, int]:
        """The number of experts of each experts module, by its path in memory."""
        counts: dict[str, int] = {}
        for linear in self.linears:
            if linear.expert is not None and linear.role is not Role.MTP:
                counts[linear.module] = max(counts.get(linear.module, 0), linear.expert + 1)
        return counts

    @cached_property
    def roles(self) -> Mapping[Role, int]:
        """The number of linear weights of each role."""
        return Counter(linear.role for linear in self.linears)
