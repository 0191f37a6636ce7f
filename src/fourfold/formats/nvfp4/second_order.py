# SPDX-License-Identifier: Apache-2.0
"""NVFP4 codes that lose the least in the outputs of a linear weight, by its inputs' second moment.

A weight W [out, in] whose inputs x have the second moment H = Σ x·xᵀ/n loses, with values Q in
place of targets T (which are W, unless the inputs are not those of the source),

    L = Σ over rows of (t − q)·H·(t − q)ᵀ.

**Rounding with compensation** (GPTQ). H' is H with a multiple of its mean diagonal added, and its
blocks of 16 columns in the order of falling energy. With H'⁻¹ = UᵀU, U upper triangular, columns
are rounded from first to last, and those behind make up for what a column loses:

    q_i = round(t_i)    e_i = (t_i − q_i)/U_ii    t_j −= e_i·U_ij for j > i.

Σe² is then L itself. So the scale of a block can be **chosen jointly** with its codes: round the 16
columns under each candidate scale, and keep the one with the smallest Σe² of the block, which is
the loss if the columns behind compensate as well as real numbers can.

**Descent.** Given all other blocks, the best real values of block b are

    t = q_b − ((Q − T)·H')_b·(H'_bb)⁻¹.

Its scale and codes are chosen again for that target under H'_bb, and are kept only if the loss is
smaller. After a sweep over all blocks, the group scale takes its best value,
S·Σ⟨T, Q⟩_H'/Σ⟨Q, Q⟩_H'. Neither step raises L, but for rounding in float32; a sweep that does, by
float64, is taken back.

**Precision.** U (`inverse_factor`) is in float32, as all that follows; where float32 finds H' not
positive definite, in float64.

Shapes: O outputs, I inputs, B blocks of inputs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fourfold.formats.nvfp4 import block_scales, e2m1, joint_cpu
from fourfold.formats.nvfp4.inverse_factor import inverse_factor

BLOCK = 16
TILE = 128
"""Columns that are rounded before those behind them are updated, by a matrix product."""

LEAST_SCALE_GAIN = 2.0**-10
"""A group scale is changed only by a larger part of it; the gain of less is lost in rounding."""


class Moment:
    """The second moment of a weight's inputs, damped, in the order in which blocks are rounded."""

    def __init__(self, moment_II: Tensor, damping: float) -> None:
        """Damp and order a second moment `[I, I]`, times a power of two that brings its mean
        diagonal near 1. One that is all 0 stands for equal inputs.

        Args:
            moment_II: Finite.
            damping: At least 0.001: less may leave a moment of few rows singular in float32.
        """
        mean = float(moment_II.diagonal().double().mean())
        if mean > 0:
            unit = 2.0 ** max(-126, min(-math.frexp(mean)[1], 126))
            h_II, mean = moment_II.float() * unit, mean * unit
        else:
            h_II, mean = torch.eye(len(moment_II)), 1.0
        energy_B = h_II.diagonal().view(-1, BLOCK).sum(dim=1)
        order_B = energy_B.argsort(descending=True, stable=True)
        self.order_I = (order_B[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        h_BKBK = h_II.reshape(len(order_B), BLOCK, len(order_B), BLOCK)
        h_BKBK = h_BKBK.index_select(0, order_B).index_select(2, order_B)
        self.h_II = h_BKBK.view_as(h_II)
        self.h_II.diagonal().add_(damping * mean)

    def prepare(self) -> Moment:
        """Compute the factors now, so that threads that share the moment find them; return it."""
        for name in ("factor_II", "block_factors_BKK", "block_inverses_BKK"):
            getattr(self, name)
        return self

    @cached_property
    def factor_II(self) -> Tensor:
        """U, upper triangular, with H'⁻¹ = UᵀU."""
        return inverse_factor(self.h_II)

    @cached_property
    def blocks_BKK(self) -> Tensor:
        """The blocks on the diagonal of H', float32 `[B, 16, 16]`."""
        count = len(self.h_II) // BLOCK
        view = self.h_II.view(count, BLOCK, count, BLOCK)
        return view.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    @cached_property
    def block_inverses_BKK(self) -> Tensor:
        """The inverses of `blocks_BKK`."""
        factors = self.block_factors_BKK
        return factors.mT @ factors

    @cached_property
    def block_factors_BKK(self) -> Tensor:
        """U of each block on the diagonal."""
        return inverse_factor(self.blocks_BKK)


@dataclass
class Rounded:
    """A weight while its codes are chosen. Columns are in the order of its moment."""

    target_OI: Tensor
    """float32."""
    moment: Moment
    codes_OI: Tensor = field(init=False)
    """uint8, one code in each byte."""
    scales_OB: Tensor = field(init=False)
    """uint8, E4M3."""
    values_OI: Tensor = field(init=False)
    """float32: what codes and scales stand for."""
    gradient_OI: Tensor | None = field(init=False, default=None)
    """(Q − T)·H' of these values, if `quick_loss` was the last to look at them; for `improve`."""

    def __post_init__(self) -> None:
        self.target_OI = self.target_OI[:, self.moment.order_I].contiguous()
        rows, width = self.target_OI.shape
        self.codes_OI = torch.empty(rows, width, dtype=torch.uint8)
        self.scales_OB = torch.empty(rows, width // BLOCK, dtype=torch.uint8)
        self.values_OI = torch.empty(rows, width)

    def round(self, group_scale: float, scales_OB: Tensor | None = None) -> None:
        """Round with compensation; scales are chosen jointly, unless they are given."""
        running_OI, factor_II = self.target_OI.clone(), self.moment.factor_II
        if scales_OB is not None:
            order_B = self.moment.order_I[::BLOCK] // BLOCK
            self.scales_OB.copy_(scales_OB[:, order_B])
        width = running_OI.shape[1]
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            tile_OW = running_OI[:, start:stop].contiguous()
            codes, values, errors = _like(tile_OW, torch.uint8), _like(tile_OW), _like(tile_OW)
            scales = self.scales_OB[:, start // BLOCK : stop // BLOCK].contiguous()
            joint_cpu.round_tile(
                tile_OW.numpy(),
                factor_II[start:stop, start:stop].contiguous().numpy(),
                np.float32(group_scale),
                scales_OB is not None,
                codes.numpy(),
                scales.numpy(),
                values.numpy(),
                errors.numpy(),
            )
            self.codes_OI[:, start:stop] = codes
            self.values_OI[:, start:stop] = values
            self.scales_OB[:, start // BLOCK : stop // BLOCK] = scales
            running_OI[:, stop:] -= errors @ factor_II[start:stop, stop:]

    def static_scales(self, group_scale: float) -> Tensor:
        """Return the scales of the least loss of each block by itself, `[O, B]`, in the weight's
        own order, for `round`."""
        scales_OB = torch.empty_like(self.scales_OB)
        chosen_OB = block_scales.by_form(self.target_OI, self.moment.blocks_BKK, group_scale)
        scales_OB[:, self.moment.order_I[::BLOCK] // BLOCK] = chosen_OB
        return scales_OB

    def improve(self, group_scale: float) -> int:
        """Sweep once over all blocks; return how many blocks of rows changed."""
        gradient_OI, self.gradient_OI = self.gradient_OI, None
        if gradient_OI is None:
            gradient_OI = (self.values_OI - self.target_OI) @ self.moment.h_II
        changed, width = 0, gradient_OI.shape[1]
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            tile_OW = gradient_OI[:, start:stop].contiguous()
            changes_OW = torch.zeros_like(tile_OW)
            for first in range(start, stop, BLOCK):
                inside = slice(first - start, first - start + BLOCK)
                changes = self._improve_block(first // BLOCK, tile_OW[:, inside], group_scale)
                if changes is not None:
                    changed += int(changes.ne(0).any(dim=1).sum())
                    changes_OW[:, inside] = changes
                    tile_OW += changes @ self.moment.h_II[first : first + BLOCK, start:stop]
            gradient_OI[:, stop:] += changes_OW @ self.moment.h_II[start:stop, stop:]
        return changed

    def _improve_block(self, block: int, gradient_OK: Tensor, group_scale: float) -> Tensor | None:
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        values = self.values_OI[:, columns].contiguous()
        codes = self.codes_OI[:, columns].contiguous()
        scales = self.scales_OB[:, block].contiguous()
        target = values - gradient_OK @ self.moment.block_inverses_BKK[block]
        changes = torch.empty_like(values)
        count = joint_cpu.improve_block(
            target.numpy(),
            self.moment.block_factors_BKK[block].numpy(),
            np.float32(group_scale),
            codes.numpy(),
            scales.numpy(),
            values.numpy(),
            changes.numpy(),
        )
        if not count:
            return None
        self.values_OI[:, columns] = values
        self.codes_OI[:, columns] = codes
        self.scales_OB[:, block] = scales
        return changes

    def loss(self, values_OI: Tensor | None = None) -> float:
        """Return L under the damped moment, in float64, also for other values than its own."""
        values_OI = self.values_OI if values_OI is None else values_OI
        d_OI = values_OI.double() - self.target_OI.double()
        return float(((d_OI @ self.moment.h_II.double()) * d_OI).sum())

    def quick_loss(self) -> tuple[float, float]:
        """Return L from a product in float32, and a bound that its rounding hardly reaches:
        4·2⁻²⁴·(Σ |q − t|·√H'_ii)², summed over rows."""
        d_OI, h_II = self.values_OI - self.target_OI, self.moment.h_II
        self.gradient_OI = d_OI @ h_II
        loss = float((self.gradient_OI * d_OI).sum(dtype=torch.float64))
        sizes_O = d_OI.abs() @ h_II.diagonal().sqrt()
        return loss, 2.0**-22 * float(sizes_O.double().square().sum())

    def loss_and_reach(self) -> tuple[float, float]:
        """Return L, and twice the bound n·2⁻⁵³·|Q − T|·|H'|·|Q − T|ᵀ for the rounding in it."""
        d_OI, h_II = self.values_OI.double() - self.target_OI.double(), self.moment.h_II.double()
        size = float(((d_OI.abs() @ h_II.abs()) * d_OI.abs()).sum())
        return self.loss(), 4 * len(h_II) * 2.0**-53 * size

    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of codes, scales and values."""
        return self.codes_OI.clone(), self.scales_OB.clone(), self.values_OI.clone()

    def choose_again(self, chosen: tuple[Tensor, Tensor, Tensor]) -> None:
        """Take codes, scales and values that `chosen` has returned."""
        self.codes_OI, self.scales_OB, self.values_OI = chosen
        self.gradient_OI = None

    def products(self) -> tuple[float, float]:
        """Return ⟨T, Q⟩ and ⟨Q, Q⟩ under the damped moment."""
        weighted_OI = self.values_OI @ self.moment.h_II
        return tuple(  # type: ignore[return-value]
            float((weighted_OI * matrix).sum(dtype=torch.float64))
            for matrix in (self.target_OI, self.values_OI)
        )

    def rescale(self, group_scale: float) -> None:
        """Let codes and scales stand for what they do under another group scale."""
        step_OB = self.scales_OB.view(torch.float8_e4m3fn).float() * group_scale
        self.values_OI = e2m1.decode(self.codes_OI) * step_OB.repeat_interleave(BLOCK, dim=1)
        self.gradient_OI = None

    def pack(self, codes: Tensor, block_scale: Tensor) -> None:
        """Fill the buffers of the row parts, uint8 `[O, I/2]` and `[O, B]`, in the weight's own
        order of columns."""
        unpacked_OI = torch.empty_like(self.codes_OI)
        unpacked_OI[:, self.moment.order_I] = self.codes_OI
        codes.copy_(unpacked_OI[:, ::2] | unpacked_OI[:, 1::2] << 4)
        block_scale[:, self.moment.order_I[::BLOCK] // BLOCK] = self.scales_OB


def descend(
    weights: Sequence[Rounded],
    group_scale: float,
    sweeps: int,
    *,
    is_checked: bool = sys.flags.dev_mode,
) -> float:
    """Sweep over the weights of a scale group; return the group scale, which changes, too.

    Args:
        is_checked: Assert after each sweep that L has not grown, which costs two products in
            float64. True in Python's development mode (`python -X dev`).
    """
    check = _Check(weights) if is_checked else None
    least = _quick_loss(weights) if sweeps else (0.0, 0.0)
    for _ in range(sweeps):
        before, scale_before = [weight.chosen() for weight in weights], group_scale
        changed = sum(weight.improve(group_scale) for weight in weights)
        group_scale = _best_scale(weights, group_scale)
        loss = _quick_loss(weights)
        if least[0] - loss[0] <= least[1] + loss[1] and not _has_fallen(weights, before):
            for weight, chosen in zip(weights, before, strict=True):
                weight.choose_again(chosen)
            return scale_before
        least = loss
        if check:
            check.step()
        if not changed:
            break
    return group_scale


def _quick_loss(weights: Sequence[Rounded]) -> tuple[float, float]:
    losses, reaches = zip(*(weight.quick_loss() for weight in weights), strict=True)
    return sum(losses), sum(reaches)


def _has_fallen(
    weights: Sequence[Rounded], before: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> bool:
    """Return whether L, in float64, is less than it was. Where H' is nearly singular, float32 may
    take rounding for a gain."""
    losses = (
        weight.loss(values_OI) for weight, (*_, values_OI) in zip(weights, before, strict=True)
    )
    return sum(weight.loss() for weight in weights) < sum(losses)


class _Check:
    """Asserts that L does not grow, but by what float64 rounds it."""

    def __init__(self, weights: Sequence[Rounded]) -> None:
        self.weights, self.least = weights, math.inf
        self.step()

    def step(self) -> None:
        losses, reaches = zip(*(weight.loss_and_reach() for weight in self.weights), strict=True)
        assert sum(losses) <= self.least + sum(reaches), (sum(losses), self.least)
        self.least = sum(losses)


def _best_scale(weights: Sequence[Rounded], group_scale: float) -> float:
    """Take the group scale of the least loss, unless its gain would be lost in rounding."""
    products = [weight.products() for weight in weights]
    num, den = (sum(column) for column in zip(*products, strict=True))
    if not (num > 0 and den > 0 and abs(num / den - 1) > LEAST_SCALE_GAIN):
        return group_scale
    better = coarse(group_scale * num / den)
    for weight in weights:
        weight.rescale(better)
    return better


def coarse(scale: float) -> float:
    """Return a group scale to 12 bits.

    Unlike codes, it would show the last bit of everything that it is computed from. It loses
    2⁻²⁶ of ⟨Q, Q⟩ at most, where the smallest change that is made gains 2⁻²⁰.
    """
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(round(mantissa * 4096) / 4096, exponent)


def _like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
