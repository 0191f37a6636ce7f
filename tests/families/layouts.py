# SPDX-License-Identifier: Apache-2.0
"""Upstream's on-disk layouts: from the logical weights to the tensors of a checkpoint.

Two steps. An experts layout writes the experts of one module, from their logical matrices
`[out, in]`. Then a family's edits turn names (and a few shapes) of the module tree into those of
the published checkpoint: regular expressions, applied in order to every key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .truth import Matrices

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class ExpertsLayout:
    """A short name, and the function from (module path, matrices) to tensors on disk.

    `write` is None where the checkpoint has the parameters just as the module keeps them.
    """

    name: str
    write: Callable[[str, Matrices], Tensors] | None = None


def per_expert(gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"):
    names = {"gate": gate, "up": up, "down": down}

    def write(path: str, matrices: Matrices) -> Tensors:
        return {
            f"{path}.{index}.{names[projection]}.weight": matrix
            for projection, stack in matrices.items()
            for index, matrix in enumerate(stack)
        }

    return ExpertsLayout("per_expert", write)


def fused(
    gate_up: str = "gate_up_proj", down: str = "down_proj", *, transposed=False, interleaved=False
):
    """Experts stacked: `[E, 2I, H]` and `[E, H, I]`, or their transposes `[E, H, 2I]`, `[E, I, H]`.

    Gate and up lie one after the other, or row by row in turn (interleaved).
    """
    flags = "_transposed" * transposed + "_interleaved" * interleaved

    def write(path: str, matrices: Matrices) -> Tensors:
        gate_eih, up_eih = torch.stack(matrices["gate"]), torch.stack(matrices["up"])
        if interleaved:
            first = torch.stack((gate_eih, up_eih), dim=2).flatten(1, 2)
        else:
            first = torch.cat((gate_eih, up_eih), dim=1)
        second = torch.stack(matrices["down"])
        if transposed:
            first, second = first.mT, second.mT
        return {f"{path}.{gate_up}": first, f"{path}.{down}": second}

    renamed = (gate_up, down) != ("gate_up_proj", "down_proj")
    return ExpertsLayout("renamed" + flags if renamed else "fused" + flags, write)


def stacked_apart(gate: str, up: str, down: str):
    """Each projection stacked by itself, under the path that the family's edits then rename."""
    names = {"gate": gate, "up": up, "down": down}

    def write(path: str, matrices: Matrices) -> Tensors:
        return {f"{path}.{names[p]}.weight": torch.stack(stack) for p, stack in matrices.items()}

    return ExpertsLayout("stacked", write)


PER_EXPERT = per_expert()
W1_W3_W2 = per_expert("w1", "w3", "w2")
FUSED = fused()
FUSED_TRANSPOSED = fused(transposed=True)
FUSED_TRANSPOSED_INTERLEAVED = fused(transposed=True, interleaved=True)
AS_IN_MEMORY = ExpertsLayout("as_in_memory")
DENSE = ExpertsLayout("dense")


def rename(*pairs: tuple[str, str]) -> Edit:
    """Apply (pattern, replacement) pairs to every key, in order."""

    def edit(tensors: Tensors) -> Tensors:
        renamed = {_substitute(key, pairs): value for key, value in tensors.items()}
        assert len(renamed) == len(tensors), "two keys were given one name"
        return renamed

    return edit


def _substitute(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in pairs:
        key = re.sub(pattern, replacement, key)
    return key


def split(pattern: str, *replacements: str) -> Edit:
    """Cut each tensor whose key matches into equal parts along its first dimension."""

    def edit(tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for key, value in tensors.items():
            if not re.search(pattern, key):
                out[key] = value
                continue
            for replacement, part in zip(replacements, value.chunk(len(replacements)), strict=True):
                out[re.sub(pattern, replacement, key)] = part
        return out

    return edit


def join(
    endings: Sequence[str],
    replacement: str,
    *,
    dim: int,
    interleaved: bool = False,
    within: str = "",
) -> Edit:
    """Merge the tensors whose keys have these endings into one along `dim`.

    One after the other, or in turn (interleaved); only keys that contain `within`.
    """

    def edit(tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for key in tensors:
            stem = key.removesuffix(endings[0])
            parts = [tensors.get(stem + ending) for ending in endings]
            if stem == key or within not in key or any(part is None for part in parts):
                continue
            for ending in endings:
                del out[stem + ending]
            if interleaved:
                out[stem + replacement] = torch.stack(parts, dim + 1).flatten(dim, dim + 1)
            else:
                out[stem + replacement] = torch.cat(parts, dim)
        return out

    return edit


def change(pattern: str, operation: Callable[[Tensor], Tensor]) -> Edit:
    """Apply `operation` to each tensor whose key matches."""

    def edit(tensors: Tensors) -> Tensors:
        return {k: operation(v) if re.search(pattern, k) else v for k, v in tensors.items()}

    return edit


def interleave_rotary(heads: int) -> Callable[[Tensor], Tensor]:
    """From rotate-half order of the rows of each head to interleaved pairs."""

    def operation(weight: Tensor) -> Tensor:
        half = weight.shape[0] // heads // 2
        return weight.view(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)

    return operation


def append_experts(first: str, second: str) -> Edit:
    """Number the experts of `second` after those of `first`, as one list under `first`."""

    def edit(tensors: Tensors) -> Tensors:
        here = re.compile(re.escape(first) + r"\.(\d+)\.")
        count = 1 + max(int(m[1]) for key in tensors if (m := here.search(key)))
        there = re.compile(re.escape(second) + r"\.(\d+)\.")
        return {
            there.sub(lambda m: f"{first}.{int(m[1]) + count}.", key): value
            for key, value in tensors.items()
        }

    return edit
