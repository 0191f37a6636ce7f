# SPDX-License-Identifier: Apache-2.0
"""Proves that the Triton kernels give the bytes of the definition: on a CUDA device where there is
one, else by Triton's interpreter; and there also with the arithmetic that a GPU has and NumPy has
not. Whether they compile is seen without a device: for each generation of GPUs, to code that
flushes nothing, fuses no float64 and spills no register.

The numba kernels are the judge; `test_sweep.py` proves them against the definition.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fourfold.errors import NonFiniteError, UsageError
from fourfold.formats import nvfp4
from fourfold.formats.nvfp4 import (
    activations,
    amax,
    amaxes,
    cpu,
    dequantize,
    quantize,
    quantize_batch_into,
    quantize_into,
    reference,
    sweep,
)

from . import compiled
from .activation_oracle import rounded
from .blocks import FAMILIES
from .interpreted import fused, like_a_gpu

pytest.importorskip("triton", reason="triton is not installed")
from fourfold.formats.nvfp4 import cuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALES = (3.3e-4, 1.0, float(np.float32(1 / 3)), 2.0**-117, float(np.float32(1e34)))
NAMES = [name for name in FAMILIES if name != "beyond_the_top"]  # it takes all 126 candidates

on_a_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
interpreted_only = pytest.mark.skipif(not cuda.INTERPRETED, reason="needs Triton's interpreter")


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes with NumPy, which warns of Inf and NaN."""
    with np.errstate(all="ignore"):
        yield


def blocks_of(names, count, scale, dtype, seed):
    """`count` blocks of each family, finite in `dtype`: [n, 16]."""
    rng = np.random.default_rng(seed)
    found = torch.from_numpy(np.concatenate([FAMILIES[name](rng, count, scale) for name in names]))
    limit = 65504 if dtype == torch.float16 else 3e38
    return found.clamp(-limit, limit).to(dtype)


