# SPDX-License-Identifier: Apache-2.0
"""Weights and second moments of inputs that rounding with compensation could get wrong.

Shapes: O outputs, I inputs, R rows of inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def correlated(rng: np.random.Generator, width: int, rows: int) -> Tensor:
    """Inputs `[R, I]` of uneven energy that depend on each other."""
    mixing = np.eye(width) + 0.3 * rng.standard_normal((width, width))
    energy = np.exp(0.5 * rng.standard_normal(width))
    return torch.from_numpy(rng.standard_normal((rows, width)) @ mixing * energy).float()


def moment(x_RI: Tensor) -> Tensor:
    return (x_RI.double().T @ x_RI.double() / max(1, len(x_RI))).float()


def ordinary(rng: np.random.Generator, width: int) -> Tensor:
    return moment(correlated(rng, width, 4 * width))


def few_rows(rng: np.random.Generator, width: int) -> Tensor:
    return moment(correlated(rng, width, int(rng.integers(1, 9))))


def no_rows(rng: np.random.Generator, width: int) -> Tensor:
    return torch.zeros(width, width)


def dead_channels(rng: np.random.Generator, width: int) -> Tensor:
    x_RI = correlated(rng, width, 3 * width)
    x_RI[:, torch.from_numpy(rng.random(width) < 0.5)] = 0
    return moment(x_RI)


def one_channel(rng: np.random.Generator, width: int) -> Tensor:
    """All energy is in one input."""
    x_RI = torch.zeros(8, width)
    x_RI[:, int(rng.integers(width))] = 3
    return moment(x_RI)


def equal_channels(rng: np.random.Generator, width: int) -> Tensor:
    """All inputs are the same number, so their errors cancel."""
    return moment(correlated(rng, width, 50)[:, :1].expand(-1, width))


def outliers(rng: np.random.Generator, width: int) -> Tensor:
    x_RI = correlated(rng, width, 4 * width)
    x_RI[:, torch.from_numpy(rng.random(width) < 0.1)] *= 1000
    return moment(x_RI)


def huge(rng: np.random.Generator, width: int) -> Tensor:
    return ordinary(rng, width) * 1e30


def tiny(rng: np.random.Generator, width: int) -> Tensor:
    return ordinary(rng, width) * 1e-30


MOMENTS = {
    f.__name__: f
    for f in (
        ordinary, few_rows, no_rows, dead_channels, one_channel, equal_channels, outliers, huge,
        tiny,
    )
}  # fmt: skip


def gaussian(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal((rows, width), np.float32) * 0.02)


def zeros(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width)


def zero_blocks(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    blocks = gaussian(rng, rows, width).view(rows, -1, 16)
    return (blocks * torch.from_numpy(rng.random(blocks.shape[:2]) < 0.5)[..., None]).flatten(1)


def one_hot(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    w_OI = torch.zeros(rows, width)
    w_OI[torch.arange(rows), torch.from_numpy(rng.integers(0, width, rows))] = 1
    return w_OI


def uneven_rows(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    return gaussian(rng, rows, width) * torch.logspace(-30, 0, rows)[:, None]


def heavy_tails(rng: np.random.Generator, rows: int, width: int) -> Tensor:
    return torch.from_numpy(rng.standard_t(2, (rows, width)).clip(-1e6, 1e6)).float()


WEIGHTS = {f.__name__: f for f in (gaussian, zeros, zero_blocks, one_hot, uneven_rows, heavy_tails)}
