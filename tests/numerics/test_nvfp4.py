# SPDX-License-Identifier: Apache-2.0
"""Proves the face of the numerics: shapes, dtypes, edges and errors; that the numba kernels give
the reference's bytes through it, for any input; and that max gives ModelOpt's bytes."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.errors import NonFiniteError, UsageError
from fourfold.formats.nvfp4 import (
    GLOBAL_SCALE_MAX,
    GLOBAL_SCALE_MIN,
    NVFP4Tensor,
    ScaleAlgorithm,
    amax,
    dequantize,
    global_scale,
    quantize,
    quantize_into,
    warm_up,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ("reference", "numba")
both = pytest.mark.parametrize("kernel", KERNELS)
algorithms = pytest.mark.parametrize("scale", ["max", "mse"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))
        and torch.equal(a.global_scale, b.global_scale)
    )


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@both
@algorithms
@dtypes
@pytest.mark.parametrize("shape", [(16,), (3, 32), (2, 3, 48), (2, 1, 2, 16), (1, 2, 1, 2, 64)])
def test_any_number_of_leading_dimensions(shape, dtype, scale, kernel):
    weight = random(shape, dtype)
    made = quantize(weight, scale=scale, kernel=kernel)
    assert (made.codes.dtype, made.codes.shape) == (torch.uint8, (*shape[:-1], shape[-1] // 2))
    assert made.block_scale.dtype == torch.float8_e4m3fn
    assert made.block_scale.shape == (*shape[:-1], shape[-1] // 16)
    assert (made.global_scale.dtype, made.global_scale.shape) == (torch.float32, ())
    assert made.shape == weight.shape
    flat = quantize(weight.reshape(-1, 16), scale=scale, kernel=kernel)
    assert torch.equal(made.codes.flatten(), flat.codes.flatten())
    error = (made.dequantize() - weight.float()).norm() / weight.float().norm()
    assert error < 0.15


@both
@algorithms
@pytest.mark.parametrize("shape", [(0,), (0, 32), (4, 0), (2, 0, 16), (0, 0)])
def test_empty_tensors_keep_the_contract(shape, scale, kernel):
    made = quantize(torch.zeros(shape, dtype=torch.bfloat16), scale=scale, kernel=kernel)
    assert made.codes.shape == (*shape[:-1], shape[-1] // 2)
    assert made.block_scale.shape == (*shape[:-1], shape[-1] // 16)
    assert made.block_scale.dtype == torch.float8_e4m3fn
    assert made.global_scale > 0
    assert made.dequantize(torch.bfloat16).shape == shape


@both
@pytest.mark.parametrize(("scale", "byte"), [("max", 0x38), ("mse", 0x01)])
def test_all_zero_tensors_and_blocks(scale, byte, kernel):
    weight = torch.zeros(2, 32)
    weight[0, 3] = -0.0
    made = quantize(weight, scale=scale, kernel=kernel)
    assert made.global_scale == 1.0
    assert made.block_scale.view(torch.uint8).unique().tolist() == [byte]
    assert made.codes.flatten().tolist() == [0, 0x80] + [0] * 30
    weight[1, 20] = 3.0
    scales = quantize(weight, scale=scale, kernel=kernel).block_scale.view(torch.uint8)
    assert scales[0].tolist() == [byte, byte]


@both
@dtypes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(bad, dtype, kernel):
    weight = random((4, 3, 160), dtype)
    weight[2, 1, 77] = bad
    weight[3, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"experts\.7\.up: (nan|-?inf) at \[2, 1, 77\]"):
        quantize(weight, name="experts.7.up", kernel=kernel)
    with pytest.raises(NonFiniteError, match=r"experts\.7\.up"):
        amax(weight, name="experts.7.up", kernel=kernel)
    codes, scales = torch.empty(4, 80, dtype=torch.uint8), torch.empty(4, 10, dtype=torch.uint8)
    for scale in ScaleAlgorithm:
        with pytest.raises(NonFiniteError, match=r"w: .* at \[2, 77\]"):
            quantize_into(
                weight[:, 1], codes, scales, scale=scale, global_scale=1e-3, name="w", kernel=kernel
            )


@both
@dtypes
def test_amax_is_exact(dtype, kernel):
    weight = random((37, 48), dtype)
    weight[5, 7] = -4.75
    assert amax(weight, kernel=kernel) == 4.75
    assert amax(weight[:, :16], kernel=kernel) == float(weight[:, :16].abs().max())
    assert amax(weight.T, kernel=kernel) == 4.75
    assert amax(weight[3, 4], kernel=kernel) == float(weight[3, 4].abs())
    assert amax(weight[:0], kernel=kernel) == 0.0


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-30, 1.0, 3.4028234663852886e38])
def test_a_global_scale_is_positive_normal_and_fp32(value):
    scale = global_scale(value)
    assert GLOBAL_SCALE_MIN <= scale <= GLOBAL_SCALE_MAX
    assert float(np.float32(scale)) == scale
    assert np.isfinite(np.float32(6) * (np.float32(448) * np.float32(scale)))
    assert float(np.float32(scale) * np.float32(2.0**-9)) >= 2.0**-126


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_no_global_scale_of_nonsense(value):
    with pytest.raises(UsageError, match="amax"):
        global_scale(value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e-40, 3e38])
def test_a_global_scale_out_of_range_is_refused(value):
    with pytest.raises(UsageError, match="q_proj: a global scale"):
        quantize(torch.ones(1, 16), global_scale=value, name="q_proj")


@pytest.mark.parametrize(
    "weight",
    [torch.ones(4, 24), torch.ones(()), torch.ones(2, 8), torch.ones(16, dtype=torch.int32)],
)
def test_what_cannot_be_quantized_is_refused_by_name(weight):
    with pytest.raises(UsageError, match="lm_head"):
        quantize(weight, name="lm_head")


def test_wrong_words_and_buffers_are_refused():
    weight = torch.ones(2, 32)
    codes, scales = torch.empty(2, 16, dtype=torch.uint8), torch.empty(2, 2, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"max \| mse"):
        quantize(weight, scale="best")
    with pytest.raises(UsageError, match=r"reference \| numba"):
        quantize(weight, kernel="fast")
    with pytest.raises(UsageError, match="codes_out"):
        quantize_into(weight, codes[:, :8], scales, scale="max", global_scale=1.0)
    with pytest.raises(UsageError, match="block_scale_out"):
        quantize_into(weight, codes, scales.T, scale="max", global_scale=1.0)
    with pytest.raises(UsageError, match="belong"):
        dequantize(codes, scales[:1], 1.0)


def modelopt_max(weight, s2):
    """Dynamic NVFP4 block scales and codes as ModelOpt 0.47 computes them, op by op."""
    blocks = weight.view(-1, 16)
    scale = blocks.abs().amax(-1).float() / (6.0 * s2)
    scale[scale == 0] = 1.0
    scale = scale.clamp(min=2.0**-9).to(torch.float8_e4m3fn)
    scaled = blocks / (scale.float() * s2).unsqueeze(-1)
    magnitude = scaled.abs()
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    code = torch.searchsorted(bounds, magnitude, out_int32=True).to(torch.uint8)
    code += (magnitude.unsqueeze(-1) == bounds[[1, 3, 5]]).any(-1)
    code = ((scaled < 0).to(torch.uint8) << 3) + code
    return (code[:, 1::2] << 4) | code[:, 0::2], scale


@both
@dtypes
def test_max_gives_the_bytes_of_modelopt(dtype, kernel):
    weight = random((512, 256), dtype) * torch.logspace(-4, 1, 512)[:, None].to(dtype)
    made = quantize(weight, scale="max", kernel=kernel)
    s2 = weight.abs().amax().float() / (6.0 * 448.0)
    codes, scales = modelopt_max(weight, s2)
    assert torch.equal(made.global_scale, s2)
    assert torch.equal(made.block_scale.view(torch.uint8).flatten(), scales.view(torch.uint8))
    assert torch.equal(made.codes.view(-1, 8), codes)


wild = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e30, 3.4e38, 6.0, 5.0, 2.5, 448.0, 1.0]),
    st.floats(-8, 8, width=32),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(wild, min_size=16, max_size=48).map(lambda v: v[: len(v) // 16 * 16]),
    st.sampled_from(DTYPES),
    st.sampled_from(list(ScaleAlgorithm)),
    st.one_of(st.none(), st.floats(2.0**-117, 2.0**100, width=32)),
)
def test_kernels_agree_on_wild_inputs(values, dtype, scale, s_value):
    weight = torch.tensor(values).to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    a = quantize(weight, scale=scale, global_scale=s_value, kernel="reference")
    b = quantize(weight, scale=scale, global_scale=s_value, kernel="numba")
    assert same(a, b)
    scales = a.block_scale.view(torch.uint8)
    assert ((scales >= 1) & (scales <= 126)).all()
    assert a.global_scale > 0
    for out in DTYPES:
        assert torch.equal(
            a.dequantize(out), dequantize(b.codes, b.block_scale, b.global_scale, out)
        )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(DTYPES),
    st.sampled_from(list(ScaleAlgorithm)),
)
def test_buffers_inside_buffers(rows, blocks, skip, offset, dtype, scale):
    """Any alignment of the output, any row stride of the weight: the same bytes."""
    weight = random((rows, 16 * (blocks + skip)), dtype, rows)[:, 16 * skip :]
    memory = np.zeros(rows * blocks * 9 + 16, np.uint8)
    codes = memory[offset : offset + rows * blocks * 8].reshape(rows, blocks * 8)
    scales = memory[offset + codes.size :][: rows * blocks].reshape(rows, blocks)
    quantize_into(weight, codes, torch.from_numpy(scales), scale=scale, global_scale=1e-3)
    made = quantize(weight, scale=scale, global_scale=1e-3, kernel="reference")
    assert codes.tobytes() == made.codes.numpy().tobytes()
    assert scales.tobytes() == made.block_scale.view(torch.uint8).numpy().tobytes()
    assert not memory[:offset].any()
    assert not memory[offset + rows * blocks * 9 :].any()


@algorithms
def test_threads_give_the_same_bytes(scale):
    weight = random((300, 512), torch.bfloat16)
    whole = quantize(weight, scale=scale)
    codes, scales = torch.empty_like(whole.codes), torch.empty(300, 32, dtype=torch.uint8)

    def part(r):
        rows = slice(r, r + 7)
        return quantize_into(
            weight[rows], codes[rows], scales[rows], scale=scale, global_scale=whole.global_scale
        )

    with ThreadPoolExecutor(4) as pool:
        stats = list(pool.map(part, range(0, 300, 7)))
    assert torch.equal(codes, whole.codes)
    assert torch.equal(scales, whole.block_scale.view(torch.uint8))
    error = (whole.dequantize().double() - weight.double()).square().sum()
    assert sum(s.sum_sq_err for s in stats) == pytest.approx(float(error), rel=1e-5)
    energy = float(weight.double().square().sum())
    assert sum(s.sum_sq_w for s in stats) == pytest.approx(energy, rel=1e-5)


def test_weights_far_beyond_the_global_scale():
    weight = torch.tensor([[1e30, -3e38, 1.0, 1e-40] + [0.5] * 28])
    for scale in ScaleAlgorithm:
        made = [quantize(weight, scale=scale, global_scale=1e-12, kernel=k) for k in KERNELS]
        assert same(*made)


def test_warm_up_compiles_without_a_word(capfd):
    warm_up(torch.bfloat16, "mse")
    assert capfd.readouterr() == ("", "")