def by_triton(weight_NX, scales, algorithm=sweep.MSE, packs=True):
    """Codes and block scales on the CPU, and figures."""
    count, width = weight_NX.shape
    codes = torch.zeros(count, width // 2, dtype=torch.uint8, device=DEVICE)
    bytes_ = torch.zeros(count, width // 16, dtype=torch.uint8, device=DEVICE)
    s_N = torch.tensor(scales, dtype=torch.float32, device=DEVICE)
    weight = weight_NX.to(DEVICE)
    figures = cuda.quantize(weight, codes if packs else None, bytes_, s_N, algorithm)
    return codes.cpu(), bytes_.cpu(), figures.cpu()


def by_numba(weight_X, scale, algorithm=sweep.MSE):
    blocks = weight_X.reshape(-1, 16)
    codes = torch.zeros(len(blocks), 8, dtype=torch.uint8)
    scales = torch.zeros(len(blocks), 1, dtype=torch.uint8)
    figures = cpu.quantize(blocks, codes, scales, scale, algorithm)
    return codes.flatten(), scales.flatten(), figures[:2]


def check(weight_NX, scales, algorithm=sweep.MSE):
    codes, bytes_, figures = by_triton(weight_NX, scales, algorithm)
    for n, scale in enumerate(scales):
        expected = by_numba(weight_NX[n], scale, algorithm)
        wrong = torch.nonzero(bytes_[n] != expected[1]).flatten().tolist()
        assert not wrong, (
            f"S={scale} {len(wrong)} scales, first of block {wrong[0]} "
            f"{weight_NX[n].view(-1, 16)[wrong[0]].tolist()}: byte {bytes_[n][wrong[0]]}, "
            f"expected {expected[1][wrong[0]]}"
        )
        assert torch.equal(codes[n], expected[0])
        loss, energy = figures[n].tolist()
        assert energy == pytest.approx(expected[2][1], rel=1e-5)
        assert loss == pytest.approx(expected[2][0], rel=1e-5, abs=reachable(*expected[2]))


def reachable(loss, energy):
    """How far two sums of losses may lie apart (`sweep.py`, part 4), with δ of GPU and CPU: on the
    grid, where no weight has an error, they are nothing else."""
    off = (8.3 + 5.2) * 2.0**-24
    return 2 * off * math.sqrt(energy * loss) + off**2 * energy


def fitting(dtype):
    return [s for s in SCALES if dtype != torch.float16 or 1e-4 < s < 20]


CASES = [(dtype, scale) for dtype in DTYPES for scale in fitting(dtype)]


@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=str)
def test_the_search_is_that_of_the_definition(dtype, scale):
    check(blocks_of(NAMES, 300, scale, dtype, 1).view(1, -1), [scale])


def test_blocks_beyond_the_largest_scale():
    check(blocks_of(["beyond_the_top"], 200, 3.3e-4, torch.bfloat16, 2).view(1, -1), [3.3e-4])


@interpreted_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_search_with_the_arithmetic_of_a_gpu(dtype):
    with like_a_gpu(seed=3):
        check(blocks_of(NAMES, 300, 3.3e-4, dtype, 4).view(1, -1), [3.3e-4])


@interpreted_only
def test_the_arithmetic_of_a_gpu_is_that():
    """Fused means rounded once: against exact fractions."""
    from fractions import Fraction

    rng = np.random.default_rng(5)
    x, y, z = (rng.standard_normal(2000).astype(np.float32) for _ in range(3))
    z[:1000] = -(x * y)[:1000]  # what is left is the rounding of the product
    z[1000:1300] = np.float32(2.0**24)
    found = fused(x, y, z)
    for a, b, c, d in zip(x, y, z, found, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        beside = (np.nextafter(d, np.float32(-np.inf)), np.nextafter(d, np.float32(np.inf)))
        error = abs(Fraction(float(d)) - exact)
        assert all(error <= abs(Fraction(float(other)) - exact) for other in beside)


@interpreted_only
def test_shared_reciprocals_divide_as_ieee_does():
    """`blocks_cuda.divide`: at ties, next to them, and anywhere."""
    rng = np.random.default_rng(6)
    m = np.float32(rng.uniform(2.0**-9, 896, 4000))
    ties = rng.choice(np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), 4000)
    near = np.float32(m * ties)
    for x in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(9e9)),
              np.float32(m * rng.uniform(1e-4, 7, 4000))):  # fmt: skip
        inverse = np.float32(1) / m
        q = x * inverse
        for _ in range(2):
            q = fused(fused(q, -m, x), inverse, q)
        assert np.array_equal(q, x / m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_scales(dtype):
    for scale in fitting(dtype):
        check(blocks_of(FAMILIES, 300, scale, dtype, 7).view(1, -1), [scale], sweep.MAX)


@pytest.mark.slow
def test_the_full_search_agrees():
    weight = blocks_of(NAMES, 60, 3.3e-4, torch.bfloat16, 8).view(1, -1)
    pruned, full = by_triton(weight, [3.3e-4]), by_triton(weight, [3.3e-4], sweep.MSE_FULL)
    assert torch.equal(pruned[0], full[0])
    assert torch.equal(pruned[1], full[1])


@pytest.mark.parametrize("blocks", [1, 2, 31, 32, 33, 63, 65, 127, 129])
def test_any_count_of_blocks_and_a_scale_for_each_weight(blocks):
    scales = [3.3e-4, 1.0, 0.07]
    rows = [blocks_of(["gaussian"], blocks, s, torch.bfloat16, blocks).flatten() for s in scales]
    check(torch.stack(rows), scales)


def test_scales_alone_are_the_same():
    weight = blocks_of(["gaussian"], 100, 1.0, torch.float32, 9).view(1, -1)
    codes, scales, _ = by_triton(weight, [1.0], packs=False)
    assert torch.equal(scales, by_triton(weight, [1.0])[1])
    assert not codes.any()


def test_more_weights_than_a_grid_has_places(monkeypatch):
    monkeypatch.setattr(cuda, "_MOST_WEIGHTS", 2)
    scales = [3.3e-4, 1.0, 0.07, 2.0, 5.0]
    rows = [blocks_of(["gaussian"], 3, s, torch.bfloat16, 10).flatten() for s in scales]
    check(torch.stack(rows), scales)
    assert torch.equal(
        cuda.amaxes(torch.stack(rows).to(DEVICE)).cpu(), torch.stack(rows).abs().amax(1).float()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_addresses(dtype):
    """Transposed, at an address that 8 does not divide, into buffers inside larger ones."""
    store = torch.randn(97, 65, generator=torch.Generator().manual_seed(1)).to(dtype)
    views = {
        "transposed": store[:96].T,
        "columns": store[:, 1:49],
        "odd address": store.flatten()[1 : 1 + 48 * 5].view(5, 48),
    }
    for name, weight in views.items():
        expected = quantize(weight, scale="mse", global_scale=0.01, kernel="numba")
        rows, width = weight.shape
        codes = torch.zeros(rows, width // 2 + 5, dtype=torch.uint8, device=DEVICE)
        scales = torch.zeros(rows, width // 16 + 3, dtype=torch.uint8, device=DEVICE)
        outs = codes[:, 3 : 3 + width // 2], scales[:, 1 : 1 + width // 16]
        given = weight.to(DEVICE) if DEVICE.type == "cpu" else weight.clone().to(DEVICE)
        quantize_into(given, *outs, scale="mse", global_scale=0.01, kernel="triton")
        assert torch.equal(outs[0].cpu(), expected.codes), name
        assert torch.equal(outs[1].cpu(), expected.block_scale.view(torch.uint8)), name
        assert codes.sum() == outs[0].sum(), name


def test_experts_in_one_launch_by_the_public_call():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 6, 64, generator=generator).to(torch.bfloat16)
    scales = torch.tensor([0.001, 0.002, 0.003, 0.004, 0.005])
    flat = weight.view(5, -1).to(DEVICE)
    codes = torch.zeros(5, 192, dtype=torch.uint8, device=DEVICE)
    bytes_ = torch.zeros(5, 24, dtype=torch.uint8, device=DEVICE)
    figures = quantize_batch_into(
        flat, codes, bytes_, scale="mse", global_scales=scales.to(DEVICE), kernel="triton"
    )
    for n in range(5):
        expected = quantize(weight[n], scale="mse", global_scale=scales[n], kernel="numba")
        assert torch.equal(codes[n].cpu(), expected.codes.flatten())
        assert torch.equal(bytes_[n].cpu(), expected.block_scale.view(torch.uint8).flatten())
    assert figures.dtype == torch.float64
    assert figures.shape == (5, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_of_each_weight(dtype):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 16 * 33, generator=generator).to(dtype)
    weight[1] = 0
    weight[2, 5], weight[3, 6], weight[4, 7] = math.nan, math.inf, -math.inf
    weight[5] = torch.finfo(dtype).tiny / 2
    weight[6, -1] = -torch.finfo(dtype).max
    found = amaxes(weight.to(DEVICE), kernel="triton").cpu()
    expected = amaxes(weight, kernel="reference")
    assert not torch.isfinite(found[2:5]).any()
    others = [0, 1, 5, 6]
    assert torch.equal(found[others], expected[others])
    assert amax(weight[6].to(DEVICE), kernel="triton") == torch.finfo(dtype).max


NOT_FINITE = [
    pytest.param(bad, dtype, marks=() if n == m < 2 else pytest.mark.slow, id=f"{bad}-{dtype}")
    for n, bad in enumerate((math.nan, math.inf, -math.inf))
    for m, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("bad", "dtype"), NOT_FINITE)
def test_what_is_not_finite_is_named(bad, dtype):
    weight = torch.ones(4, 32, dtype=dtype, device=DEVICE)
    weight[2, 17] = bad
    with pytest.raises(NonFiniteError, match=r"experts\.7: .* at \[2, 17\]"):
        quantize(weight, scale="mse", name="experts.7", kernel="triton")
    codes = torch.zeros(4, 16, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(4, 2, dtype=torch.uint8, device=DEVICE)
    s_N = torch.ones(4, device=DEVICE)
    for scale in ("mse", "max"):
        figures = quantize_batch_into(
            weight, codes, scales, scale=scale, global_scales=s_N, kernel="triton"
        )
        assert torch.isfinite(figures).all(dim=1).tolist() == [True, True, False, True]


def test_weights_far_beyond_their_scale_are_left_to_the_reference():
    weight = torch.full((2, 16), 1e20)
    found = quantize(weight.to(DEVICE), scale="max", global_scale=1e-4, kernel="triton")
    expected = quantize(weight, scale="max", global_scale=1e-4, kernel="reference")
    assert torch.equal(found.codes.cpu(), expected.codes)


def test_arguments_that_do_not_fit_are_named():
    weight = torch.ones(3, 32, device=DEVICE)
    codes = torch.zeros(3, 16, dtype=torch.uint8, device=DEVICE)
    scales = torch.zeros(3, 2, dtype=torch.uint8, device=DEVICE)
    s_N = torch.ones(3, device=DEVICE)

    def call(weight=weight, codes=codes, scales=scales, s_N=s_N, scale="mse", workspace=None):
        options = {"scale": scale, "global_scales": s_N, "workspace": workspace}
        quantize_batch_into(weight, codes, scales, **options, kernel="triton")

    with pytest.raises(UsageError, match=r"global_scales: needs float32 \[3\]"):
        call(s_N=s_N[:2])
    with pytest.raises(UsageError, match=r"global_scales: needs float32"):
        call(s_N=s_N.double())
    with pytest.raises(UsageError, match="codes_out"):
        call(codes=codes[:, :8])
    with pytest.raises(UsageError, match="block_scale_out"):
        call(scales=scales[:2])
    with pytest.raises(UsageError, match="multiple of 16"):
        call(weight=weight[:, :24])
    with pytest.raises(UsageError, match=r"torch\.int8"):
        call(weight=weight.to(torch.int8))
    wanted = nvfp4.workspace_bytes(3, 32)
    for nbytes in (0, wanted - 16, wanted + 16):
        workspace = torch.zeros(nbytes, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(UsageError, match=rf"workspace: needs uint8 \[{wanted}\]"):
            call(workspace=workspace)
    with pytest.raises(UsageError, match="workspace: needs uint8"):
        call(workspace=torch.zeros(wanted, device=DEVICE))
    with pytest.raises(UsageError, match="workspace: needs uint8"):
        call(workspace=torch.zeros(wanted + 8, dtype=torch.uint8, device=DEVICE)[3 : wanted + 3])
    with pytest.raises(UsageError, match="unknown scale algorithm 'mean'"):
        call(scale="mean")


@pytest.mark.parametrize("scale", [1.0, 3.3e-4, 0.0, math.nan, 1e-45, 3e35])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_any_bytes(scale, dtype):
    pairs = torch.from_numpy(np.array(list(itertools.product(range(256), range(16))), np.uint8))
    scales = pairs[:, :1].contiguous()
    codes = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (len(scales), 8), np.uint8))
    codes[:, 0] = pairs[:, 1] | (pairs[:, 1] << 4)
    expected = dequantize(codes, scales, scale, dtype, "reference")
    found = dequantize(codes.to(DEVICE), scales.to(DEVICE), scale, dtype, "triton").cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number], expected[number])
    assert torch.equal(torch.signbit(found[number]), torch.signbit(expected[number]))


def test_dequantize_into_any_address():
    made = quantize(torch.randn(3, 48), scale="max", kernel="numba")
    parts = made.codes.to(DEVICE), made.block_scale.to(DEVICE), made.global_scale
    for dtype in (torch.float32, torch.bfloat16):
        store = torch.zeros(1 + 3 * 48, dtype=dtype, device=DEVICE)
        nvfp4.dequantize_into(*parts, store[1:].view(3, 48), kernel="triton")
        assert torch.equal(store[1:].cpu().view(3, 48), made.dequantize(dtype))
        assert store[0] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_amax", [1.0, 0.37, 64.0])
def test_activations_are_rounded_as_the_definition_says(dtype, of_amax):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 64, generator=generator)
    x *= torch.exp2(torch.randint(-14, 3, (40, 1), generator=generator))
    x[0], x[1], x[2, 3], x[3, 4] = 0.0, -0.0, math.inf, -math.inf
    x = x.to(dtype)
    scale = float(x[4:].abs().max()) * of_amax / 2688
    found = activations.fake_quantize(x.to(DEVICE), scale, kernel="triton").cpu()
    expected = rounded(x, scale)
    assert torch.equal(found, expected)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))
    assert (found.dtype, found.shape) == (x.dtype, x.shape)


