# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and dtypes on disk of a model in memory whose checkpoint is not at hand.

transformers reverses its own conversion; `upstream` corrects the result for the families whose
published checkpoints differ from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from fourfold.errors import ModelError
from fourfold.models.live_internals import raw_tensors
from fourfold.models.module_tree import ModuleTree
from fourfold.models.names import natural
from fourfold.models.upstream import Upstream, upstream_of
from fourfold.sources.live.unloading import Unloading
from fourfold.sources.safetensors import IN_MEMORY, lay_out
from fourfold.storage.safetensors_header import DTYPE_NAMES, TensorInfo


def name_tensors(model: Any, blueprint: Any, tree: ModuleTree) -> Unloading:
    """Derive the tensors that `model` would have on disk from it and its blueprint, on meta.

    Raises:
        ModelError: No guess accounts for every parameter.
    """
    upstream, problem = upstream_of(*tree.model_types), "transformers cannot reverse its conversion"
    for tensors in raw_tensors(model, blueprint, fused=upstream.fused):
        unloading = Unloading(tree, _published(tensors, upstream))
        misfit = unloading.misfit()
        if misfit is None and not unloading.unplaced:
            return unloading
        problem = misfit or f"{unloading.unplaced[0]} has no place in the model"
    raise ModelError(
        f"{tree.architecture}: what its tensors are called on disk is not known ({problem}). "
        "Give the folder that it was loaded from as checkpoint."
    )


def _published(tensors: Mapping[str, torch.Tensor], upstream: Upstream) -> dict[str, TensorInfo]:
    """The tensors under their published names, one after the other in the order of these."""
    published = {_published_name(name, upstream): tensor for name, tensor in tensors.items()}
    laid_out = []
    for key in sorted(published, key=natural):
        shape = tuple(published[key].shape)
        if upstream.transposed is not None and re.search(upstream.transposed, key):
            shape = (*shape[:-2], shape[-1], shape[-2])
        laid_out.append((key, DTYPE_NAMES[published[key].dtype], shape))
    return lay_out(laid_out, IN_MEMORY)


def _published_name(name: str, upstream: Upstream) -> str:
    for pattern, replacement in upstream.renames:
        name = re.sub(pattern, replacement, name)
    return name
