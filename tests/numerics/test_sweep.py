# SPDX-License-Identifier: Apache-2.0
"""Proves promise 5 for the mse search: the pruned kernel picks, for every block, the scale and the
codes of the full search by definition; and that the full search used as judge is the definition."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

from fourfold.formats.nvfp4 import cpu, e2m1, reference
from fourfold.formats.nvfp4.sweep import MSE, MSE_FULL

from .blocks import FAMILIES
from .oracle import full_search

SCALES = (1.0, 3.3e-4, float(np.float32(1 / 3)), 2.0**-117, float(np.float32(1e34)))
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def made(family, n, scale, dtype, seed):
    rng = np.random.default_rng([seed, n])
    with np.errstate(over="ignore"):
        blocks = torch.from_numpy(FAMILIES[family](rng, n, scale))
    if dtype == torch.float16:
        blocks = blocks.clamp(-65504, 65504)
    return blocks.clamp(-3e38, 3e38).to(dtype)


def by_kernel(blocks, scale, algorithm=MSE):
    n = blocks.shape[0]
    codes = torch.empty(n, 8, dtype=torch.uint8)
    scales = torch.empty(n, 1, dtype=torch.uint8)
    *sums, settled = cpu.quantize(blocks, codes, scales, scale, algorithm)
    assert np.isfinite(sums).all()
    return codes, scales[:, 0], settled


def check(family, n, scale, dtype, seed):
    blocks = made(family, n, scale, dtype, seed)
    codes, scales, _ = by_kernel(blocks, scale)
    expected = torch.from_numpy(full_search(blocks.float().numpy(), np.float32(scale)))
    wrong = torch.nonzero(scales != expected).flatten()
    assert wrong.numel() == 0, (
        f"{family} {dtype} S={scale}: {wrong.numel()} blocks, first {blocks[wrong[0]].tolist()}: "
        f"byte {scales[wrong[0]]}, expected {expected[wrong[0]]}"
    )
    m = expected.view(torch.float8_e4m3fn).float() * np.float32(scale)
    w = blocks.float()
    sign = torch.signbit(w).to(torch.uint8) << 3
    assert torch.equal(codes, e2m1.pack(e2m1.round_magnitude(w.abs() / m[:, None]) | sign))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_the_reference(family):
    for scale in SCALES[:3]:
        blocks = made(family, 400, scale, torch.float32, 1)
        _, scales = reference.quantize(blocks, scale, mse=True)
        assert np.array_equal(scales[:, 0].numpy(), full_search(blocks.numpy(), np.float32(scale)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_million_blocks(family, dtype):
    for seed, scale in enumerate(SCALES):
        fits = dtype != torch.float16 or 1e-4 < scale < 20
        if fits:
            check(family, 6_500, scale, dtype, seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_million_blocks(family):
    for seed in range(34):
        for dtype in (torch.bfloat16, torch.float32):
            check(family, 123_000, SCALES[seed % len(SCALES)], dtype, 100 + seed)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_around_the_lanes(n, dtype):
    check("gaussian", n, 3.3e-4, dtype, n)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_kernel_agrees(family):
    blocks = made(family, 5_000, 3.3e-4, torch.bfloat16, 7)
    pruned, full = by_kernel(blocks, 3.3e-4), by_kernel(blocks, 3.3e-4, MSE_FULL)
    assert torch.equal(pruned[0], full[0])
    assert torch.equal(pruned[1], full[1])


def test_few_blocks_need_the_definition():
    scale = 3.3e-4
    _, _, settled = by_kernel(made("gaussian", 100_000, scale, torch.bfloat16, 3), scale)
    assert settled < 100_000 / 2000


def digest_of_all_families():
    digest = hashlib.sha256()
    for family in FAMILIES:
        for dtype in (torch.bfloat16, torch.float32):
            codes, scales, _ = by_kernel(made(family, 3_000, 3.3e-4, dtype, 11), 3.3e-4)
            digest.update(codes.numpy().tobytes() + scales.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for a plain x86-64")
@pytest.mark.slow
def test_the_same_bytes_without_fma_and_wide_vectors():
    code = f"from {__name__} import digest_of_all_families as d; print(d())"
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest_of_all_families()
