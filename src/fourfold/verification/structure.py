"""Rules on the tensors of each quantized linear: which there are, their dtypes and shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from fourfold.storage.safetensors_header import TensorInfo
from fourfold.verification.checkpoint import (
    BLOCK_SCALE,
    DOWN,
    EXPERT,
    FLOATS,
    GLOBAL_SCALE,
    INPUT_SCALE,
    KV_SCALES,
    PARTS,
    WEIGHT,
    Checkpoint,
)
from fourfold.verification.quant_config import W4A4, W4A16
from fourfold.verification.rules import Finding, finding

LEFTOVER = re.compile(
    r"(_amax|_quantizer(\..*)?|\.weight_packed|\.weight_global_scale|\.input_global_scale"
    r"|\.pre_quant_scale|\.weight_zero_point)$"
)
"""Tensors of quantizers and of other layouts, which no loader of this one expects."""

RULE_NAMES: Mapping[str, str] = {
    WEIGHT: "weight",
    BLOCK_SCALE: "block-scale",
    GLOBAL_SCALE: "global-scale",
    INPUT_SCALE: "input-scale",
}
"""Tensor of a linear → how the ids of its rules begin."""

DTYPES: Mapping[str, str] = {
    WEIGHT: "U8",
    BLOCK_SCALE: "F8_E4M3",
    GLOBAL_SCALE: "F32",
    INPUT_SCALE: "F32",
}


def check_parts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weight, block scales and global scale come together, an input scale where it is due."""
    for name, linear in checkpoint.linears.items():
        for part in (WEIGHT, BLOCK_SCALE, GLOBAL_SCALE):
            if part not in linear.parts:
                there = ", ".join(other for other in PARTS if other in linear.parts)
                text = f"missing, while there is {there}"
                yield finding(f"{RULE_NAMES[part]}-missing", f"{name}.{part}", text)
        if linear.algo == W4A4 and INPUT_SCALE not in linear.parts:
            yield finding("input-scale-missing", f"{name}.{INPUT_SCALE}", "missing")
        if linear.algo == W4A16 and INPUT_SCALE in linear.parts:
            yield finding("input-scale-unexpected", f"{name}.{INPUT_SCALE}", "there is one")


def check_dtypes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Each tensor has the layout's dtype."""
    for name, linear in checkpoint.linears.items():
        for part, info in linear.parts.items():
            if info.dtype != DTYPES[part]:
                text = f"{info.dtype}, should be {DTYPES[part]}"
                yield finding(f"{RULE_NAMES[part]}-dtype", f"{name}.{part}", text)


def check_shapes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weight [out, in/2], block scales [out, in/16], one number for the others."""
    for name, linear in checkpoint.linears.items():
        weight, scale = linear.parts.get(WEIGHT), linear.parts.get(BLOCK_SCALE)
        if weight is not None and weight.dtype == DTYPES[WEIGHT]:
            yield from _weight_shapes(name, weight, scale)
        for part in (GLOBAL_SCALE, INPUT_SCALE):
            if part in linear.parts:
                yield from _single(f"{name}.{part}", part, linear.parts[part])


def _weight_shapes(name: str, weight: TensorInfo, scale: TensorInfo | None) -> Iterator[Finding]:
    if len(weight.shape) != 2 or weight.numel == 0:
        text = f"shape {list(weight.shape)}, should be [out, in/2]"
        yield finding("weight-shape", f"{name}.{WEIGHT}", text)
        return
    rows, half = weight.shape
    if half % 8:
        text = f"input dimension {2 * half}, not a multiple of 16"
        yield finding("input-alignment", f"{name}.{WEIGHT}", text)
    elif scale is not None and scale.shape != (rows, half // 8):
        text = f"shape {list(scale.shape)}, should be {[rows, half // 8]}"
        yield finding("block-scale-shape", f"{name}.{BLOCK_SCALE}", text)


def _single(tensor: str, part: str, info: TensorInfo) -> Iterator[Finding]:
    if info.numel != 1:
        text = f"shape {list(info.shape)}, should be []"
        yield finding(f"{RULE_NAMES[part]}-shape", tensor, text)
    elif info.shape:
        yield finding("scale-not-scalar", tensor, f"shape {list(info.shape)}")


def check_alignment(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What kernels want of dimensions; one finding for all linears of a kind."""
    cutlass: dict[str, list[str]] = defaultdict(list)
    marlin: dict[str, list[str]] = defaultdict(list)
    for linear in checkpoint.sound:
        outs, ins = linear.shape
        if outs % 64 or ins % 64:
            marlin[f"[{outs}, {ins}]"].append(linear.name)
        expert = EXPERT.match(linear.name)
        if expert and expert["projection"] in DOWN and ins % 64:
            cutlass[f"intermediate size {ins}"].append(linear.name)
    for rule, found in (("cutlass-alignment", cutlass), ("marlin-alignment", marlin)):
        for text, names in sorted(found.items()):
            yield finding(rule, min(names), f"{text}, in {len(names):,} linears")


def check_unexpected(checkpoint: Checkpoint) -> Iterator[Finding]:
    """No tensor that the layout does not have."""
    allowed = {*PARTS, *KV_SCALES, "bias"}
    for name in sorted(checkpoint.tensors):
        stem, _, leaf = name.rpartition(".")
        if (stem in checkpoint.linears and leaf not in allowed) or LEFTOVER.search(name):
            info = checkpoint.tensors[name]
            yield finding("tensor-unexpected", name, f"{info.dtype} {list(info.shape)}")


def check_kept(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Weights that are not quantized hold floats."""
    for stem in sorted(checkpoint.kept):
        info = checkpoint.tensors.get(f"{stem}.weight") or checkpoint.tensors[stem]
        if info.dtype not in FLOATS:
            yield finding("kept-weight-dtype", info.key, f"{info.dtype} without scales")


def check_expert_shapes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The projections of one expert fit together. Experts of other widths are allowed."""
    experts: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for linear in checkpoint.sound:
        if EXPERT.match(linear.name):
            expert, _, projection = linear.name.rpartition(".")
            experts[expert][projection] = linear.shape
    for expert, shapes in experts.items():
        hidden_last = {shape[::-1] if name in DOWN else shape for name, shape in shapes.items()}
        if len(hidden_last) > 1:
            text = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
            yield finding("expert-shape", expert, text)


CHECKS = (
    check_parts,
    check_dtypes,
    check_shapes,
    check_alignment,
    check_unexpected,
    check_kept,
    check_expert_shapes,
)
