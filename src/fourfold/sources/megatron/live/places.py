"""This rank's place among those that share a weight: by tensor, or by expert parallelism.

Groups are those that the model itself was built with. Where it keeps none, they are Megatron's
global ones, if Megatron is there: nothing of it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fourfold.errors import UsageError

_STATE = "megatron.core.parallel_state"


@dataclass(frozen=True, slots=True)
class Place:
    """One of `size` ranks that share something."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to share: how groups of it are called, and the field with how many ranks share."""

    attributes: tuple[str, ...]
    collected: str
    """Its name in a `pg_collection`."""
    getter: str
    field: str


TENSOR = Kind(("tp_group",), "tp", "get_tensor_model_parallel_group", "tensor_model_parallel_size")
EXPERT = Kind(("ep_group",), "ep", "get_expert_model_parallel_group", "expert_model_parallel_size")
EXPERT_TENSOR = Kind(
    ("tp_group",), "expt_tp", "get_expert_tensor_parallel_group", "expert_tensor_parallel_size"
)


def place(kind: Kind, owner: Any, model: Any) -> Place:
    """This rank's place; `owner` is the module whose weights are shared, `model` all around it.

    Raises `UsageError` where weights are shared, and no group says how.
    """
    for group in _groups(kind, owner, model):
        if group is not None:
            return Place(group.rank(), group.size())
    size = getattr(getattr(model, "config", None), kind.field, None)
    if size not in (None, 1):
        raise UsageError(
            f"{type(model).__name__}: {kind.field} is {size}, but neither the model nor "
            "Megatron's parallel_state has that process group. Quantize it where it was built."
        )
    return Place()


def _groups(kind: Kind, owner: Any, model: Any) -> Iterable[Any]:
    for attribute in kind.attributes:
        yield getattr(owner, attribute, None)
    for each in (owner, model):
        yield getattr(getattr(each, "pg_collection", None), kind.collected, None)
    state: Any = sys.modules.get(_STATE)
    if state is not None:
        yield getattr(state, kind.getter)(check_initialized=False)
