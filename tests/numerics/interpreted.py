# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with the arithmetic of a GPU: multiplications that fuse, and divisions that
are off by up to two units in the last place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """fl(x·y + z) of float32, rounded once.

    The product is exact in float64. Their sum is rounded to odd: where something was lost, the last
    bit is set, so that rounding to float32 sees that the sum is no tie.
    """
    p, z = np.asarray(x, np.float64) * np.asarray(y, np.float64), np.asarray(z, np.float64)
    s = np.asarray(p + z)
    part = s - p
    lost = (p - (s - part)) + (z - part)
    even = (s.view(np.int64) & 1) == 0
    nudged = np.nextafter(s, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even & np.isfinite(s), nudged, s).astype(np.float32)


@contextmanager
def like_a_gpu(seed: int) -> Iterator[None]:
    """Kernels run with FMA, and plain division is as far off as it may be, at random."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from fourfold.formats.nvfp4 import cuda

    rng = np.random.default_rng(seed)

    def create_fma(self, x, y, z):
        return TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    def create_fdiv(self, lhs, rhs):
        quotient = np.asarray(np.divide(lhs.data, rhs.data))
        assert quotient.dtype == np.float32
        moved = quotient.view(np.int32) + rng.integers(-2, 3, quotient.shape, np.int32)
        usable = np.isfinite(quotient) & (np.abs(quotient) > 1e-36)
        found = np.where(usable, moved.view(np.float32), quotient)
        return TensorHandle(found, lhs.dtype.scalar)

    with (
        mock.patch.object(InterpreterBuilder, "create_fma", create_fma),
        mock.patch.object(InterpreterBuilder, "create_fdiv", create_fdiv),
        mock.patch.object(cuda, "HAS_FMA", True),
    ):
        yield
