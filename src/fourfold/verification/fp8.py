# SPDX-License-Identifier: Apache-2.0
"""FP8 linears beside NVFP4 ones: their tensors, and their values against the source.

Their weights are decoded by the codecs that read FP8 sources, which share no code with what writes
FP8. A legal relative error is about 0.027: E4M3 has three bits of mantissa.

    e ≤ max(0.1, min(3·e', 1.05))        e': the weight rounded to E4M3 under its own largest value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fourfold.errors import SourceError
from fourfold.models.fusion import fuse
from fourfold.sources.codecs import CODECS, EncodedWeight, ReadRows, TensorCodec
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.verification.rules import Finding, finding

if TYPE_CHECKING:
    from fourfold.verification.checkpoint import Checkpoint

BOUND = 0.1
E4M3_MAX = 448.0

WEIGHT, SCALE, INPUT_SCALE = LEAVES = "weight", "weight_scale", "input_scale"
"""The last names of a linear's tensors."""


@dataclass(frozen=True, slots=True)
class Algo:
    """An FP8 algorithm, by the name that `quantized_layers` has for it."""

    codec: str
    has_input_scale: bool
    scales: Callable[[int, int], tuple[tuple[int, ...], ...]]
    """The shapes that weight_scale may have for a weight [out, in]."""
    multiple: int = 1
    """What the input dimension must be a multiple of."""