def test_a_block_of_activations_with_nan_is_nan():
    x = torch.ones(2, 48)
    x[1, 20] = math.nan
    found = activations.fake_quantize(x.to(DEVICE), 0.01, kernel="triton").cpu()
    assert torch.equal(found.isnan(), activations.fake_quantize(x, 0.01).isnan())
    in_place = x.to(DEVICE)
    assert activations.fake_quantize(in_place, 0.01, in_place, kernel="triton") is in_place
    assert torch.equal(in_place.cpu().isnan(), found.isnan())


def test_nothing_is_a_weight_too():
    for shape in ((0, 32), (3, 0)):
        made = quantize(torch.empty(shape, device=DEVICE), scale="mse", kernel="triton")
        assert made.shape == shape
        assert (
            amaxes(torch.empty(shape, device=DEVICE), kernel="triton").tolist() == [0.0] * shape[0]
        )


class Launched:
    """A kernel that does nothing but count who launches it at a time, or fail."""

    def __init__(self, error=None):
        self.error, self.device_caches = error, {0: "half loaded"}
        self.now = self.most = 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.002)
        self.now -= 1
        if self.error is not None:
            raise self.error


def test_one_thread_launches_at_a_time(monkeypatch):
    """Triton hands out a kernel that another thread is loading still."""
    kernel = Launched()
    monkeypatch.setattr(cuda.sweep_cuda, "quantize_kernel", kernel)
    monkeypatch.setattr(cuda.stream_cuda, "amax_kernel", kernel)
    weight = torch.ones(1, 64)
    with ThreadPoolExecutor(4) as pool:
        for made in [pool.submit(by_triton, weight, [1.0]) for _ in range(8)]:
            made.result()
        for made in [pool.submit(cuda.amaxes, weight) for _ in range(8)]:
            made.result()
    assert kernel.most == 1


