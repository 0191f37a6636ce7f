# SPDX-License-Identifier: Apache-2.0
"""Proves that the Triton kernel of FP8 gives the bytes of the definition: on a CUDA device where
there is one, else by Triton's interpreter; and that it compiles for each generation of GPUs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fourfold.formats import fp8
from fourfold.formats.base import FORMATS
from fourfold.formats.fp8 import reference

pytest.importorskip("triton", reason="triton is not installed")
from fourfold.formats.nvfp4.cuda import INTERPRETED

from .test_triton import check_code, compile_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = ("fp8", "mxfp8")


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes with NumPy, which warns of Inf and NaN."""
    with np.errstate(all="ignore"):
        yield


def wild(dtype: torch.dtype, count: int, numel: int, seed: int = 0) -> Tensor:
    """N weights of which neighbours differ by powers of two: zeros, subnormals, outliers."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-25, 15) if dtype == torch.float16 else (-149, 127)
    exponents = torch.randint(low, high, (count, numel // 32, 1), generator=generator)
    spread = torch.randint(-20, 1, (count, numel // 32, 32), generator=generator)
    w_NX = torch.randn(count, numel // 32, 32, generator=generator).clamp(-1.9, 1.9)
    w_NX = (w_NX.double() * torch.exp2((exponents + spread).double())).flatten(1)
    w_NX[0, :64], w_NX[0, 64:96] = 0.0, -0.0
    w_NX[0, 96] = 448.0
    return w_NX.to(dtype)


def by_triton(name: str, w_NX: Tensor, scales: Tensor) -> tuple[list[Tensor], Tensor]:
    fmt, (count, numel) = FORMATS[name], w_NX.shape
    out = [
        torch.full((count, spec[1][1]), 0xAB, dtype=torch.uint8, device=DEVICE)
        for spec in fmt.row_parts((1, numel)).values()
    ]
    workspace = torch.empty(fp8.workspace_bytes(count, numel), dtype=torch.uint8, device=DEVICE)
    exponents = out[1] if name == "mxfp8" else None
    figures = fp8.quantize_batch_into(
        w_NX.to(DEVICE), out[0], scales.to(DEVICE), workspace, exponents, kernel="triton"
    )
    return [part.cpu() for part in out], figures.cpu()


def by_definition(name: str, w_NX: Tensor, scales: Tensor) -> tuple[list[Tensor], Tensor]:
    parts, figures = [], []
    for w_X, scale in zip(w_NX, scales, strict=True):
        w_OI, scales_BC, block, stored = w_X.view(1, -1), scale.view(1, 1), (1, len(w_X)), []
        if name == "mxfp8":
            block = fp8.MX_BLOCK
            stored = [reference.exponents_of(reference.block_amaxes(w_OI, block))]
            scales_BC = reference.powers(stored[0])
        codes = reference.quantize(w_OI, scales_BC, block).view(torch.uint8)
        parts.append([codes, *stored])
        figures.append(reference.error(w_OI, codes, scales_BC, block))
    return [torch.cat(part) for part in zip(*parts, strict=True)], torch.tensor(
        figures, dtype=torch.float64
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [128, 4096, 70_016])
def test_the_bytes_are_those_of_the_definition(name: str, dtype: torch.dtype, numel: int) -> None:
    w_NX = wild(dtype, 3, numel)
    scales = reference.scales_of(w_NX.float().abs().amax(dim=1))
    found, figures = by_triton(name, w_NX, scales)
    expected, sums = by_definition(name, w_NX, scales)
    for part, wanted in zip(found, expected, strict=True):
        assert torch.equal(part, wanted)
    assert torch.allclose(figures, sums, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_number_of_16_bits(dtype: torch.dtype) -> None:
    w_NX = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).view(2, -1)
    w_NX = torch.where(w_NX.isfinite(), w_NX, 0.0)
    (codes,), _ = by_triton("fp8", w_NX, torch.ones(2))
    by_torch = w_NX.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes, by_torch.view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_finite_is_seen(name: str, value: float, dtype: torch.dtype) -> None:
    w_NX = torch.ones(2, 128, dtype=dtype)
    w_NX[1, 77] = value
    _, figures = by_triton(name, w_NX, torch.ones(2))
    assert figures[0].isfinite().all()
    assert not figures[1].isfinite().all()
    amaxes = FORMATS[name].amaxes(w_NX.to(DEVICE))
    assert amaxes.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_stands_in_for_a_device(name: str) -> None:
    """With numba's kernels, as the tests of batches use it."""
    w_NX = wild(torch.bfloat16, 2, 256)
    scales = reference.scales_of(w_NX.float().abs().amax(dim=1))
    fmt = FORMATS[name]
    out = [torch.empty(2, spec[1][1]).byte() for spec in fmt.row_parts((1, 256)).values()]
    workspace = torch.empty(fmt.workspace_bytes(2, 256), dtype=torch.uint8)
    fmt.quantize_batch(w_NX, out, scale="max", group_scales=scales, workspace=workspace)
    expected, _ = by_definition(name, w_NX, scales)
    assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))


def test_the_kernel_compiles_for_a_hopper_without_one(tmp_path: Path) -> None:
    found = compile_for(tmp_path, "^fp8", 90)
    assert len(found) == 4
    check_code(found)
    assert all(code["divisions"] > 0 for code in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_weights_on_a_device(name: str, dtype: torch.dtype) -> None:
    assert not INTERPRETED
    w_NX = wild(dtype, 70, 1 << 18, seed=7)
    scales = reference.scales_of(w_NX.float().abs().amax(dim=1))
    found, figures = by_triton(name, w_NX, scales)
    expected, sums = by_definition(name, w_NX, scales)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.allclose(figures, sums, rtol=1e-9, atol=0)