def _of_blocks(rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    high, wide = -(-rows // 128), -(-columns // 128)
    return (high, 1, wide, 1), (high, wide)


_BLOCKS = Algo("fp8_blocks", False, _of_blocks, multiple=128)

ALGOS: Mapping[str, Algo] = {
    "FP8": Algo("fp8_scaled", True, lambda rows, columns: ((), (1,))),
    "FP8_PER_CHANNEL_PER_TOKEN": Algo("fp8_scaled", False, lambda rows, _: ((rows,), (rows, 1))),
    "FP8_PB_WO": _BLOCKS,
    "FP8_BLOCK_SCALES": _BLOCKS,
    "MXFP8": Algo("mxfp8", False, lambda rows, columns: ((rows, columns // 32),), multiple=32),
}


@dataclass(frozen=True, slots=True)
class FP8Linear:
    """One linear in FP8, and the tensors that belong to its name."""

    name: str
    parts: Mapping[str, TensorInfo]
    """By the last name: weight, weight_scale, input_scale."""
    algo: str | None
    weight: EncodedWeight | None
    """The weight as a codec reads it; None if its tensors do not allow that."""
    codec: TensorCodec | None
    fault: str = ""
    """Why they do not."""

    @property
    def is_sound(self) -> bool:
        """True if its values can be read."""
        return self.weight is not None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], of a sound linear."""
        rows, columns = self.parts[WEIGHT].shape
        return rows, columns

    @property
    def compared(self) -> tuple[TensorInfo, ...]:
        """The tensors that say what the values are."""
        return tuple(self.parts[part] for part in (WEIGHT, SCALE) if part in self.parts)

    def decode(self, start: int, stop: int, read: ReadRows) -> torch.Tensor:
        """Return rows of a sound linear in float32."""
        assert self.weight is not None
        assert self.codec is not None
        out = torch.empty(stop - start, self.shape[1])
        self.codec.decode(self.weight, start, stop, read, out)
        return out


def fp8_linear(
    name: str, parts: Mapping[str, TensorInfo], algo: str | None, algos: Mapping[str, Algo]
) -> FP8Linear:
    """Describe the linear `name` by its tensors.

    Args:
        name: The linear's name.
        parts: Its tensors by their last names; there is a weight.
        algo: Its algorithm, as the configuration states it.
        algos: The algorithms that the layout has.
    """
    known, weight, scale = algos.get(algo or ""), parts[WEIGHT], parts.get(SCALE)
    if known is None:
        fault = f"stored in FP8, while the configuration says {algo or 'nothing'}"
        return FP8Linear(name, parts, algo, None, None, fault)
    fits = scale is not None and len(weight.shape) == 2 and weight.dtype == "F8_E4M3"
    is_exponent = scale is not None and scale.dtype in ("U8", "F8_E8M0")
    fits = fits and is_exponent == (known.codec == "mxfp8")
    if not fits or scale is None or scale.shape not in known.scales(*weight.shape):
        shapes = ", ".join(f"{part} {x.dtype} {list(x.shape)}" for part, x in parts.items())
        return FP8Linear(name, parts, algo, None, None, f"{shapes}: not {algo}")
    for codec in (CODECS[known.codec], CODECS["fp8_scaled"]):  # the latter reads a single block
        try:
            claimed = codec.claim({}, {weight.key: weight, scale.key: scale})
        except SourceError as error:
            return FP8Linear(name, parts, algo, None, None, str(error))
        if weight.key in claimed:
            return FP8Linear(name, parts, algo, claimed[weight.key], codec)
    return FP8Linear(name, parts, algo, None, None, f"not {algo}")


def check_linears(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Each has the tensors, shapes and scales of its algorithm."""
    for linear in checkpoint.fp8.values():
        if linear.weight is None or linear.algo is None:
            yield finding("fp8-tensors", linear.name, linear.fault)
            continue
        algo, columns = checkpoint.reader.fp8[linear.algo], linear.shape[1]
        if columns % algo.multiple:
            text = f"input dimension {columns}, not a multiple of {algo.multiple} ({linear.algo})"
            yield finding("input-alignment", linear.parts[WEIGHT].key, text)
        yield from _input_scale(checkpoint, linear, is_wanted=algo.has_input_scale)
        scale = checkpoint.rows(linear.parts[SCALE].key)
        is_byte = scale.dtype == torch.uint8
        values = (scale.view(torch.float8_e8m0fnu) if is_byte else scale).float()
        bad = values[~(values.isfinite() & (values > 0))]
        if len(bad):
            text = f"{float(bad[0]):g}, {len(bad):,} of {values.numel():,} scales"
            yield finding("fp8-scale-value", linear.parts[SCALE].key, text)
    yield from _fused(checkpoint)


def _input_scale(
    checkpoint: Checkpoint, linear: FP8Linear, *, is_wanted: bool
) -> Iterator[Finding]:
    info, name = linear.parts.get(INPUT_SCALE), f"{linear.name}.{INPUT_SCALE}"
    if info is None:
        if is_wanted:
            yield finding("input-scale-missing", name, f"missing ({linear.algo})")
    elif not is_wanted:
        yield finding("fp8-tensors", name, f"there is one ({linear.algo})")
    elif info.numel != 1:
        yield finding(
            "input-scale-shape", name, f"shape {list(info.shape)}, should hold one number"
        )
    elif not 0 < (value := checkpoint.scalar(name)) < math.inf:
        yield finding("input-scale-nan", name, f"{value:g}")


def _fused(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Linears that engines fuse have one algorithm, one whole scale and one input scale."""
    siblings: dict[str, dict[str, FP8Linear]] = {}
    for name, linear in checkpoint.fp8.items():
        parent, _, last = name.rpartition(".")
        siblings.setdefault(parent, {})[last] = linear
    for parent, linears in sorted(siblings.items()):
        for _, lasts in fuse(linears, checkpoint.peculiar.fused):
            group = [linears[last] for last in lasts if linears[last].is_sound]
            if len({linear.algo for linear in group}) > 1:
                text = ", ".join(f"{x.name.rpartition('.')[2]} {x.algo}" for x in group)
                yield finding("group-algo-differs", f"{parent}.{lasts[0]}", text)
            whole = [linear for linear in group if linear.algo == "FP8"]
            for part in (SCALE, INPUT_SCALE):
                yield from _one_number(checkpoint, whole, part)


def _one_number(checkpoint: Checkpoint, group: list[FP8Linear], part: str) -> Iterator[Finding]:
    infos = [x.parts[part] for x in group if part in x.parts and x.parts[part].numel == 1]
    values = {info.key: checkpoint.scalar(info.key) for info in infos}
    if len(set(values.values())) > 1:
        rule = "fp8-group-scale-differs" if part == SCALE else "group-input-scale-differs"
        text = ", ".join(f"{value:.9g}" for value in values.values())
        yield finding(rule, min(values), text)


def error_sums(
    checkpoint: Checkpoint, linear: FP8Linear, w_OI: torch.Tensor, row: int
) -> tuple[float, float]:
    """Return Σ(w − ŵ)² and Σw² of rows of a weight from `row` on."""
    decoded = linear.decode(row, row + len(w_OI), checkpoint.rows)
    w = w_OI.double()
    return float((w - decoded.double()).square().sum()), float(w.square().sum())


def rounding_error(w_OI: torch.Tensor, amax: float) -> float:
    """Return Σ(w − ŵ)² of rows that are rounded to E4M3 under the largest value of the weight."""
    scale = amax / E4M3_MAX or 1.0
    rounded = (w_OI.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return float((w_OI.double() - rounded.double() * scale).square().sum())


CHECKS = (check_linears,)