def test_a_kernel_that_could_not_be_loaded_is_loaded_anew(monkeypatch):
    """Where its module found no memory, Triton keeps it, and would launch what is not there."""
    kernel = Launched(RuntimeError("Triton Error [CUDA]: out of memory"))
    monkeypatch.setattr(cuda.sweep_cuda, "quantize_kernel", kernel)
    with pytest.raises(RuntimeError, match="out of memory"):
        by_triton(torch.ones(1, 64), [1.0])
    assert kernel.device_caches == {}


def test_bytes_do_not_depend_on_the_tile(monkeypatch):
    weight = blocks_of(["gaussian", "tiny"], 70, 3.3e-4, torch.bfloat16, 11).view(1, -1)
    expected = by_triton(weight, [3.3e-4])
    monkeypatch.setattr(cuda, "_MANY_WORDS", 64 * 16)
    found = by_triton(weight, [3.3e-4])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[2], expected[2], rtol=1e-6)


def compile_for(folder, pattern, *capabilities):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", compiled.__name__, pattern, *map(str, capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_code(found):
    for name, code in found.items():
        assert code["flushes"] == 0, f"{name} flushes subnormal numbers to zero"
        assert code["fused_doubles"] == 0, f"{name} fuses what the definition rounds twice"
        assert code["spilled"] == 0, f"{name} spills registers"
        if name.endswith(f" {cuda.DEFAULT_TILE[0]}"):  # the one that no measurement chooses
            assert code["registers"] <= 128, f"{name} leaves less than 16 warps on a multiprocessor"
        if " quantize" in name or "fake" in name:
            assert code["divisions"] > 0, f"{name} has no IEEE division"


