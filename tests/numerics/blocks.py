# SPDX-License-Identifier: Apache-2.0
"""Families of blocks [n, 16] float32 that a search could get wrong, under a global scale S.

Each takes a generator, a count and S, and returns values of which none is NaN or Inf. `FAMILIES`
names them all. In units of S a block scale is 2⁻⁹ … 448, and an ordinary block has its largest
element below 2688.
"""

from __future__ import annotations

import numpy as np

from fourfold.formats.nvfp4.e2m1 import E2M1_VALUES
from fourfold.formats.nvfp4.e4m3 import E4M3_POSITIVE

SCALES = E4M3_POSITIVE.numpy()
VALUES = E2M1_VALUES[:8].numpy()
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0], np.float32)
EDGES = np.array([3.0, 3.5, 4.0, 6.0, 6.5, 6.99, 7.0, 7.5, 8.0, 9.0, 10.0, 12.0], np.float32)


def gaussian(rng, n, scale):
    return rng.standard_normal((n, 16), np.float32) * np.float32(500 * scale)


def student_t(rng, n, scale):
    heavy = rng.standard_normal((n, 16)) / np.sqrt(rng.gamma(1.25, 0.8, (n, 16)))
    return _held(heavy * 20, scale)


def all_equal(rng, n, scale):
    return np.repeat(_magnitudes(rng, (n, 1), scale), 16, axis=1)


def one_hot(rng, n, scale):
    blocks = np.zeros((n, 16), np.float32)
    blocks[np.arange(n), rng.integers(0, 16, n)] = _magnitudes(rng, n, scale)
    return blocks


def two_values(rng, n, scale):
    pair = _magnitudes(rng, (n, 2), scale)
    pair[:, 1] = pair[:, 0] * rng.choice(np.float32([0.5, 2 / 3, 1 / 3, 0.25, 0.11]), n)
    return np.take_along_axis(pair, rng.integers(0, 2, (n, 16)), axis=1)


def tiny(rng, n, scale):
    """Where block scales are subnormal, or even too large."""
    size = rng.choice(np.float32([0.1, 0.26, 0.5, 1, 2, 5, 10, 20, 60, 120]), (n, 1))
    return _held(rng.uniform(-1, 1, (n, 16)) * size * 2.0**-9, scale)


def tiny_on_grid(rng, n, scale):
    """Multiples of half the smallest product: many exact hits and exact ties."""
    top = rng.integers(1, 120, (n, 1))
    return _held(rng.integers(0, top + 1, (n, 16)) * 2.0**-11, scale)


def huge_ratio(rng, n, scale):
    return _held(np.exp2(rng.uniform(-40, 11.3, (n, 16))), scale)


def on_a_grid(rng, n, scale):
    """Exact multiples of one candidate's E2M1 values: losses near zero."""
    return _grid(rng, n, scale) * _signs(rng, n)


def on_midpoints(rng, n, scale):
    m = _products(rng, n, scale)
    return _nudged(rng, m * rng.choice(MIDPOINTS, (n, 16))) * _signs(rng, n)


def at_an_edge(rng, n, scale):
    """15 elements on a candidate's grid, and the largest at the edge of what that candidate can
    win: clipped by it, or within the reach of half of it. The bounds of the search lie here."""
    blocks, m = _grid_and_products(rng, n, scale)
    blocks = np.minimum(blocks, m * rng.choice(VALUES[1:], (n, 1)))
    blocks[np.arange(n), rng.integers(0, 16, n)] = (m * rng.choice(EDGES, (n, 1)))[:, 0]
    return _nudged(rng, blocks) * _signs(rng, n)


def beyond_the_top(rng, n, scale):
    """Blocks that even the largest block scale clips: the global scale was chosen too small."""
    top = rng.uniform(1500, 9000, (n, 1)) * rng.choice([1, 1, 1, 50, 1e5], (n, 1))
    return _held(rng.uniform(-1, 1, (n, 16)) * top, scale, limit=1e12)


FAMILIES = {
    f.__name__: f
    for f in (
        gaussian,
        student_t,
        all_equal,
        one_hot,
        two_values,
        tiny,
        tiny_on_grid,
        huge_ratio,
        on_a_grid,
        on_midpoints,
        at_an_edge,
        beyond_the_top,
    )
}


def _held(values, scale, limit=2688.0):
    return (np.clip(values, -limit, limit) * scale).astype(np.float32)


def _magnitudes(rng, shape, scale):
    return _held(np.exp2(rng.uniform(-14, 11.39, shape)), scale)


def _products(rng, n, scale):
    return (rng.choice(SCALES, (n, 1)) * np.float32(scale)).astype(np.float32)


def _grid_and_products(rng, n, scale):
    m = _products(rng, n, scale)
    return m * rng.choice(VALUES, (n, 16)), m


def _grid(rng, n, scale):
    return _grid_and_products(rng, n, scale)[0]


def _signs(rng, n):
    return rng.choice(np.float32([-1, 1]), (n, 16))


def _nudged(rng, values):
    """Half of the values moved by one unit in the last place, either way."""
    moved = np.nextafter(values, rng.choice(np.float32([0, 3e38]), values.shape), dtype=np.float32)
    return np.where(rng.random(values.shape) < 0.5, moved, values).astype(np.float32)
