"""The values of a live model's parameters and buffers, wherever they are.

In memory, on another device, offloaded to disk by accelerate (then read one parameter at a time),
or sharded over ranks by FSDP2. A sharded parameter is gathered by all ranks together, in `hold`;
nothing else here is a collective (but that all make a `LiveValues`), so that threads may read what
is held.
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
"""Offloaded parameters that are kept after they were read: gate and up, down, and their biases."""


class LiveValues:
    """Parameters and buffers of a model by name. Safe for many threads."""

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
        # `state_dict` has just sharded anew what FSDP2 had gathered; it may gather it again.
        tensors: list[Any] = [self._tensor(name) for name in self._owners]
        meshes = [tensor.device_mesh for tensor in tensors if _is_sharded(tensor)]
        self.is_sharded = bool(meshes)
        """Whether parameters lie on several ranks, also while a forward has them gathered."""
        self.ranks = _ranks_of(meshes) if meshes else GroupRank()

    def get(self, name: str) -> torch.Tensor:
        """A whole parameter, on whatever device; it must not be changed."""
        if name in self._held:
            return self._held[name]
        tensor: Any = self._tensor(name)
        if _is_sharded(tensor):
            raise SourceError(
                f"{name}: is sharded over {tensor.device_mesh.size()} ranks and not held. "
                "All ranks must hold a unit together before it is read."
            )
        return self._offloaded(name) if tensor.is_meta else tensor

    def hold(self, names: Iterable[str], *, keep: bool = True) -> None:
        """Gather what is sharded, read what is offloaded, until `release`.

        Where parameters are sharded, all ranks must call this with the same names in the same
        order. keep: False for a rank that only takes part in the gathering.
        """
        for name in dict.fromkeys(names):
            tensor = self._tensor(name)
            if _is_sharded(tensor):
                whole = _gathered(tensor)
                if keep:
                    self._held[name] = whole.cpu()
            elif tensor.is_meta and keep:
                self._held[name] = self._offloaded(name)

    def release(self) -> None:
        """Hold nothing any more."""
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
        for each in (name, self._ties.get(name)):
            value = None if each is None else offloaded_value(self.model, each)
            if value is not None and not value.is_meta:
                return value.detach()
        raise SourceError(
            f"{name}: is on the meta device, and no hook of accelerate has its values. "
            "Load the model's weights (from_pretrained does) before it is quantized."
        )


def _is_sharded(tensor: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _gathered(tensor: Any) -> torch.Tensor:
    """All of a sharded tensor, on the ranks' own device; a collective."""
    whole: torch.Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
    return whole


def _ranks_of(meshes: Iterable[Any]) -> GroupRank:
    """All that the meshes of one model's parameters lie on; a collective of these ranks.

    A model may have several meshes (expert parallelism), each with other ranks than this process
    sees. Where the largest does not cover the others, that is every rank there is.
    """
    members = {mesh: set(mesh.mesh.flatten().tolist()) for mesh in meshes}
    mesh = max(members, key=lambda each: len(members[each]))
    found = members[mesh]
    if dist.get_rank() not in found:
        raise UsageError(
            f"rank {dist.get_rank()}: has no part of the model, which is sharded over ranks "
            f"{sorted(found)}. Quantize it on these only."
        )
    group = None
    if len(found) < dist.get_world_size() and found.issuperset(set().union(*members.values())):
        is_line = mesh.ndim == 1
        group = mesh.get_group() if is_line else _group_of(sorted(found))
    return GroupRank(dist.get_rank(group), dist.get_world_size(group), group)


def _group_of(ranks: list[int]) -> Any:
    """A new process group, that the ranks in it make without the others."""
    return dist.new_group(ranks, use_local_synchronization=True)
