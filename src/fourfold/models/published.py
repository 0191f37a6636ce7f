# SPDX-License-Identifier: Apache-2.0
"""The published names of tensors that are saved under their names in memory.

transformers 5 saves a model under the names of its family's published checkpoints; with
`save_original_format=False`, and where a trainer saves the state dict, under those of its modules.
Engines' loaders know the published names. transformers' renaming rules, reversed, lead to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fourfold.models.live_internals import made_by_converters, reversed_renaming
from fourfold.models.module_tree import ModuleTree
from fourfold.models.upstream import upstream_of


def published_names(tree: ModuleTree, keys: Iterable[str]) -> dict[str, str]:
    """Return the published names of raw keys, where they are other ones.

    Empty unless the model has routed experts, and all keys that have a place are names in memory.
    """
    places = [place for place in map(tree.conversion.place, keys) if place.target is not None]
    if not tree.experts or any(place.key != place.target for place in places):
        return {}
    rename, upstream = reversed_renaming(tree.conversion.model), upstream_of(*tree.model_types)
    names = {}
    for place in places:
        name = rename(place.key)
        for pattern, replacement in upstream.renames:
            name = re.sub(pattern, replacement, name)
        if tree.conversion.place(name).target == place.key:
            names[place.key] = name
    changed = {key: name for key, name in names.items() if key != name}
    return changed if len(set(names.values())) == len(names) else {}


def unpublished(tree: ModuleTree, keys: Iterable[str]) -> list[str]:
    """Return the raw keys of parameters, other than experts, that no published checkpoint holds:
    transformers makes each of them of several tensors."""
    is_made = made_by_converters(tree.conversion.model)
    return [
        place.key
        for place in map(tree.conversion.place, keys)
        if place.target is not None
        and place.pattern is None
        and place.target.rpartition(".")[0] not in tree.experts
        and is_made(place.target)
    ]
