# SPDX-License-Identifier: Apache-2.0
"""This rank's position in the process groups that share a weight: tensor and expert parallelism.

The groups are those that the model was built with. A model that keeps none has Megatron's global
groups, which are looked up without an import, if Megatron has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fourfold.distributed.process_groups import GroupRank
from fourfold.errors import UsageError

_GLOBAL_GROUPS = "megatron.core.parallel_state"


@dataclass(frozen=True, slots=True)
class Parallelism:
    """A way to share weights: where its process group is kept, and the field with its size."""

    attribute: str
    """The group's name on a module."""
    collected: str
    """Its name in a module's `pg_collection`."""
    field: str
    """The field of the model's configuration that holds its size."""


TENSOR = Parallelism("tp_group", "tp", "tensor_model_parallel_size")
EXPERT = Parallelism("ep_group", "ep", "expert_model_parallel_size")
EXPERT_TENSOR = Parallelism("tp_group", "expt_tp", "expert_tensor_parallel_size")


def group_rank(parallelism: Parallelism, owner: Any, model: Any) -> GroupRank:
    """Return this rank's position among those that share the weights of `owner`, in `model`.

    Raises:
        UsageError: Weights are shared, but no process group says how.
    """
    for group in _groups(parallelism, owner, model):
        if group is not None:
            return GroupRank(group.rank(), group.size())
    size = getattr(getattr(model, "config", None), parallelism.field, None)
    if size not in (None, 1):
        raise UsageError(
            f"{type(model).__name__}: {parallelism.field} is {size}, but neither the model nor "
            "Megatron's parallel_state has that process group. Quantize it where it was built."
        )
    return GroupRank()


def _groups(parallelism: Parallelism, owner: Any, model: Any) -> Iterator[Any]:
    yield getattr(owner, parallelism.attribute, None)
    for module in (owner, model):
        yield getattr(getattr(module, "pg_collection", None), parallelism.collected, None)
    if _GLOBAL_GROUPS in sys.modules:
        state: Any = sys.modules[_GLOBAL_GROUPS]
        getter = f"get_{parallelism.field.removesuffix('_size')}_group"
        yield getattr(state, getter)(check_initialized=False)
