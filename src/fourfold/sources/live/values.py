# SPDX-License-Identifier: Apache-2.0
"""The values of a live model's parameters and buffers, wherever they are.

They may be in memory, on another device, offloaded to disk by accelerate (and are then read one
parameter at a time), or sharded over ranks by FSDP2.

`LiveValues()` and `hold` are collectives of the ranks that share the model. Everything else is
local and safe for many threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fourfold.distributed.process_groups import GroupRank
from fourfold.errors import SourceError, UsageError
from fourfold.models.live_internals import offloaded_value

KEPT = 4
"""Offloaded parameters that stay in memory after they were read: the parts of a fused layer."""


class LiveValues:
    """Parameters and buffers of a model by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._owners = {
            name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name in model.state_dict()
        }
        self._ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._held: dict[str, torch.Tensor] = {}
        self._recent: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        # `state_dict` has just resharded what FSDP2 had gathered for a forward pass.
        tensors: list[Any] = [self._tensor(name) for name in self._owners]
        meshes = [tensor.device_mesh for tensor in tensors if _is_sharded(tensor)]
        self.is_sharded = bool(meshes)
        """True if parameters lie on several ranks, even while a forward pass has gathered them."""
        self.ranks = _ranks_of(meshes) if meshes else GroupRank()

    def get(self, name: str) -> torch.Tensor:
        """Return a whole parameter, on its own device; it must not be changed."""
        if name in self._held:
            return self._held[name]
        tensor: Any = self._tensor(name)
        if _is_sharded(tensor):
            raise SourceError(
                f"{name}: is sharded over {tensor.device_mesh.size()} ranks and not held. "
                "All ranks must hold a layer together before it is read."
            )
        return self._offloaded(name) if tensor.is_meta else tensor

    def hold(self, names: Iterable[str], *, keep: bool = True) -> None:
        """Gather sharded parameters and read offloaded ones, until `release`.

        If parameters are sharded, all ranks must call this with the same names in the same order.

        Args:
            names: Names of parameters and buffers.
            keep: False on a rank that only takes part in the gathering.
        """
        for name in dict.fromkeys(names):
            tensor: Any = self._tensor(name)
            if _is_sharded(tensor):
                whole = tensor.to(tensor.device_mesh.device_type).full_tensor()  # on all ranks
                if keep:
                    self._held[name] = whole.cpu()
            elif tensor.is_meta and keep:
                self._held[name] = self._offloaded(name)

    def release(self) -> None:
        """Give back the memory of what was held."""
        with self._lock:
            self._held.clear()
            self._recent.clear()

    def _tensor(self, name: str) -> torch.Tensor:
        owner, last = self._owners[name]
        tensor: torch.Tensor = getattr(owner, last)
        return tensor.detach()

    def _offloaded(self, name: str) -> torch.Tensor:
        with self._lock:
            if name not in self._recent:
                self._recent[name] = self._read(name)
                if len(self._recent) > KEPT:
                    self._recent.popitem(last=False)
            self._recent.move_to_end(name)
            return self._recent[name]

    def _read(self, name: str) -> torch.Tensor:
        for alias in (name, self._ties.get(name)):
            value = None if alias is None else offloaded_value(self.model, alias)
            if value is not None and not value.is_meta:
                return value.detach()
        raise SourceError(
            f"{name}: is on the meta device, and no hook of accelerate has its values. "
            "Load the model's weights (from_pretrained does) before it is quantized."
        )


def _is_sharded(tensor: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _ranks_of(meshes: Iterable[Any]) -> GroupRank:
    """Find the ranks that the meshes of a model's parameters lie on; a collective of these.

    A model may have several meshes (expert parallelism), of which this process sees its own. If
    the largest does not contain the others, all ranks of the job share the model.
    """
    members = {mesh: set(mesh.mesh.flatten().tolist()) for mesh in meshes}
    mesh = max(members, key=lambda mesh: len(members[mesh]))
    ranks = members[mesh]
    if dist.get_rank() not in ranks:
        raise UsageError(
            f"rank {dist.get_rank()}: has no part of the model, which is sharded over ranks "
            f"{sorted(ranks)}. Quantize it on these only."
        )
    group = None
    if len(ranks) < dist.get_world_size() and ranks.issuperset(set().union(*members.values())):
        if mesh.ndim == 1:
            group = mesh.get_group()
        else:  # made without the ranks that are not in it
            group = dist.new_group(sorted(ranks), use_local_synchronization=True)
    return GroupRank(dist.get_rank(group), dist.get_world_size(group), group)
