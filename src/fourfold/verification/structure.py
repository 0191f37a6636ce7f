# SPDX-License-Identifier: Apache-2.0
"""Rules on the tensors of each quantized linear: their presence, dtypes and shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from fourfold.models.families import family_of
from fourfold.models.names import EXPERT_LINEAR
from fourfold.storage.safetensors_header import FLOATS, TensorInfo
from fourfold.verification.checkpoint import DOWN, NVFP4, Checkpoint, QuantizedLinear, block_scales
from fourfold.verification.fp8 import LEAVES
from fourfold.verification.readers.base import (
    BLOCK_SCALE,
    GLOBAL_SCALE,
    INPUT_SCALE,
    KV_SCALES,
    PARTS,
    W4A4,
    W4A16,
    WEIGHT,
)
from fourfold.verification.rules import Finding, finding

RULE_NAMES = dict(zip(PARTS, ("weight", "block-scale", "global-scale", "input-scale"), strict=True))
"""Part of a linear → the beginning of its rules' ids."""

_OF_EXPERT = re.compile(r"(^|\.)(local_)?experts\.")
_OF_TOWER = re.compile(r"vision|visual|audio|talker")

DTYPES = dict(zip(PARTS, ("U8", "F8_E4M3", "F32", "F32"), strict=True))


def check_parts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weight, block scales and global scale come together; W4A4 linears have an input scale.

    Each has the layout's dtype. The weight is [out, in/2], the block scales are [out, in/16], other
    scales one number.
    """
    for name, linear in checkpoint.linears.items():
        for part in (WEIGHT, BLOCK_SCALE, GLOBAL_SCALE):
            if part not in linear.parts:
                present = ", ".join(other for other in PARTS if other in linear.parts)
                tensor = checkpoint.tensor_name(name, part)
                yield finding(
                    f"{RULE_NAMES[part]}-missing", tensor, f"missing, while there is {present}"
                )
        if linear.algo == W4A4 and INPUT_SCALE not in linear.parts:
            tensor = checkpoint.tensor_name(name, INPUT_SCALE)
            yield finding("input-scale-missing", tensor, "missing")
        if linear.algo == W4A16 and INPUT_SCALE in linear.parts:
            tensor = linear.parts[INPUT_SCALE].key
            yield finding("input-scale-unexpected", tensor, "there is one")
        for part, info in linear.parts.items():
            if info.dtype != DTYPES[part]:
                text = f"{info.dtype}, should be {DTYPES[part]}"
                yield finding(f"{RULE_NAMES[part]}-dtype", info.key, text)
            elif part == WEIGHT:
                yield from _weight_shapes(linear)
            if part in (GLOBAL_SCALE, INPUT_SCALE):
                yield from _single(info, RULE_NAMES[part], checkpoint.reader.number)


def _weight_shapes(linear: QuantizedLinear) -> Iterator[Finding]:
    weight, scale = linear.parts[WEIGHT], linear.parts.get(BLOCK_SCALE)
    if len(weight.shape) != 2 or weight.numel == 0:
        text = f"shape {list(weight.shape)}, should be [out, in/2]"
        yield finding("weight-shape", weight.key, text)
    elif linear.shape[1] % NVFP4.block:
        text = f"input dimension {linear.shape[1]}, not a multiple of {NVFP4.block}"
        yield finding("input-alignment", weight.key, text)
    elif scale is not None and scale.shape != block_scales(linear.shape):
        text = f"shape {list(scale.shape)}, should be {list(block_scales(linear.shape))}"
        yield finding("block-scale-shape", scale.key, text)


def _single(info: TensorInfo, rule: str, number: tuple[int, ...]) -> Iterator[Finding]:
    if info.numel != 1:
        text = f"shape {list(info.shape)}, should be {list(number)}"
        yield finding(f"{rule}-shape", info.key, text)
    elif info.shape != number:
        yield finding("scale-not-scalar", info.key, f"shape {list(info.shape)}")


def check_alignment(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Dimensions suit the kernels. There is one finding for all linears of a kind."""
    cutlass: dict[str, list[str]] = defaultdict(list)
    marlin: dict[str, list[str]] = defaultdict(list)
    for linear in checkpoint.sound:
        outs, ins = linear.shape
        if outs % 64 or ins % 64:
            marlin[f"[{outs}, {ins}]"].append(linear.name)
        expert = EXPERT_LINEAR.match(linear.name)
        if expert and expert["projection"] in DOWN and ins % 64:
            cutlass[f"intermediate size {ins}"].append(linear.name)
    for rule, by_size in (("cutlass-alignment", cutlass), ("marlin-alignment", marlin)):
        for text, names in sorted(by_size.items()):
            yield finding(rule, min(names), f"{text}, in {len(names):,} linears")


def check_unexpected(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every tensor is one that the layout has."""
    reader = checkpoint.reader
    for name in sorted(checkpoint.tensors):
        stem, _, leaf = name.rpartition(".")
        if stem in checkpoint.fp8:
            is_allowed = leaf in (*LEAVES, *KV_SCALES, "bias")
        else:
            is_allowed = not reader.leftover.search(name)
            if stem in checkpoint.linears:
                is_allowed &= leaf in (*reader.leaves.values(), *KV_SCALES, "bias")
        if not is_allowed:
            info = checkpoint.tensors[name]
            yield finding("tensor-unexpected", name, f"{info.dtype} {list(info.shape)}")


def check_kept(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weights that are not quantized hold floats."""
    for stem in sorted(checkpoint.kept):
        info = checkpoint.tensors.get(f"{stem}.weight") or checkpoint.tensors[stem]
        if info.dtype not in FLOATS:
            yield finding("kept-weight-dtype", info.key, f"{info.dtype} without scales")


def check_expert_names(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The linears of quantized experts have names that some loader maps; one finding a kind."""
    types = checkpoint.model_types
    family = family_of(*(name if isinstance(name, str) else None for name in types))
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sorted([*checkpoint.linears, *checkpoint.fp8]):
        if _OF_EXPERT.search(name) and not _OF_TOWER.search(name) and not family.maps(name):
            kinds[re.sub(r"\d+", "#", name)].append(name)
    for names in kinds.values():
        text = f"{len(names):,} linears called so; loaders map {family.pattern}"
        yield finding("expert-name", names[0], text)


def check_expert_shapes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The projections of one expert fit together. Experts of other widths are allowed."""
    experts: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for linear in checkpoint.sound:
        if EXPERT_LINEAR.match(linear.name):
            expert, _, projection = linear.name.rpartition(".")
            experts[expert][projection] = linear.shape
    for expert, shapes in experts.items():
        hidden_last = {shape[::-1] if name in DOWN else shape for name, shape in shapes.items()}
        if len(hidden_last) > 1:
            text = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
            yield finding("expert-shape", expert, text)


CHECKS = (
    check_parts,
    check_alignment,
    check_unexpected,
    check_kept,
    check_expert_names,
    check_expert_shapes,
)
