# SPDX-License-Identifier: Apache-2.0
"""Experts that compute in small whole numbers, and a formula for what they compute.

float32 holds every product and sum exactly, so all implementations give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from families import FAMILIES, build_model
from families.truth import experts_of
from fourfold.models.experts import ExpertsModule
from fourfold.models.module_tree import describe

T, K = 23, 2

DECORATED = ["qwen3_moe", "aria", "nemotron_h", "jamba", "qwen3_5_moe_text"]
"""Default, transposed, without a gate, and two more; their activation can be replaced."""

EAGER_ONLY = ["step3p7", "longcat_flash", "dbrx"]
KINDS = ["grouped_mm", "batched_mm", "eager"]


@dataclass
class Experts:
    """One experts module of a model, with weights that are small whole numbers."""

    model: nn.Module
    path: str
    layout: ExpertsModule
    owner: Any
    """What is called: the experts module, or what it belongs to."""
    matrices: dict[str, list[Tensor]]

    @property
    def module(self) -> Any:
        return self.model.get_submodule(self.path)

    def inner(self, x: Tensor, expert: int) -> Tensor:
        """What down reads, by the formula."""
        up = x @ self.matrices["up"][expert].T
        if "gate" in self.matrices:
            return (x @ self.matrices["gate"][expert].T).relu() * up
        return up.relu()

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            return self.owner(x, index, weights).reshape(x.shape)

    def wanted(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for token, (chosen, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, share in zip(chosen, shares, strict=True):
                down = self.matrices["down"][expert]
                out[token] += share * (self.inner(x[token], expert) @ down.T)
        return out


def experts_with(name: str, kind: str = "grouped_mm") -> Experts:
    """The first experts module of a family's model, in whole numbers."""
    model = build_model(FAMILIES[name], dtype=torch.float32)
    tree = describe(model)
    path = next(iter(tree.experts))
    module: Any = model.get_submodule(path)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        values = torch.randint(-1, 2, parameter.shape, generator=generator)
        parameter.data = values.to(torch.float32)
    if hasattr(module, "activation_fn"):
        module.activation_fn = nn.ReLU()
    else:
        module.act_fn = nn.ReLU()
    if hasattr(module, "is_transposed"):
        module.config._experts_implementation_internal = kind
    owner = model.get_submodule(path.removesuffix(".mlp"))
    return Experts(model, path, tree.experts[path], owner, experts_of(model)[path])


def tokens(count: int = T, width: int = 64, experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token (one of them never), and their shares."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-2, 3, (count, width), generator=generator).float()
    order = torch.rand(count, experts - 1, generator=generator).argsort(-1)[:, :K]
    return x, order, torch.tensor([0.5, 0.25]).expand(count, K).contiguous()