def test_kernels_compile_for_a_hopper_without_one(tmp_path):
    found = compile_for(
        tmp_path, r"quantize . 0 32|quantize 1 [12] 128|one|amax 0|fake 0|deq.* 0", 90
    )
    assert len(found) == 9
    check_code(found)
    assert found["sm_90 quantize 1 0 32"]["fused"] > 100


@pytest.mark.slow
def test_kernels_compile_for_every_generation(tmp_path):
    check_code(compile_for(tmp_path, "", 75, 80, 86, 89, 90, 100, 120))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "scale"), CASES, ids=str)
def test_more_blocks(dtype, scale):
    check(blocks_of(FAMILIES, 20_000, scale, dtype, 12).view(1, -1), [scale])


@pytest.mark.gpu
@on_a_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_million_blocks_on_a_device(family, dtype):
    """Against numba, and in part against the reference on the same device."""
    scales = fitting(dtype)[:2]
    for seed in range(10):
        rows = [blocks_of([family], 500_001, s, dtype, seed).flatten() for s in scales]
        check(torch.stack(rows), scales)
    part = rows[0][: 16 * 20_000].view(-1, 16).to(DEVICE)
    expected = reference.quantize(part, scales[0], mse=True)
    codes, bytes_, _ = by_triton(part.view(1, -1), scales[:1])
    assert torch.equal(expected[0].cpu().flatten(), codes[0])
    assert torch.equal(expected[1].cpu().flatten(), bytes_[0])


@pytest.mark.gpu
@on_a_device
@pytest.mark.parametrize("tile", cuda.TILES, ids=str)
@pytest.mark.parametrize("algorithm", [sweep.MAX, sweep.MSE, sweep.MSE_FULL])
def test_every_tile_on_a_device(tile, algorithm, monkeypatch):
    monkeypatch.setattr(cuda, "DEFAULT_TILE", tile)
    monkeypatch.setattr(cuda, "_tuned", {})
    for dtype in DTYPES:
        check(blocks_of(FAMILIES, 5_003, 3.3e-4, dtype, 13).view(1, -1), [3.3e-4], algorithm)


@pytest.mark.gpu
@on_a_device
def test_tuning_on_a_device_changes_no_byte(monkeypatch):
    monkeypatch.setattr(cuda, "_tuned", {})
    cuda.tune(DEVICE, torch.bfloat16, sweep.MSE)
    assert next(iter(cuda._tuned.values())) in cuda.TILES
    ((index, *_),) = cuda._tuned
    assert index == torch.cuda.current_device()  # as the tensors that are quantized name it
    check(blocks_of(FAMILIES, 5_003, 3.3e-4, torch.bfloat16, 14).view(1, -1), [3.3e-4])
